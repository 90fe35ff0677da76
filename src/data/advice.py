"""Warnings and hints about the rows before training, in a run and in preflight alike. Pure."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from src.config.schema import DataConfig, ModelType, RunConfig
from src.data.chat import ENDLESS, NOT_SUPERVISED
from src.data.chat_render import CHANGED, MISSING, TRIMMED
from src.data.dataset import Data, is_chat
from src.data.encoding import Encoder
from src.data.report import SplitReport
from src.data.sets import EncodedSet
from src.data.thought_finder import ANSWERLESS, CUT, IN_PROMPT
from src.util import plural

MARK = re.compile(
    r"<\|(?:im_start|im_end|im_sep|start_header_id|end_header_id|eot_id|begin_of_text|end_of_text|endoftext|"
    r"system|user|assistant|end|turn|start|message|channel|return)\|>"
    r"|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>|<｜[^｜<>]{1,40}｜>"
)
"""What the chat templates of well-known model families write between the messages."""

THOUGHT_MARK = re.compile(r"<(?i:think|thinking|thoughts?|reasoning|tow|h?cot)>|\[(?i:think|thought)\]")
"""What well-known models and data sets open a thought with."""

MARK_ROWS = 1000  # the first rows of a set, which are searched for such marks


class Level(Enum):
    error = "error"
    warning = "warning"
    note = "note"


@dataclass(frozen=True)
class Finding:
    """A warning or hint with its remedy; an error means: do not train on this."""

    level: Level
    text: str


def advice(config: RunConfig, data: Data, tokenizer: Any) -> list[Finding]:
    """Return what the chat template changes, keys that nothing reads, and hints where a choice looks wrong."""
    changes = [(name, report.template_changes, report.template_change_places) for name, report in data.reports.items()]
    return [
        *(finding for of_set in changes for finding in about_template(*of_set)),
        *(finding for name, report in data.reports.items() for finding in _about_keys(name, report)),
        *(finding for name, report in data.reports.items() for finding in _about_thoughts(config, name, report)),
        *_about_marks(config, data),
        *_about_unused_template(config, tokenizer),
        *_about_tokens(config, data),
        *_about_weights(config, data),
    ]


def about_schedule(config: RunConfig, num_steps: int, steps_per_epoch: int | None) -> list[Finding]:
    """Return a warning where a run ends before thoughts begin to shrink: none does in the first epoch."""
    schedule, training = config.data.thought_schedule, config.training
    if schedule is None or schedule.smoothing or config.thought_tags is None:
        return []
    is_asked_for = not training.max_train_steps and training.num_train_epochs <= 1
    if not is_asked_for and (steps_per_epoch is None or num_steps > steps_per_epoch):
        return []
    text = "data.thought_schedule takes nothing in the first epoch, and the run has no other"
    return [Finding(Level.warning, f"{text} (training.num_train_epochs, training.max_train_steps)")]


def about_template(name: str, changes: Mapping[str, int], places: Mapping[str, Sequence[str]]) -> Iterator[Finding]:
    """Report texts of messages that the chat template leaves out, changes or trims.

    `changes` are the numbers of rows that each is in (see chat.RenderedChat), `places` those of the first of the rows.
    """
    for change, count in changes.items():
        part, _, what = change.rpartition(" ")
        message = part if part.endswith("thought") else f"{part} message"
        level = Level.warning
        if change in TURN_PROBLEMS:
            text = TURN_PROBLEMS[change]
        elif what == TRIMMED:
            text = f"the chat template trims white space of the {message}; trim the rows alike"
        else:
            text = f"the chat template {EFFECTS[what]} the {message}: {REMEDIES[part]}"
            level = Level.error if part in ("assistant", "thought") else Level.warning
        yield Finding(level, f"{name}: in {plural(count, 'row')} ({', '.join(places[change])}) {text}")


TURN_PROBLEMS = {
    NOT_SUPERVISED: "an earlier turn is not supervised: the chat template writes it otherwise than generation would; "
    "data.supervised_turns=last says so, or mark what is supervised with {% generation %} in the template",
    ENDLESS: "an earlier turn has no end that could be trained: the chat template writes none there; "
    "data.supervised_turns=last trains on the last turn, with EOS",
}
EFFECTS = {MISSING: "leaves out", CHANGED: "changes or cuts"}
OWN_TAGS = "tokens=tow (or another) writes thoughts between tags of its own, data.thoughts=drop leaves them out"
REMEDIES = {
    "system": "use a template with a system message, or write it into the user's first one",
    "user": "use another template, or write the rows as it takes them",
    "assistant": f"the model would not learn it. Of thoughts in the content: find them with data.thought_pattern; then "
    f"{OWN_TAGS}; else use another template",
    "thought": f"the model would not learn it. {OWN_TAGS}, or use a template with a place for them",
    "earlier assistant": "later turns are trained without it; use another template where it matters",
    "earlier thought": "later turns are trained without it; data.thoughts=drop says so",
}


def _about_keys(name: str, report: SplitReport) -> Iterator[Finding]:
    """Report keys of rows and messages that hold something and that nothing reads."""
    for key, count in report.unread_keys.items():
        is_of_message = "[]." in key
        what = "a key of messages" if is_of_message else "a key"
        text = f"{name}: {key} is {what} that nothing reads; it holds something in {plural(count, 'row')}"
        yield Finding(Level.warning if is_of_message else Level.note, text)


def _about_thoughts(config: RunConfig, name: str, report: SplitReport) -> Iterator[Finding]:
    """Report what is wrong with thoughts, rows that are cut inside one, and a pattern that finds none."""
    limit = "data.max_target_length" if config.model.type is ModelType.encoder_decoder else "data.max_seq_length"
    for kind, count in report.about_thoughts.items():
        level, text = ABOUT_THOUGHTS.get(kind, (Level.warning, f"a thought is {kind}: {OF_MALFORMED}"))
        places = ", ".join(report.about_thoughts_places[kind])
        yield Finding(level, f"{name}: in {plural(count, 'row')} ({places}) {text.format(limit=limit)}")
    patterns = [source.thought_pattern for source in _sections(config).values()]
    if name == "train" and any(patterns) and not report.thoughts and config.thought_tags is None:
        yield Finding(Level.warning, f"{name}: data.thought_pattern finds no thought in any row")


OF_MALFORMED = "a stray tag is learned; data.malformed_thoughts=drop leaves such rows out"
ABOUT_THOUGHTS = {
    CUT: (
        Level.warning,
        "the end is cut off inside a thought: neither its end nor an answer is learned; raise {limit}, or "
        "data.overflow=drop leaves such rows out",
    ),
    ANSWERLESS: (Level.warning, "the answer is nothing but thoughts; does data.thought_pattern match too much?"),
    IN_PROMPT: (Level.note, "the prompt holds a thought's tag: it is fed as that token, and not supervised"),
}


def _about_marks(config: RunConfig, data: Data) -> Iterator[Finding]:
    """Warn of chat marks in the data that are ordinary text for this tokenizer."""
    remedy = "data=messages writes chats in the model's own template; data.system_prompt makes chats of pairs"
    for key, source in _sections(config).items():
        for name in ("prompt_template", "completion_template"):
            if marks := _marks(getattr(source, name) or "", data.encoder):
                text = f"{key}.{name} writes {_named(marks)}"
                yield Finding(Level.warning, f"{text}: ordinary text here, no turns of a chat; {remedy}")
    of_thoughts = "ordinary text here, no thought; data.thought_pattern finds thoughts, as '<think>(.*?)</think>' does"
    for rows in [data.train.first, *data.validation.values(), *data.test.values()]:
        to_search = [i for i in range(min(len(rows), MARK_ROWS)) if not rows.is_rendered(i)]
        found = {i: _marks(rows.prompt(i) + rows.completion(i), data.encoder) for i in to_search}
        yield from _about_marked(rows, found, f"ordinary text here, no turns of a chat; {remedy}")
        found = {i: _marks(rows.completion(i), data.encoder, THOUGHT_MARK) for i in to_search}
        yield from _about_marked(rows, found, of_thoughts)


def _about_marked(rows: EncodedSet, found: Mapping[int, list[str]], what: str) -> Iterator[Finding]:
    marked = {i: marks for i, marks in found.items() if marks}
    if marked:
        first = next(iter(marked))
        text = f"{rows.name}: {plural(len(marked), 'row')} of the first {MARK_ROWS:,} hold {_named(marked[first])}"
        yield Finding(Level.warning, f"{text} ({rows.place(first)}): {what}")


def _sections(config: RunConfig) -> dict[str, DataConfig]:
    """Return the settings of all rows by their key: data, and each source of a mixture."""
    sources = config.data.train_sources() if config.data.mixture else {}
    return {"data": config.data} | {f"data.mixture.{name}": source.data for name, source in sources.items()}


def _marks(text: str, encoder: Encoder, mark: re.Pattern[str] = MARK) -> list[str]:
    """Return the distinct marks in a text that are ordinary text for this tokenizer."""
    marks = list(dict.fromkeys(mark.findall(text)))
    encoded = encoder.encode_texts(marks, is_rendered=False) if marks else []
    return [mark for mark, ids in zip(marks, encoded, strict=True) if len(ids) > 1]


def _named(marks: list[str]) -> str:
    return ", ".join(marks[:3]) + (", …" if len(marks) > 3 else "")


def _about_unused_template(config: RunConfig, tokenizer: Any) -> Iterator[Finding]:
    """Warn where a tokenizer has a chat template and no row is written by it."""
    if tokenizer.chat_template and not any(map(is_chat, _sections(config).values())):
        yield Finding(
            Level.warning,
            f"the tokenizer has a chat template, and data.format = {config.data.format} does not use it: an instruct "
            "model knows prompts in its template only; data.system_prompt='' (or a text) writes pairs as chats, "
            "data=messages reads chats. For a base model this is as it should be",
        )


def _about_tokens(config: RunConfig, data: Data) -> Iterator[Finding]:
    """Warn of new tokens that no training row holds."""
    tokens = data.reports["train"].unused_tokens
    if not tokens:
        return
    are = "is in no training row, so it" if len(tokens) == 1 else "are in no training row, so they"
    text = f"{', '.join(tokens)} {are} will not be trained"
    if set(tokens) & set(config.thought_tags or ()):
        text += " (is data.thought_pattern right? Where the rows have no thoughts choose tokens=none)"
    elif len(tokens) == len(config.tokens.additional_special_tokens):
        text += " (tokens=none adds none)"
    yield Finding(Level.warning, text)


def _about_weights(config: RunConfig, data: Data) -> Iterator[Finding]:
    """Warn of tags that weigh nothing only because what is between them does."""
    keys = [key for key in ("thought_open_weight", "thought_close_weight") if getattr(config.loss, key) is None]
    if config.loss.thought_weight or not keys or config.thought_tags is None or not data.reports["train"].thoughts:
        return
    what = "open or close" if len(keys) == 2 else "open" if "open" in keys[0] else "close"
    remedy = " and ".join(f"loss.{key}=1" for key in keys)
    text = f"loss.thought_weight = 0 holds for tags too, so the model does not learn to {what} a thought"
    yield Finding(Level.warning, f"{text} ({remedy} if it should)")
