"""Records to examples: thoughts are written or dropped, templates filled, chats rendered by the model's template."""

import json
import math
from collections.abc import Collection, Iterator
from itertools import compress
from typing import Any, NamedTuple

from src.config.formats import roles
from src.config.schema import PLACEHOLDER, DataConfig, SupervisedTurns, Thoughts
from src.config.schema.checks import WEIGHT_OR_ZERO
from src.data.answers import strip_thoughts
from src.data.chat import ChatTemplate
from src.data.formats import BadRow, Chat, Pair, field, load_format
from src.data.formats.messages import ROLES, SUPERVISION_KEYS, THOUGHT, form_of
from src.data.readers.record import Record
from src.data.text_encoder import Segment, last_turn
from src.data.thought_finder import ANSWERLESS, IN_PROMPT, FoundThoughts, ThoughtFinder
from src.data.thoughts import count_thoughts, leave_out

FILLER = "-"  # in place of a missing answer of a row to predict, so that its format reads it; no model sees it


class Example(NamedTuple):
    """The text of a row.

    `segments` are its text in order, each tokenised apart; `prompt` is all of it before the last supervised turn, which
    is `completion`; `reference` is the answer of a perfect model, without thoughts and without what a chat template
    adds. EOS follows as an id where `needs_eos`: a chat template has its own ends of turns. `changes` names what the
    template does to the texts of the messages (see chat.RenderedChat), `unread` the keys of the row that nothing reads.
    `weight` is the row's in the loss; None: it has none of its own, which is 1.
    `chat` is what the template rendered. `num_thoughts` counts the thoughts in the data, also where they are dropped;
    `about_thoughts` names what is wrong with them, and what else is counted of them (see thought_finder).
    """

    segments: tuple[Segment, ...]
    prompt: str
    completion: str
    reference: str
    needs_eos: bool = True
    was_cleaned: bool = False
    changes: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    weight: float | None = None
    chat: Chat | None = None
    num_thoughts: int = 0
    about_thoughts: tuple[str, ...] = ()

    @property
    def supervised_text(self) -> str:
        return "".join(segment.text for segment in self.segments if segment.is_supervised)


class ExampleBuilder:
    """Builds examples of the records of one source.

    Thoughts are written between the tags, without tags they are dropped. `known_tags` are those of the tokens, also
    where thoughts are dropped; by default `tags`. With `to_predict` a record may lack its answer, which takes no room
    in the example.
    """

    def __init__(
        self,
        data: DataConfig,
        tags: tuple[str, str] | None,
        template: ChatTemplate | None,
        *,
        known_tags: tuple[str, str] | None = None,
        to_predict: bool = False,
    ) -> None:
        self._read = load_format(data.format)
        self._data = data
        self._known_tags = known_tags or tags or ()
        self._finder = ThoughtFinder(data.thought_pattern, known_tags or tags, data.malformed_thoughts)
        self._tags, self._template, self._to_predict = tags, template, to_predict
        self._prompt_role, self._completion_role = roles(data.format)[0], roles(data.format)[-1]

    def build(self, record: Record) -> Example:
        """Build the example of one record; BadRow where it does not have what its format needs."""
        if self._to_predict:
            return self._prompt_example(record.fields)
        example, column = self._example(record.fields), self._data.weight_column
        if column is None:
            return example
        unread = tuple(name for name in example.unread if name != column)
        return example._replace(unread=unread, weight=row_weight(record.fields, column))

    def _prompt_example(self, fields: dict[str, Any]) -> Example:
        """Build an example whose last turn is only EOS; `completion` and `reference` are '' without an answer."""
        fields, has_answer = _with_answer(fields, self._data)
        example = self._example(fields)
        first, _ = last_turn(example.segments)
        return example._replace(
            segments=(*example.segments[:first], Segment("", is_supervised=True)),
            completion=example.completion if has_answer else "",
            reference=example.reference if has_answer else "",
            needs_eos=True,
        )

    def _example(self, fields: dict[str, Any]) -> Example:
        parsed = self._read(fields, self._data)
        if isinstance(parsed, Chat):
            return self._chat(parsed)
        pair = self._pair(parsed)
        if self._data.system_prompt is None:
            return pair
        messages = [{"role": "user", "content": pair.prompt}, {"role": "assistant", "content": pair.completion}]
        if self._data.system_prompt:
            messages.insert(0, {"role": "system", "content": self._data.system_prompt})
        of_pair = {name: getattr(pair, name) for name in ("was_cleaned", "num_thoughts", "about_thoughts")}
        return self._rendered(Chat(messages, [True], pair.unread))._replace(**of_pair)

    def _rendered(self, chat: Chat) -> Example:
        assert self._template is not None
        return render(chat, self._template, self._tags)

    def _pair(self, pair: Pair) -> Example:
        parts, role, template = pair.parts, self._completion_role, self._data.completion_template
        found = self._finder.find(parts[role] if template is None else fill(template, parts))
        about = self._finder.check(found)
        if self._prompt_role == self._completion_role:
            prompt = ""
        elif self._data.prompt_template is not None:
            prompt = fill(self._data.prompt_template, parts)
        else:
            prompt = parts[self._prompt_role]
        if self._prompt_role != self._completion_role:
            about += [*self._about_prompt(prompt), *_about_answer(found)]
        before = prompt if self._data.system_prompt is None else ""  # a message begins anew
        return pair_example(prompt, found.written(self._tags, before))._replace(
            reference=found.written(None, before),
            was_cleaned=pair.was_cleaned,
            unread=pair.unread,
            num_thoughts=len(found.thoughts),
            about_thoughts=tuple(about),
        )

    def _about_prompt(self, prompt: str) -> list[str]:
        return [IN_PROMPT] if any(tag in prompt for tag in self._known_tags) else []

    def _chat(self, chat: Chat) -> Example:
        messages, about, num_thoughts, turn = list[dict[str, str]](), list[str](), 0, 0
        for message in chat.messages:
            if message["role"] != "assistant":
                about += self._about_prompt(message["content"])
                messages.append(message)
                continue
            turn += 1
            written, found = self._with_thoughts(message)
            about += self._finder.check(found, f"the assistant's turn {turn}: ")
            about += _about_answer(found)
            num_thoughts += len(found.thoughts)
            messages.append(written)
        wanted = chat.is_supervised
        if self._data.supervised_turns is SupervisedTurns.last:
            wanted = [False] * (len(wanted) - 1) + wanted[-1:]
        example = self._rendered(Chat(messages, wanted, chat.unread))
        return example._replace(num_thoughts=num_thoughts, about_thoughts=tuple(dict.fromkeys(about)))

    def _with_thoughts(self, message: dict[str, str]) -> tuple[dict[str, str], FoundThoughts]:
        """Return an assistant's message with its thoughts as they are to be trained on, and what was found in it.

        A thought apart from the content is written between the tags, in front of it; without tags it is left to the
        chat template, unless thoughts are dropped.
        """
        content = found = self._finder.find(message["content"])
        if (thought := message.get(THOUGHT)) is not None:
            found = FoundThoughts(["", *content.between], [thought, *content.thoughts])
            if self._tags is None and self._data.thoughts is not Thoughts.drop:
                return message | {"content": content.written(None, before="")}, found
        return {"role": "assistant", "content": found.written(self._tags, before="")}, found


def pair_example(prompt: str, completion: str) -> Example:
    """Return the example of a prompt and a completion, which is its own reference."""
    segments = (Segment(prompt, is_supervised=False), Segment(completion, is_supervised=True))
    return Example(segments, prompt, completion, completion)


def render(chat: Chat, template: ChatTemplate, tags: tuple[str, str] | None) -> Example:
    """Return the example of a chat; raises as `ChatTemplate.render`."""
    rendered = template.render(chat.messages, chat.is_supervised)
    first, stop = last_turn(rendered.segments)
    answer = strip_thoughts(rendered.answer, tags)
    return Example(
        tuple(rendered.segments),
        prompt="".join(segment.text for segment in rendered.segments[:first]),
        completion="".join(segment.text for segment in rendered.segments[first:stop]),
        reference=template.frame.answer(answer) if rendered.is_framed else template.frame.without_thought(answer),
        needs_eos=first < stop == len(rendered.segments) and not rendered.has_end,
        changes=rendered.changes,
        unread=chat.unread,
        chat=chat,
    )


class Rewriter:
    """Writes examples again, without some of their thoughts, as they would be without them in the data.

    Thoughts are counted from 0 in the supervised texts: of a pair the completion, of a chat the messages that the row
    wants supervised.
    """

    def __init__(self, tags: tuple[str, str], template: ChatTemplate | None) -> None:
        self._tags, self._template = tags, template

    def num_thoughts(self, example: Example) -> int:
        texts = [example.completion] if example.chat is None else _supervised_texts(example.chat)
        return sum(count_thoughts(text, self._tags) for text in texts)

    def without(self, left_out: Collection[int], prompt: str, completion: str, chat: Chat | None) -> Example:
        """Return an example without these thoughts; that of the chat, where it is one."""
        if chat is None:
            return pair_example(prompt, leave_out(completion, self._tags, left_out, before=prompt))
        messages, done = list[dict[str, str]](), 0
        wanted = iter(chat.is_supervised)
        for message in chat.messages:
            if message["role"] == "assistant" and next(wanted):
                content = message["content"]
                its_own = {i - done for i in left_out}
                message = message | {"content": leave_out(content, self._tags, its_own, before="")}
                done += count_thoughts(content, self._tags)
            messages.append(message)
        assert self._template is not None
        return render(Chat(messages, chat.is_supervised), self._template, self._tags)


def _supervised_texts(chat: Chat) -> Iterator[str]:
    """Yield the contents of the messages that the row wants supervised."""
    texts = (message["content"] for message in chat.messages if message["role"] == "assistant")
    yield from compress(texts, chat.is_supervised)


def _about_answer(found: FoundThoughts) -> list[str]:
    return [ANSWERLESS] if found.thoughts and not "".join(found.between).strip() else []


def _with_answer(fields: dict[str, Any], data: DataConfig) -> tuple[dict[str, Any], bool]:
    """Return a row's fields, with a filler where its answer (or last message) is missing, and whether it had one."""
    *others, column = (data.columns[role] for role in roles(data.format))
    answer = fields.get(column)
    if roles(data.format) != ("messages",):
        lacks_only_this = (answer is None or answer == "") and all(other in fields for other in others)
        return (fields | {column: FILLER}, False) if lacks_only_this else (fields, True)
    if not isinstance(answer, list) or not answer or not isinstance(answer[-1], dict):
        return fields, True  # its format reports what is wrong
    *before, last = answer
    role_key, content_key = form_of(last)
    if ROLES.get(str(last.get(role_key))) != "assistant":
        return fields | {column: [*answer, {role_key: "assistant", content_key: FILLER}]}, False
    text = last.get(content_key)
    has_answer = bool(text.strip()) if isinstance(text, str) else text is not None
    last = {key: value for key, value in last.items() if key not in SUPERVISION_KEYS}  # predicted at any weight
    last |= {} if has_answer else {content_key: FILLER}
    return fields | {column: [*before, last]}, has_answer


def row_weight(fields: dict[str, Any], column: str) -> float:
    """Return a row's weight; BadRow where it is missing, or not a number that a weight can be.

    A number may be written as a text: tables such as CSV have nothing else.
    """
    value = field(fields, column, "data.weight_column")
    try:
        weight = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        weight = math.nan
    if not WEIGHT_OR_ZERO.holds(weight):
        shown = repr(value) if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
        raise BadRow(f"{column!r} is {shown}; a row's weight is {WEIGHT_OR_ZERO.allowed} (data.weight_column)")
    return weight


def fill(template: str, parts: dict[str, str]) -> str:
    """Replace each {name} in a template by the part of that name; braces in the parts themselves mean nothing."""
    return PLACEHOLDER.sub(lambda match: parts[match.group(1)], template)
