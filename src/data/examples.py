"""From a record to an example: thoughts written or left out, templates filled, chats put into the model's own form."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from src.config.formats import roles
from src.config.schema import PLACEHOLDER, DataConfig, Thoughts
from src.data.answers import strip_thoughts
from src.data.chat import ChatTemplate
from src.data.formats import Chat, Pair, load_format
from src.data.formats.messages import LEARNED_KEYS, ROLES, THOUGHT, form_of
from src.data.readers.record import Record
from src.data.segments import Segment, last_turn
from src.patterns import Pattern

FILLER = "-"
"""Stands where a row to predict has no answer, so that its format can read it; no model ever sees it."""


class PromptRecord(Record):
    """A row whose answer is to be predicted: it may be missing, and takes no room."""

    __slots__ = ()


class Example(NamedTuple):
    """A row in words.

    `segments` are its text in order, each tokenised apart; `prompt` is all of it before the last supervised turn, which
    is `completion`; `reference` is the answer that a perfect model would write, without thoughts and without what a
    chat template adds. EOS follows as an id where `needs_eos`: a chat template has its own ends of turns. `changes`
    names what the template does to the texts of the messages (see chat.Rendered), `unread` the keys of the row that
    nothing reads.
    """

    segments: tuple[Segment, ...]
    prompt: str
    completion: str
    reference: str
    needs_eos: bool = True
    was_cleaned: bool = False
    changes: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()

    @property
    def learned(self) -> str:
        """All text that is learned, of every turn."""
        return "".join(segment.text for segment in self.segments if segment.is_supervised)


@dataclass(frozen=True)
class ThoughtForm:
    """How thoughts are found in the data and how they are written for the model.

    `pattern` finds a thought, its first group is the thought itself; with `tags` it is written between them, without
    it is left out.
    """

    pattern: str | None
    tags: tuple[str, str] | None

    @cached_property
    def _found(self) -> Pattern | None:
        return None if self.pattern is None else Pattern("data.thought_pattern", self.pattern)

    def keep(self, text: str) -> str:
        """Write every thought between the tags."""
        if self._found is None or self.tags is None:
            return self.drop(text)
        opened, closed = self.tags
        return self._found.sub(lambda match: f"{opened}{match.group(1) or ''}{closed}", text)

    def keep_and_drop(self, text: str) -> tuple[str, str]:
        """Give a text with its thoughts as the model writes them, and without."""
        dropped = self.drop(text)
        return (self.keep(text) if self.tags is not None else dropped), dropped

    def drop(self, text: str) -> str:
        """Leave every thought out."""
        return text if self._found is None else self._found.sub("", text)


class Examples:
    """Makes examples of the records of one source; what it needs is the same for all of them."""

    def __init__(self, data: DataConfig, tags: tuple[str, str] | None, template: ChatTemplate | None) -> None:
        self._read = load_format(data.format)
        self._data = data
        self._thoughts = ThoughtForm(data.thought_pattern, tags)
        self._template = template
        self._prompt_role, self._learned_role = roles(data.format)[0], roles(data.format)[-1]

    def of(self, record: Record) -> Example:
        """Make the example of one record.

        Raises:
            BadRow: where the record does not have what its format needs.
        """
        if isinstance(record, PromptRecord):
            return self._to_predict(record.fields)
        return self._of(record.fields)

    def _to_predict(self, fields: dict[str, Any]) -> Example:
        """Make an example whose last turn is nothing but EOS; its words are kept, '' where there is no answer."""
        fields, has_answer = with_answer(fields, self._data)
        example = self._of(fields)
        first, _ = last_turn(example.segments)
        return example._replace(
            segments=(*example.segments[:first], Segment("", is_supervised=True)),
            completion=example.completion if has_answer else "",
            reference=example.reference if has_answer else "",
            needs_eos=True,
        )

    def _of(self, fields: dict[str, Any]) -> Example:
        given = self._read(fields, self._data)
        if isinstance(given, Chat):
            return self._chat(given)
        pair = self._pair(given)
        if self._data.system_prompt is None:
            return pair
        messages = [{"role": "user", "content": pair.prompt}, {"role": "assistant", "content": pair.completion}]
        if self._data.system_prompt:
            messages.insert(0, {"role": "system", "content": self._data.system_prompt})
        return self._render(messages, [True], pair.unread)._replace(was_cleaned=pair.was_cleaned)

    def _pair(self, pair: Pair) -> Example:
        parts = pair.parts
        completion, reference = self._thoughts.keep_and_drop(parts[self._learned_role])
        if (template := self._data.completion_template) is not None:
            completion, reference = (
                fill(template, parts | {self._learned_role: text}) for text in (completion, reference)
            )
        if self._prompt_role == self._learned_role:
            prompt = ""
        elif self._data.prompt_template is not None:
            prompt = fill(self._data.prompt_template, parts)
        else:
            prompt = parts[self._prompt_role]
        segments = (Segment(prompt, is_supervised=False), Segment(completion, is_supervised=True))
        return Example(segments, prompt, completion, reference, was_cleaned=pair.was_cleaned, unread=pair.unread)

    def _chat(self, chat: Chat) -> Example:
        return self._render([self._with_thoughts(message) for message in chat.messages], chat.learned, chat.unread)

    def _with_thoughts(self, message: dict[str, str]) -> dict[str, str]:
        """Return an assistant's message with its thoughts written as they are to be learned.

        A thought beside the content is written between the tags, in front of it; without tags it is left to the chat
        template, unless thoughts are dropped.
        """
        if message["role"] != "assistant":
            return message
        content, thought = self._thoughts.keep(message["content"]), message.get(THOUGHT)
        if thought is None:
            return message | {"content": content}
        if self._thoughts.tags is not None:
            opened, closed = self._thoughts.tags
            return {"role": "assistant", "content": f"{opened}{thought}{closed}{content}"}
        if self._data.thoughts is Thoughts.drop:
            return {"role": "assistant", "content": content}
        return message | {"content": content}

    def _render(self, messages: list[dict[str, str]], learned: list[bool], unread: tuple[str, ...]) -> Example:
        assert self._template is not None
        chat = self._template.render(messages, learned, self._data.supervised_turns)
        first, stop = last_turn(chat.segments)
        frame, answer = self._template.frame, strip_thoughts(chat.answer, self._thoughts.tags)
        return Example(
            tuple(chat.segments),
            prompt="".join(segment.text for segment in chat.segments[:first]),
            completion="".join(segment.text for segment in chat.segments[first:stop]),
            reference=frame.answer(answer) if chat.is_framed else frame.without_thought(answer),
            needs_eos=first < stop == len(chat.segments) and not chat.has_end,
            changes=chat.changes,
            unread=unread,
        )


def with_answer(fields: dict[str, Any], data: DataConfig) -> tuple[dict[str, Any], bool]:
    """Give a row's fields with a filler where its answer is missing, and say whether it had one.

    Of a chat the answer is the assistant's last message, whatever its weight.
    """
    *others, column = (data.columns[role] for role in roles(data.format))
    answer = fields.get(column)
    if roles(data.format) != ("messages",):
        lacks_only_this = (answer is None or answer == "") and all(other in fields for other in others)
        return (fields | {column: FILLER}, False) if lacks_only_this else (fields, True)
    if not isinstance(answer, list) or not answer or not isinstance(answer[-1], dict):
        return fields, True  # the format says what is wrong with it
    *before, last = answer
    who, what = form_of(last)
    if ROLES.get(str(last.get(who))) != "assistant":
        return fields | {column: [*answer, {who: "assistant", what: FILLER}]}, False
    text = last.get(what)
    has_answer = bool(text.strip()) if isinstance(text, str) else text is not None
    last = {key: value for key, value in last.items() if key not in LEARNED_KEYS}
    last |= {} if has_answer else {what: FILLER}
    return fields | {column: [*before, last]}, has_answer


def fill(template: str, parts: dict[str, str]) -> str:
    """Put the parts in place of {their names}; braces in the parts themselves mean nothing."""
    return PLACEHOLDER.sub(lambda match: parts[match.group(1)], template)
