"""Chats rendered by the tokenizer's template, split where a supervised turn begins and ends.

Supervised are the assistant's text and the token that ends its turn. The turn begins where the generation prompt ends,
because that is what generation is fed, or where a template marks it with {% generation %}, and it ends with the first
added token after the message's own text (docs/decisions/0011).

The texts of messages are located in the rendered text by markers around them, see chat_render.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from src.data import chat_render
from src.data.answers import AnswerFrame
from src.data.chat_render import LITERAL_FROM, LITERAL_TO, Messages, MessageText, probes, squeezed
from src.data.formats import BadRow
from src.data.formats.messages import THOUGHT, THOUGHT_KEYS
from src.data.text_encoder import Segment, any_of
from src.errors import LimitError, TokenError

REWRITTEN = (
    "the chat template writes an earlier turn otherwise once more turns follow, so it can't be trained on as "
    "generation would write it"
)

LITERAL = re.compile(f"{LITERAL_FROM}(\\d+){LITERAL_TO}")
NAMES_THOUGHT = r"(?=[^\s<>\[\]/]*(?i:think|thought|reason))"
OPENED_THOUGHT = re.compile(
    rf"(?:<{NAMES_THOUGHT}(?P<angle>[^\s<>/]+)>|\[{NAMES_THOUGHT}(?P<square>[^\s\[\]/]+)\])(?P<gap>\s*)"
)
"""The end of a generation prompt that opens a thought: <think>, [THINK] and the like."""
EMPTY_THOUGHT = re.compile(r"(<(?P<name>[^\s<>/]+)>)\s*(</(?P=name)>)\s*")
"""An empty thought, which some generation prompts end with, and some templates write before every answer."""
PROMPTED_THOUGHT = re.compile(rf"(?:{EMPTY_THOUGHT.pattern}|{OPENED_THOUGHT.pattern})\Z")

NOT_SUPERVISED, ENDLESS = "turn not learned", "turn without end"
"""Problems of a turn, see RenderedChat.changes."""


class Turn(NamedTuple):
    """A supervised turn, of the message with this index.

    `text` replaces [start, stop) of the rendered chat, and is mostly equal. `answer` is `text` up to `end`, the token
    that ends the turn ('' where there is none). `opened` comes before it and is not supervised: the end of a generation
    prompt that the template leaves out once the turn is written; `text` continues it then.
    """

    message: int
    start: int
    stop: int
    text: str
    answer: str
    end: str
    opened: str = ""


class RenderedChat(NamedTuple):
    """A chat as its template writes it.

    `answer` is the text of the last supervised turn: the message's own text as it is written, or, where `is_framed`,
    the turn up to the token that ends it; '' without a supervised turn. `has_end` is true where it has such a token.
    `changes` names what the template does to the texts of the messages: "system missing", "assistant trimmed", "earlier
    thought missing" (of a turn that is not supervised), …, or to turns: "turn not learned", "turn without end".
    """

    segments: list[Segment]
    answer: str
    is_framed: bool
    has_end: bool
    changes: tuple[str, ...]


class ChatTemplate:
    """A tokenizer's chat template, as training uses it.

    `frame` is what it writes around an answer; `ends` are the added tokens that end the assistant's turns.
    """

    def __init__(self, tokenizer: Any, control_tokens: Sequence[str]) -> None:
        template = tokenizer.get_chat_template()
        self._tokenizer = tokenizer
        self._marks_supervised = bool(chat_render.GENERATION_TAG.search(template))
        self._template = chat_render.GENERATION_TAG.sub(chat_render.as_marker, template)
        self._literal = any_of([*control_tokens, *chat_render.MARKERS])
        added = [token for token in tokenizer.get_added_vocab() if token.strip()]  # some are only white space
        self._added_token = any_of({*added, *control_tokens})
        self._thought_key: str | None = None
        self._limit: LimitError | None = None
        self.frame, self.ends = AnswerFrame(), tuple[str, ...]()  # as long as they are probed
        turns = [turn for chat in (("b",), ("b", "c")) for probe in probes(*chat) for turn, _ in self._probed(probe)]
        self.ends = tuple(dict.fromkeys(turn.end for turn in turns if turn.end))
        self.frame = self._frame()

    @property
    def is_fallback(self) -> bool:
        return chat_render.FALLBACK_TEMPLATE in self._tokenizer.get_chat_template()

    def render(self, messages: Sequence[dict[str, str]], wanted: Sequence[bool]) -> RenderedChat:
        """Return a chat as segments of text; `wanted` says of each assistant's message whether it is to be supervised.

        BadRow where the template refuses the chat, TokenError where it can't be found out what of it is supervised.
        """
        literals: list[str] = []
        marked = [self._with_literals_marked(message, literals) for message in messages]
        try:
            rendered, parts, supervised = self._turns(marked, wanted)
        except BadRow as refused:
            raise BadRow(f"{refused}{self._remedy(messages)}") from refused
        segments, done = list[Segment](), 0
        for turn in supervised:
            segments += _segments(rendered[done : turn.start] + turn.opened, False, literals)
            segments += _segments(turn.text, True, literals)
            done = turn.stop
        segments += _segments(rendered[done:], False, literals)
        answer, is_framed = _answer(supervised[-1], rendered, parts) if supervised else ("", False)
        return RenderedChat(
            segments or [Segment("", is_supervised=False, is_rendered=True)],
            answer=LITERAL.sub(lambda match: literals[int(match.group(1))], answer),
            is_framed=is_framed,
            has_end=bool(supervised and supervised[-1].end),
            changes=tuple(dict.fromkeys([*_changes(rendered, parts, supervised), *self._missed(wanted, supervised)])),
        )

    def prompt(self, messages: Sequence[dict[str, str]]) -> str:
        """Return what generation is fed for the next turn of a chat; BadRow where the template refuses it."""
        return self._plain(list(messages), add_generation_prompt=True)[0]

    def _missed(self, wanted: Sequence[bool], turns: Sequence[Turn]) -> Iterator[str]:
        """Yield the problems of turns that should be supervised."""
        if len(turns) < sum(wanted):
            yield NOT_SUPERVISED
        end = self.frame.end_text
        if any(not turn.end and not (end and end in turn.text) for turn in turns[:-1]):
            yield ENDLESS

    def _remedy(self, messages: Sequence[dict[str, str]]) -> str:
        """Return what to do about a chat that the template refuses, where that is known."""
        if messages[0]["role"] == "system":
            with suppress(BadRow):
                self._apply([dict(message) for message in messages[1:]])
                remedy = "leave it out, or write it into the user's first one"
                return f" (it takes this chat without the system message: {remedy})"
        return ""

    def _turns(self, messages: Messages, wanted: Sequence[bool]) -> tuple[str, list[MessageText], list[Turn]]:
        """Return a rendered chat, the texts of its messages, and its supervised turns."""
        rendered, regions = self._plain(messages)
        parts = chat_render.locate(messages, rendered, self._apply)
        contents = [part for part in parts if part.name == "assistant"]
        if self._marks_supervised:
            return rendered, parts, list(self._marked(messages, wanted, rendered, contents, regions))
        turns = []
        for content, is_wanted in zip(contents, wanted, strict=True):
            if is_wanted and (turn := self._by_prefix(messages, rendered, content)) is not None:
                turns.append(turn)
            elif is_wanted and not all(self._is_written(p, rendered) for p in parts if p.message == content.message):
                raise TokenError(f"{REWRITTEN}; train on the last turn only: data.supervised_turns=last")
        if any(wanted) and not turns:
            raise TokenError(f"{REWRITTEN}, and there is no other to train on; set no weight of 0 for the last turn")
        return rendered, parts, turns

    def _marked(
        self,
        messages: Messages,
        wanted: Sequence[bool],
        rendered: str,
        contents: Sequence[MessageText],
        regions: Sequence[tuple[int, int]],
    ) -> Iterator[Turn]:
        """Yield the turns that the template marks, each from where its prompt ends to the token that ends it."""
        if len(regions) != len(wanted):
            raise TokenError(
                f"the chat template marks {len(regions)} turns with {{% generation %}}, the assistant has {len(wanted)}"
            )
        for (start, stop), content, is_wanted in zip(regions, contents, wanted, strict=True):
            if not is_wanted:
                continue
            start = self._after_prompt(messages[: content.message], rendered, start, stop)
            text_end = content.end if content.end is not None and start <= content.end <= stop else None
            answer, end = self._until_end(rendered[:stop], start, text_end)
            yield Turn(content.message, start, start + len(answer + end), answer + end, answer, end)

    def _after_prompt(self, before: Messages, rendered: str, start: int, stop: int) -> int:
        """Return where a marked turn begins, after a header that the generation prompt writes too."""
        try:
            prompt, _ = self._plain(before, add_generation_prompt=True)
        except BadRow:  # a template that takes whole chats only
            return start
        return len(prompt) if start < len(prompt) <= stop and rendered.startswith(prompt) else start

    def _by_prefix(self, messages: Messages, rendered: str, content: MessageText) -> Turn | None:
        """Return the turn after the generation prompt; None where it is written otherwise in a chat that ends there."""
        i, is_last = content.message, content.message == len(messages) - 1
        prompt, _ = self._plain(messages[:i], add_generation_prompt=True)
        alone = rendered if is_last else self._plain(messages[: i + 1])[0]
        start = len(prompt) if alone.startswith(prompt) else self._before_thought(prompt)
        if not alone.startswith(prompt[:start]):
            raise TokenError(_prompt_is_another(prompt, alone))
        only_prompted = prompt[start:]
        if not only_prompted:
            return self._turn(i, alone, rendered, start, content.end)
        return self._prompted_turn(messages[i], rendered, start, only_prompted, content) if is_last else None

    def _before_thought(self, prompt: str) -> int:
        """Return where the thought, opened or empty, begins that ends a generation prompt; without one its length."""
        found = PROMPTED_THOUGHT.search(prompt)
        if found is None:
            return len(prompt)
        opened = OPENED_THOUGHT.fullmatch(found.group())
        if opened is not None:
            close = _thought_tags(opened)[1]  # must be known to the template or the tokenizer
            if close not in self._template and not self._added_token.fullmatch(close):
                return len(prompt)
        return found.start()

    def _is_written(self, part: MessageText, rendered: str) -> bool:
        """Return whether a text that the template has a place for is in the rendered chat."""
        has_place = part.name != "thought" or bool(self._thought_key or self.frame.thought_close)
        return not has_place or part.is_in(rendered)

    def _turn(self, message: int, alone: str, rendered: str, start: int, text_end: int | None) -> Turn | None:
        """Return the turn that ends `alone`, a chat up to it; None where `rendered`, the whole chat, has another."""
        if text_end is not None and (text_end < start or rendered[:text_end] != alone[:text_end]):
            if alone is not rendered:
                return None
            text_end = None
        answer, end = self._until_end(alone, start, text_end)
        if not end and not rendered.startswith(alone):  # white space that only a last turn has
            answer = answer.rstrip()
        text = answer + end
        stop = start + len(text)
        if rendered[:stop] == alone[:stop]:
            if not end and alone is not rendered and (follows := self._added_token.match(rendered, stop)):
                # nothing but the beginning of the next message ends this turn (GLM 4), so it must end generation
                end = follows.group()
                text, stop = text + end, stop + len(end)
            return Turn(message, start, stop, text, answer, end)
        stop = start + len(answer)  # a token that ends only the chat, after a text that ends each turn
        ends_in_words = text_end is not None and bool(alone[text_end:stop].strip())
        is_same = ends_in_words and rendered[:stop] == alone[:stop]
        return Turn(message, start, stop, answer, answer, "") if is_same else None

    def _prompted_turn(
        self, message: dict[str, str], rendered: str, start: int, prompted: str, content: MessageText
    ) -> Turn:
        """Return a last turn that the template writes without the thought its generation prompt ends with.

        Generation is fed the opening of the thought, so the supervised text continues it: the thought, where the
        message has one, its close, and the answer. After a thought that the prompt has closed it is the answer.
        """
        begun = ""
        if (opened := OPENED_THOUGHT.fullmatch(prompted)) is not None:
            opening, close = _thought_tags(opened)
            thought = message.get(THOUGHT) or ""
            before, closed, _ = message["content"].partition(close)
            if not thought and closed and before.lstrip().startswith(opening):
                thought = before.lstrip().removeprefix(opening)
            begun = f"{thought.strip()}{opened['gap']}{close}{opened['gap'] * 2}"
        text_end = None if content.end is None or content.end < start else content.end
        answer, end = self._until_end(rendered, start, text_end)
        stop = start + len(answer) + len(end)
        answer = begun + answer.lstrip()
        return Turn(content.message, start, stop, answer + end, answer, end, prompted)

    def _until_end(self, chat: str, start: int, text_end: int | None) -> tuple[str, str]:
        """Return the text of a chat's last turn, and the token after the message's text that ends it; '' for none."""
        if text_end is not None:
            found = self._added_token.search(chat, text_end)
            return (chat[start:], "") if found is None else (chat[start : found.start()], found.group())
        turn = chat[start:]
        ends = [(turn.rfind(end), end) for end in self.ends if end in turn]
        at, end = max(ends, default=(len(turn), ""))
        return turn[:at], end

    def _probed(self, chat: Messages) -> list[tuple[Turn, list[MessageText]]]:
        """Return the turns of a probe with the texts of its messages; none where the template refuses it."""
        wanted = [True for message in chat if message["role"] == "assistant"]
        try:
            _, parts, turns = self._turns(chat, wanted)
        except (BadRow, TokenError):  # reported for rows, with their place
            return []
        except LimitError as problem:  # raised for the first row
            self._limit = problem
            return []
        return [(turn, parts) for turn in turns]

    def _frame(self) -> AnswerFrame:
        """Return what the template writes around an answer and around a thought, found by probes of one turn."""
        plain = next((found for probe in probes() for found in self._probed(probe)), None)
        if plain is None:
            return AnswerFrame()
        turn, parts = plain
        begin, end = parts[-1].begin, parts[-1].end
        if turn.opened:
            opened = OPENED_THOUGHT.fullmatch(turn.opened)
            close = _thought_tags(opened)[1] if opened else ""
            after = turn.answer[turn.answer.rfind("b") + 1 :]
            return AnswerFrame(after=after, thought_close=close, opens_thought=bool(close))
        if begin is None or end is None or not turn.start <= begin <= end <= turn.start + len(turn.answer):
            return AnswerFrame()
        before, after = turn.answer[: begin - turn.start], turn.answer[end - turn.start :]
        for key in [key for key in THOUGHT_KEYS if key in self._template]:
            self._thought_key = key
            for turn, parts in (found for probe in probes(**{THOUGHT: "t"}) for found in self._probed(probe)):
                answer, thought = parts[-2], parts[-1]
                if thought.begin is None or thought.end is None or answer.begin is None:
                    continue
                if turn.start <= thought.begin and thought.end <= answer.begin:
                    opening = turn.answer[: thought.begin - turn.start].strip()
                    close = turn.answer[thought.end - turn.start : answer.begin - turn.start].strip()
                    return AnswerFrame(before, after, opening, close, opens_thought=bool(close and not opening))
        self._thought_key = None
        empty = EMPTY_THOUGHT.fullmatch(before.lstrip())
        opening, close = (str(empty[1]), str(empty[3])) if empty else ("", "")
        return AnswerFrame(before, after, opening, close)

    def _plain(self, messages: Messages, *, add_generation_prompt: bool = False) -> tuple[str, list[tuple[int, int]]]:
        """Return a rendered chat, and [start, stop) of what the template marks as supervised."""
        text, marks, _ = chat_render.read_markers(self._apply(messages, add_generation_prompt=add_generation_prompt))
        return text, marks

    def _apply(self, messages: Messages, *, add_generation_prompt: bool = False) -> str:
        if self._limit is not None:
            raise self._limit
        names = {THOUGHT: self._thought_key or THOUGHT}  # the key that the template reads
        named = [{names.get(key, key): text for key, text in message.items()} for message in messages]
        return chat_render.render(self._tokenizer, self._template, named, add_generation_prompt=add_generation_prompt)

    def _with_literals_marked(self, message: dict[str, str], literals: list[str]) -> dict[str, str]:
        """Replace each control token in a message by a marker, so that it stays text; markers in it likewise."""

        def mark(match: re.Match[str]) -> str:
            literals.append(match.group())
            return f"{LITERAL_FROM}{len(literals) - 1}{LITERAL_TO}"

        return message | {k: self._literal.sub(mark, message[k]) for k in ("content", THOUGHT) if k in message}


def _answer(turn: Turn, rendered: str, parts: Sequence[MessageText]) -> tuple[str, bool]:
    """Return the text of a turn, and whether that is the turn rather than the message's own text."""
    content = next(part for part in parts if (part.message, part.name) == (turn.message, "assistant"))
    if turn.opened or content.begin is None or content.end is None or content.begin < turn.start:
        return turn.answer, True
    return rendered[content.begin : content.end], False


def _thought_tags(opened: re.Match[str]) -> tuple[str, str]:
    """Return what opens a thought and what closes it."""
    if name := opened["angle"]:
        return f"<{name}>", f"</{name}>"
    return f"[{opened['square']}]", f"[/{opened['square']}]"


def _changes(rendered: str, parts: Sequence[MessageText], turns: Sequence[Turn]) -> Iterator[str]:
    """Yield what the template did to the texts of messages that are not in the rendered chat as they were."""
    prompted = turns[-1] if turns and turns[-1].opened else None
    supervised = {turn.message for turn in turns}
    for part in parts:
        change = part.change_in(rendered)
        if prompted is not None and part.message == prompted.message:
            written = prompted.opened + prompted.text
            if squeezed(part.core) in squeezed(written):
                change = None if part.text in written else chat_render.TRIMMED
            else:
                change = chat_render.MISSING if part.end is None else chat_render.CHANGED
        if change is not None:
            is_earlier = part.name in ("assistant", "thought") and part.message not in supervised
            yield f"{'earlier ' if is_earlier else ''}{part.name} {change}"


def _prompt_is_another(prompt: str, alone: str) -> str:
    differs = next((i for i, (a, b) in enumerate(zip(prompt, alone, strict=False)) if a != b), 0)
    same = max(0, differs - 20)
    return (
        "the chat template's generation prompt is not how the assistant's turn begins in a chat "
        f"(…{prompt[same:][:60]!r} there, …{alone[same:][:60]!r} here); "
        "mark what is supervised in the template with {% generation %} … {% endgeneration %}"
    )


def _segments(text: str, is_supervised: bool, literals: list[str]) -> Iterator[Segment]:
    for i, part in enumerate(LITERAL.split(text)):
        if i % 2:
            yield Segment(literals[int(part)], is_supervised)
        elif part:
            yield Segment(part, is_supervised, is_rendered=True)
