"""What an unknown key should have been: its place, its name here, or the option that has it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from src.config import groups, peers
from src.config.groups import GLOBAL, Option
from src.config.keys import Key, all_keys
from src.config.options import CONF, GLOBAL_GROUPS, OptionFileError, shown
from src.config.peers import Counterpart
from src.config.problems import Problem
from src.config.quoting import typed
from src.config.schema import ENTRY_SECTIONS, SECTIONS, Keys
from src.util import value_at

LIKE_HERE, LIKE_ELSEWHERE = 0.6, 0.8
"""How much of a name must be alike for a key of the same section, and of another, to be meant."""
HERE_FIRST = 0.1
"""How much less alike a name of the same section may be than one from elsewhere."""
SHORTEST_ALIKE = 4
"""Characters of a name below which it is like another one by chance."""
MOST_SUGGESTED = 3
LONGEST = 100
"""Characters of KEY=VALUE that are suggested; of longer ones the key alone is."""
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
OPTION_NAMES = ("name", "kind", "class", "_target_")
"""Other trainers' names for the choice of a section's option."""


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

    def chosen(self, group: str) -> str:
        """Return the option of a group, or of a frozen configuration its type; '' where that is not known."""
        if group in self.choices:
            return self.choices[group]
        section = self.sections.get(group)
        kind = section.get("type") if isinstance(section, Mapping) else None
        return kind if isinstance(kind, str) else ""

    def has(self, key: Key) -> bool:
        """Return whether what was chosen has a key."""
        section, option = self.sections.get(key.section), self.choices.get(key.section)
        if isinstance(section, Mapping):
            kind = section.get("type")
        else:  # as an empty one, below which keys are not indented
            kind = groups.values_of(key.section, option, tuple(self.roots)).get("type") if option else None
        return not key.types or kind in key.types

    def is_empty(self, section: str) -> bool:
        """Return whether a file has a section's name with nothing below it."""
        return section in _sections() and section in self.sections and self.sections[section] is None


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
    if "." in problem.key:
        return None
    for option in _chosen_options(situation):
        expected = GLOBAL if option.group in GLOBAL_GROUPS or option.group not in _sections() else None
        if option.package == expected:
            continue
        puts = option.package or option.group
        if puts != GLOBAL and puts.partition(".")[0] == problem.key:
            late = (
                "; it stands too low, only blank lines may come before it" if option.written_package == GLOBAL else ""
            )
            reason = f"its first line must be `# @package {GLOBAL}`: without it its keys are those of `{puts}`{late}"
        elif puts == GLOBAL and problem.key in option.top_keys and option.group in _sections():
            reason = f"without its line `# @package {GLOBAL}` this would be {option.group}.{problem.key}"
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


def _sections() -> tuple[str, ...]:
    return (*SECTIONS, "sweep")


def _single(key: str, value: Any, siblings: Sequence[str] = ()) -> Iterator[tuple[str, Any]]:
    """Yield the keys of an unknown section with their values.

    What another trainer has as a mapping stays whole, and what has almost the name of a sibling.
    """
    is_whole = (
        key in all_keys()
        or any(here.is_whole for _, here in peers.find(_leaf(key)))
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
    if problem.key in ENTRY_SECTIONS:
        return f"read by python -m src.{problem.key}, and by nothing else"
    if other := _of_another_option(key, situation):
        return other
    if (dotted := key.replace("/", ".")) != key and dotted in all_keys():
        return f"unknown key; did you mean {dotted}?"
    suggested, because = _of_source(key, problem) or _in_section(key, value, situation), ""
    if not suggested:
        suggested, because = _by_name(_leaf(key), value, situation)
    if not suggested and not because:
        suggested = _alike(key, value, problem, situation)
    if suggested:
        note = next((suggestion.note for suggestion in suggested if suggestion.note), "")
        texts = dict.fromkeys(suggestion.text for suggestion in suggested[:MOST_SUGGESTED])
        return f"unknown key; did you mean {' or '.join(texts)}?{f' ({note})' if note else ''}"
    if because:
        return f"unknown key; {because}"
    prefix = problem.key.rpartition(".")[0]
    return f"unknown key; {prefix or 'the top level'} has {', '.join(problem.siblings)}"


def _of_another_option(key: str, situation: Situation) -> str:
    """Return which option has a key that the chosen one lacks; '' where none has it."""
    known = all_keys().get(key)
    chosen = situation.chosen(known.section) if known else ""
    if known is None or not known.types or not chosen:
        return ""
    section, name = known.section, key.removeprefix(f"{known.section}.")
    if section not in situation.choices:
        return f"unknown key: {section} is {chosen} in this run and has no {name}; its options stay as they are"
    having = groups.first_with_key(known, situation.roots)
    if not having:
        return ""
    options = f"{section}={', '.join(having)}"
    if chosen == "none":
        return f"unknown key: {section}={chosen} has no {name}; choose {options}"
    return f"unknown key: {section}={chosen} has no {name}, which is a key of {options}"


@dataclass(frozen=True)
class _Suggestion:
    """A key, KEY=VALUE, or choices and KEY=VALUE, as they can be typed; and what to know of it."""

    text: str
    note: str = ""


def _of_source(key: str, problem: UnknownKey) -> list[_Suggestion]:
    """Return what another trainer's name means within one source of a mixture."""
    prefix, _, leaf = key.rpartition(".")
    names = [_leaf(here.key) for _, here in peers.find(leaf) if here.key.startswith("data.")]
    is_source = key == problem.key and prefix.startswith("data.mixture.")
    return [_Suggestion(f"{prefix}.{name}") for name in dict.fromkeys(names) if is_source and name in problem.siblings]


def _in_section(key: str, value: Any, situation: Situation) -> list[_Suggestion]:
    """Return what is meant by a name within a section, where the section says more than the name alone.

    The section's and the key's name may be one name elsewhere (`evaluation.steps`: eval_steps); a key of that section
    may have the name among its words (`loss.weight`: thought_weight); or the name is that of the section's
    option, or deeper in it.
    """
    *parents, leaf = key.split(".")
    if not parents:
        return []
    section = _section_like(parents[0])
    if inner := _of_inner(section, ".".join([*parents[1:], leaf]), value, situation):
        return inner
    begins = dict.fromkeys([parents[-1], parents[0], section, *BEFORE.get(section, ())])
    for begin in filter(None, begins):
        if found := _by_name(f"{begin}_{leaf}", value, situation)[0]:
            return found
    if not section or any(here.key.partition(".")[0] == section for _, here in peers.find(leaf)):
        return []
    words = _words_of(leaf)
    of_section = [
        candidate
        for candidate in all_keys().values()
        if candidate.section == section and situation.is_read(candidate.name)
    ]
    having = [
        candidate
        for candidate in of_section
        if words < _words_of(candidate.leaf) and (situation.choices or situation.has(candidate))
    ]
    having = [candidate for candidate in having if situation.has(candidate)] or having
    having = [candidate for candidate in having if candidate.accepts(value)] or having
    if having:
        return [
            suggestion for candidate in having for suggestion in _of_key(candidate, _typed(candidate, value), situation)
        ]
    if leaf in OPTION_NAMES and section in situation.choices:
        given = Counterpart(section, peers.options_of(section), is_same=True)
        return _of_group(given, given.value(value)[0], [], situation)
    return []


def _section_like(name: str) -> str:
    """Return the section of a name, or of one almost like it; '' where there is none."""
    alike = {section: 1.0 if section == name else _likeness(section, name) for section in _sections()}
    best = max(alike, key=alike.__getitem__)
    return best if alike[best] >= LIKE_HERE else ""


def _words_of(name: str) -> set[str]:
    """Return the words of a name, in the singular."""
    return {word.removesuffix("s") for word in name.lower().replace("-", "_").split("_")}


def _of_inner(section: str, name: str, value: Any, situation: Situation) -> list[_Suggestion]:
    """Return what a name deep in another library's mapping of a section means: its place, or an option with it."""
    for key in all_keys().values():
        if key.section != section or not key.inner or not situation.is_read(key.name):
            continue
        deep = [f"{key.name}.{path}" for path in _paths(key.inner) if f".{path}".endswith(f".{name}")]
        if deep and situation.has(key):
            return [_Suggestion(text) for text in deep]
        if deep and section in situation.choices:
            options = groups.with_key(key, situation.roots)
            those = [option for option in options if _value_in(section, option, deep[0], situation) == value]
            shown = those[:1] or [option for option in options if option in groups.first_with_key(key, situation.roots)]
            return [_Suggestion(f"{section}={shown[0]}" if those else f"one of {section}={', '.join(shown)}")]
    return []


def _paths(inner: Keys) -> Iterator[str]:
    for name, below in inner.items():
        yield name
        if isinstance(below, Mapping):
            yield from (f"{name}.{path}" for path in _paths(below))


def _value_in(section: str, option: str, key: str, situation: Situation) -> Any:
    """Return the value of a key in an option; None where it has none."""
    return value_at(groups.values_of(section, option, tuple(situation.roots)), key.partition(".")[2])


def _by_name(leaf: str, value: Any, situation: Situation) -> tuple[list[_Suggestion], str]:
    """Return what the tables of other trainers, and keys of that very name elsewhere, suggest; or why there is none."""
    suggested: list[_Suggestion] = []
    sections, reasons = set[str](), list[str]()
    for _, here in peers.find(leaf):
        if here.key:
            suggested += _of_counterpart(here, value, situation)
            sections.add(here.key.partition(".")[0])
        else:
            reasons.append(f"there is no counterpart, because {here.note}")
    same = [key for key in _offered(situation) if key.leaf == leaf != "type" and key.section not in sections]
    near = [key for key in same if situation.has(key)]
    for key in near or (same if not suggested else []):
        suggested += _of_key(key, _typed(key, value), situation)
    return suggested, reasons[0] if reasons else ""


def _offered(situation: Situation) -> Iterator[Key]:
    """Yield the keys that can be suggested."""
    for key in all_keys().values():
        if key.section in ENTRY_SECTIONS or (key.section == "sweep" and not situation.is_sweep):
            continue
        if situation.is_read(key.name) and (situation.choices or situation.has(key)):
            yield key


def _of_counterpart(here: Counterpart, value: Any, situation: Situation) -> list[_Suggestion]:
    """Return what a table suggests for a value: the key, with its value where that is another one here."""
    given, is_known = here.value(value)
    replaced = [better for choice, better in here.instead_of.items() if _is_chosen(choice, situation)]
    known = all_keys().get(here.key)
    if known is None:
        return _of_group(here, given, replaced, situation)
    text = _typed(known, given) if is_known else ""
    is_other = peers.value_text(value) in here.values
    return _of_key(known, text, situation, replaced, is_other=is_other, note="" if text else here.note or known.allowed)


def _of_group(here: Counterpart, given: Any, replaced: Sequence[str], situation: Situation) -> list[_Suggestion]:
    """Return the choice of a group's option, or all there are where it can't be said which; or a key of Hydra's."""
    if here.key.startswith("hydra."):
        return [_Suggestion(here.key)] if situation.is_read(here.key) else []
    if not situation.choices:  # a run that was started keeps its options
        return []
    options = groups.readable(here.key, situation.roots)
    if given in options:
        return [_Suggestion(" ".join(_with_needs([*replaced, f"{here.key}={given}"], situation)))]
    return [_Suggestion(f"one of {here.key}={', '.join(options)}", here.note)]


def _is_chosen(choice: str, situation: Situation) -> bool:
    group, _, option = choice.partition("=")
    return situation.choices.get(group) == option


def _with_needs(choices: list[str], situation: Situation) -> list[str]:
    """Return choices with what they need besides: an adapter on random weights can only be exported merged."""
    model, export = (situation.sections.get(name) for name in ("model", "export"))
    is_random = isinstance(model, Mapping) and model.get("weights") == "random" and "model=causal_lm" not in choices
    is_merged = isinstance(export, Mapping) and export.get("merge") is True
    adapts = any(choice.startswith("adapter=") and choice != "adapter=none" for choice in choices)
    return [*choices, "export.merge=true"] if adapts and is_random and not is_merged else choices


def _of_key(
    key: Key, text: str, situation: Situation, replaced: Sequence[str] = (), *, is_other: bool = False, note: str = ""
) -> list[_Suggestion]:
    """Return a key as a suggestion; with choices that it needs, or another value than was given, as KEY=VALUE.

    Args:
        text: KEY=VALUE; '' where the key does not take the value there.
        replaced: choices to make for other reasons.
    """
    if not situation.is_read(key.name) or (not situation.choices and not situation.has(key)):
        return []
    if situation.is_empty(key.section):
        note = f"indented below `{key.section}:`"
    needed = [] if situation.has(key) else groups.first_with_key(key, situation.roots)[:1]
    choices = _with_needs([*replaced, *(f"{key.section}={option}" for option in needed)], situation)
    if text:
        return [_Suggestion(" ".join([*choices, text if choices or is_other else key.name]), note)]
    return [_Suggestion(f"{key.name}, with {' '.join(choices)}" if choices else key.name, note)]


def _typed(key: Key, value: Any) -> str:
    """Return KEY=VALUE as it is typed in a shell; '' where it can't be, is long, or the key takes no such value."""
    return typed(key.name, value, LONGEST) if key.accepts(value) else ""


def _alike(key: str, value: Any, problem: UnknownKey, situation: Situation) -> list[_Suggestion]:
    """Return what a key or a section of a similar name suggests."""
    section, _, rest = key.partition(".")
    if rest and section not in _sections():
        meant = [f"{name}.{rest}" for name in _sections() if _likeness(section, name) >= LIKE_HERE]
        if found := [name for name in meant if name in all_keys()]:
            return [_Suggestion(name) for name in found]
    prefix, leaf = problem.key.rpartition(".")[0], key.rpartition(".")[2]
    here = [f"{prefix}.{name}" if prefix else name for name in problem.siblings] if key == problem.key else []
    if here and not prefix:
        here += _sections()
    alike = {name: _likeness(leaf, name.rpartition(".")[2]) + HERE_FIRST for name in here}
    alike = {name: likeness for name, likeness in alike.items() if likeness >= LIKE_HERE + HERE_FIRST}
    elsewhere = {key.name: key.leaf for key in _offered(situation)} | {name: name for name in peers.names()}
    for name, their_leaf in elsewhere.items() if len(leaf) >= SHORTEST_ALIKE else ():
        if name not in alike and (likeness := _likeness(leaf, their_leaf)) >= LIKE_ELSEWHERE:
            alike[name] = likeness
    if not alike:
        return []
    best = max(alike, key=alike.__getitem__)
    if best in here:
        return [_Suggestion(best)]
    known = all_keys().get(best)
    return _of_key(known, _typed(known, value), situation) if known else _by_name(best, value, situation)[0]


def _likeness(one: str, other: str) -> float:
    """Return how much of two names is alike, from 0 to 1."""
    matcher = SequenceMatcher(None, one, other)
    return matcher.ratio() if matcher.real_quick_ratio() >= LIKE_HERE else 0.0
