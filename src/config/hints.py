"""What an unknown key should have been: its place, its name here, or the option that has it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from src.config import groups, peers
from src.config.groups import GLOBAL, Option
from src.config.keys import Key, all_keys
from src.config.options import CONF, OptionFileError, shown
from src.config.peers import Counterpart
from src.config.problems import Problem
from src.config.quoting import typed
from src.config.schema import ENTRY_SECTIONS, SECTIONS, Keys
from src.util import value_at

ALL_SECTIONS = (*SECTIONS, "sweep")
LIKE_HERE, LIKE_ELSEWHERE = 0.6, 0.8
"""How much of a name must be alike for a key of the same section, and of another, to be meant."""
HERE_FIRST = 0.1  # how much less alike a name of the same section may be than one from elsewhere
SHORTEST_ALIKE = 4  # characters of a name below which it is like another one by chance
MOST_SUGGESTED = 3
LONGEST = 100  # characters of KEY=VALUE that are suggested; of longer ones the key alone is
BEFORE = {
    "training": ("train",),
    "evaluation": ("eval",),
    "checkpoint": ("save",),
    "data": ("dataset",),
    "optimizer": ("adam",),
    "scheduler": ("lr_scheduler",),
    "adapter": ("lora", "peft"),
    "quantization": ("bnb_4bit",),
    "tracking": ("mlflow", "wandb"),
}
"""Prefixes that other trainers put before the names of a section's keys, besides its own name."""
AS_GIVEN = Counterpart(is_same=True)  # of a name and a value that mean here what they say
Suggestion = tuple[str, str]  # KEY, KEY=VALUE, or choices and KEY=VALUE, as they are typed; and what to know of it
OPTION_NAMES = ("name", "kind", "class", "_target_")  # other trainers' names for the choice of a section's option


@dataclass(frozen=True)
class UnknownKey(Problem):
    """A key that its section does not have; `with_hints` finds its reason once all choices are known."""

    siblings: tuple[str, ...] = ()  # the keys that the section has


@dataclass(frozen=True)
class Situation:
    """The configuration whose keys are explained."""

    sections: Mapping[str, Any]
    choices: Mapping[str, str]  # each group's option; empty for a frozen configuration, which keeps its options
    roots: Sequence[Path] = (CONF,)
    is_sweep: bool = False
    is_read: Callable[[str], bool] = field(default=lambda key: True)  # whether the entry reads a key

    def kind(self, section: str) -> Any:
        """Return the type of a section's option; None where there is none."""
        given, option = self.sections.get(section), self.choices.get(section)
        if isinstance(given, Mapping):
            return given.get("type")
        # as an empty one, below which keys are not indented
        return groups.values_of(section, option, tuple(self.roots)).get("type") if option else None

    def has(self, key: Key) -> bool:
        """Return whether what was chosen has a key."""
        return not key.types or self.kind(key.section) in key.types

    def offers(self, key: Key) -> bool:
        """Return whether a key can be suggested: a configuration without choices keeps the options that it has."""
        return self.is_read(key.name) and (bool(self.choices) or self.has(key))


def with_hints(problems: Sequence[Problem], situation: Situation) -> Iterator[Problem]:
    """Yield the problems, unknown keys with what was probably meant; a section that is unknown as its single keys."""
    for problem in problems:
        if not isinstance(problem, UnknownKey):
            yield problem
        elif misplaced := _misplaced(problem, situation):
            yield misplaced
        else:
            for key, value in _single(problem.key, problem.value, problem.siblings):
                yield Problem(key, _reason(key, value, problem, situation), value, where=problem.where)


def _misplaced(problem: UnknownKey, situation: Situation) -> Problem | None:
    """Return what is wrong with an option file that puts its keys where none are, where that is why one is unknown."""
    for option in _chosen_options(situation) if "." not in problem.key else ():
        puts = option.package or option.group
        if option.package == (None if option.group in ALL_SECTIONS else GLOBAL):
            continue
        if puts == GLOBAL and problem.key in option.top_keys:
            reason = f"without its line `# @package {GLOBAL}` this would be {option.group}.{problem.key}"
        elif puts != GLOBAL and puts.partition(".")[0] == problem.key:
            reason = f"its first line must be `# @package {GLOBAL}`: without it its keys are those of `{puts}`"
            if option.written_package == GLOBAL:
                reason += "; it stands too low, only blank lines may come before it"
        else:
            continue
        return Problem(problem.key, reason, has_value=False, where=shown(option.file))
    return None


def _chosen_options(situation: Situation) -> Iterator[Option]:
    for group, name in situation.choices.items():
        if "/" not in group:
            try:
                yield from groups.lineage(group, name, tuple(situation.roots))
            except OptionFileError:
                continue  # a problem of its own


def _single(key: str, value: Any, siblings: Sequence[str] = ()) -> Iterator[tuple[str, Any]]:
    """Yield the keys of an unknown section with their values.

    What another trainer has as a mapping stays whole, and what has almost the name of a sibling.
    """
    is_whole = (
        key in all_keys()
        or any(not here.is_same and not here.values for here in peers.find(_leaf(key)))
        or any(_likeness(_leaf(key), name) >= LIKE_ELSEWHERE for name in siblings)
    )
    if isinstance(value, dict) and value and not is_whole:
        for name, inner in value.items():
            yield from _single(f"{key}.{name}", inner)
    else:
        yield key, value


def _leaf(key: str) -> str:
    return key.rpartition(".")[2]


def _reason(key: str, value: Any, problem: UnknownKey, situation: Situation) -> str:
    """Return what to do about an unknown key."""
    known = all_keys().get(key)
    if only := problem.key if problem.key in ENTRY_SECTIONS else known.entry if known else "":
        return f"read by python -m src.{only}, and by nothing else"
    if other := _of_another_option(key, situation):
        return other
    if (dotted := key.replace("/", ".")) != key and dotted in all_keys():
        return f"unknown key; did you mean {dotted}?"
    suggested = _of_source(key, problem) or _in_section(key, value, situation) or _by_name(_leaf(key), value, situation)
    because = next((here.note for here in peers.find(_leaf(key)) if not here.key), "")
    if because and not suggested:
        return f"unknown key; there is no counterpart, because {because}"
    if suggested := suggested or _alike(key, value, problem, situation):
        note = next((note for _, note in suggested if note), "")
        texts = dict.fromkeys(text for text, _ in suggested[:MOST_SUGGESTED])
        return f"unknown key; did you mean {' or '.join(texts)}?{f' ({note})' if note else ''}"
    return f"unknown key; {problem.key.rpartition('.')[0] or 'the top level'} has {', '.join(problem.siblings)}"


def _of_another_option(key: str, situation: Situation) -> str:
    """Return which option has a key that the chosen one lacks; '' where none has it."""
    known = all_keys().get(key)
    if known is None or not known.types:
        return ""
    section, name = known.section, key.removeprefix(f"{known.section}.")
    if section not in situation.choices:
        kind = situation.kind(section)
        if not isinstance(kind, str) or not kind:
            return ""
        return f"unknown key: {section} is {kind} in this run and has no {name}; its options stay as they are"
    if not (having := groups.first_with_key(known, situation.roots)):
        return ""
    options, chosen = f"{section}={', '.join(having)}", situation.choices[section]
    remedy = f"; choose {options}" if chosen == "none" else f", which is a key of {options}"
    return f"unknown key: {section}={chosen} has no {name}{remedy}"


def _of_source(key: str, problem: UnknownKey) -> list[Suggestion]:
    """Return what another trainer's name means within one source of a mixture."""
    prefix, _, leaf = key.rpartition(".")
    if key != problem.key or not prefix.startswith("data.mixture."):
        return []
    names = dict.fromkeys(_leaf(here.key) for here in peers.find(leaf) if here.key.startswith("data."))
    return [(f"{prefix}.{name}", "") for name in names if name in problem.siblings]


def _in_section(key: str, value: Any, situation: Situation) -> list[Suggestion]:
    """Return what is meant by a name within a section, where the section says more than the name alone.

    The section's and the key's name may be one name elsewhere (`evaluation.steps`: eval_steps); a key of that section
    may have the name among its words (`loss.weight`: thought_weight); or the name is that of the section's
    option, or deeper in it.
    """
    *parents, leaf = key.split(".")
    if not parents:
        return []
    section = max(ALL_SECTIONS, key=lambda name: _likeness(name, parents[0]))
    if _likeness(section, parents[0]) < LIKE_HERE:
        section = ""
    if inner := _of_inner(section, ".".join([*parents[1:], leaf]), value, situation):
        return inner
    begins = dict.fromkeys([parents[-1], parents[0], section, *BEFORE.get(section, ())])
    for begin in filter(None, begins):
        if found := _by_name(f"{begin}_{leaf}", value, situation):
            return found
    if not section or any(here.key.partition(".")[0] == section for here in peers.find(leaf)):
        return []
    words, keys = _words_of(leaf), all_keys().values()
    having = [one for one in keys if one.section == section and words < _words_of(one.leaf) and situation.offers(one)]
    having = [one for one in having if situation.has(one)] or having
    having = [one for one in having if one.accepts(value)] or having
    if not having and leaf in OPTION_NAMES and section in situation.choices:
        return _of_counterpart(Counterpart(section, peers.options_of(section), is_same=True), value, situation)
    return [suggestion for one in having for suggestion in _of_key(one, value, situation)]


def _words_of(name: str) -> set[str]:
    """Return the words of a name, in the singular."""
    return {word.removesuffix("s") for word in name.lower().replace("-", "_").split("_")}


def _of_inner(section: str, name: str, value: Any, situation: Situation) -> list[Suggestion]:
    """Return what a name deep in another library's mapping of a section means: its place, or an option with it."""
    for key in all_keys().values():
        if key.section != section or not key.inner or not situation.is_read(key.name):
            continue
        deep = [f"{key.name}.{path}" for path in _paths(key.inner) if f".{path}".endswith(f".{name}")]
        if deep and situation.has(key):
            return [(text, "") for text in deep]
        if deep and section in situation.choices:
            there = groups.setting(replace(key, name=deep[0]), situation.roots)
            for option in groups.with_key(key, situation.roots):
                if there.get(option) == value:
                    return [(f"{section}={option}", "")]
            return [(f"one of {section}={', '.join(groups.first_with_key(key, situation.roots))}", "")]
    return []


def _paths(inner: Keys) -> Iterator[str]:
    for name, below in inner.items():
        yield name
        if isinstance(below, Mapping):
            yield from (f"{name}.{path}" for path in _paths(below))


def _by_name(leaf: str, value: Any, situation: Situation) -> list[Suggestion]:
    """Return what the tables of other trainers, and keys of that very name elsewhere, suggest."""
    suggested: list[Suggestion] = []
    known = [here for here in peers.find(leaf) if here.key]
    for here in known:
        suggested += _of_counterpart(here, value, situation)
    sections = {here.key.partition(".")[0] for here in known}
    same = [key for key in _offered(situation) if key.leaf == leaf != "type" and key.section not in sections]
    for key in [key for key in same if situation.has(key)] or (same if not suggested else []):
        suggested += _of_key(key, value, situation)
    return suggested


def _offered(situation: Situation) -> Iterator[Key]:
    """Yield the keys that can be suggested."""
    for key in all_keys().values():
        is_elsewhere = key.entry or (key.section == "sweep" and not situation.is_sweep)
        if not is_elsewhere and situation.offers(key):
            yield key


def _of_counterpart(here: Counterpart, value: Any, situation: Situation) -> list[Suggestion]:
    """Return what a table suggests for a value: a key, or the choice of an option; all there are where none is it."""
    if known := all_keys().get(here.key):
        return _of_key(known, value, situation, here)
    if here.key.startswith("hydra."):
        return [(here.key, "")] if situation.is_read(here.key) else []
    if not situation.choices:  # a run that was started keeps its options
        return []
    options, (given, _) = groups.readable(here.key, situation.roots), here.value(value)
    if given in options:
        return [(" ".join(_choices(here, [f"{here.key}={given}"], situation)), "")]
    return [(f"one of {here.key}={', '.join(options)}", here.note)]


def _of_key(key: Key, value: Any, situation: Situation, here: Counterpart = AS_GIVEN) -> list[Suggestion]:
    """Return a key as a suggestion; with choices that it needs, or another value than was given, as KEY=VALUE."""
    if not situation.offers(key):
        return []
    given, is_known = here.value(value)
    text = typed(key.name, given, LONGEST) if is_known and key.accepts(given) else ""
    note = (here.note or key.allowed) if here.key and not text else ""
    if situation.sections.get(key.section, ...) is None:  # a file has its name with nothing below it
        note = f"indented below `{key.section}:`"
    needed = [] if situation.has(key) else groups.first_with_key(key, situation.roots)[:1]
    choices = _choices(here, [f"{key.section}={option}" for option in needed], situation)
    if text:
        is_other = peers.value_text(value) in here.values
        return [(" ".join([*choices, text if choices or is_other else key.name]), note)]
    return [(f"{key.name}, with {' '.join(choices)}" if choices else key.name, note)]


def _choices(here: Counterpart, needed: list[str], situation: Situation) -> list[str]:
    """Return the options to choose: those that take others' places, those needed, and what these need.

    An adapter on random weights can only be exported merged.
    """
    chosen = [f"{group}={option}" for group, option in situation.choices.items()]
    choices = [*(better for choice, better in here.instead_of.items() if choice in chosen), *needed]
    is_random = value_at(situation.sections, "model.weights") == "random" and "model=causal_lm" not in choices
    is_merged = value_at(situation.sections, "export.merge") is True
    adapts = any(choice.startswith("adapter=") and choice != "adapter=none" for choice in choices)
    return [*choices, "export.merge=true"] if adapts and is_random and not is_merged else choices


def _alike(key: str, value: Any, problem: UnknownKey, situation: Situation) -> list[Suggestion]:
    """Return what a key or a section of a similar name suggests."""
    section, _, rest = key.partition(".")
    if rest and section not in ALL_SECTIONS:
        meant = [f"{name}.{rest}" for name in ALL_SECTIONS if _likeness(section, name) >= LIKE_HERE]
        if found := [(name, "") for name in meant if name in all_keys()]:
            return found
    prefix, leaf = problem.key.rpartition(".")[0], _leaf(key)
    here = [f"{prefix}.{name}" if prefix else name for name in problem.siblings] if key == problem.key else []
    if here and not prefix:
        here += ALL_SECTIONS
    alike = {name: _likeness(leaf, _leaf(name)) + HERE_FIRST for name in here}
    alike = {name: likeness for name, likeness in alike.items() if likeness >= LIKE_HERE + HERE_FIRST}
    elsewhere = {key.name: key.leaf for key in _offered(situation)} | {name: name for name in peers.by_name()}
    for name, their_leaf in elsewhere.items() if len(leaf) >= SHORTEST_ALIKE else ():
        if name not in alike and (likeness := _likeness(leaf, their_leaf)) >= LIKE_ELSEWHERE:
            alike[name] = likeness
    best = max(alike, key=alike.__getitem__, default="")
    if best in here or not best:
        return [(best, "")] if best else []
    known = all_keys().get(best)
    return _of_key(known, value, situation) if known else _by_name(best, value, situation)


def _likeness(one: str, other: str) -> float:
    """Return how much of two names is alike, from 0 to 1."""
    matcher = SequenceMatcher(None, one, other)
    return matcher.ratio() if matcher.real_quick_ratio() >= LIKE_HERE else 0.0
