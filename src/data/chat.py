"""Chats in the model's own form: the tokenizer's template, cut where a turn begins and ends that is learned.

Learned is what the assistant says and the token that ends its turn. A template that marks it with {% generation %} is
taken at its word. In any other the turn begins where the generation prompt ends, because that is what generation is
fed, and ends with the first added token after the message's own text.

The texts of messages are found again in the rendered text by signs around them, never by searching for their words.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from jinja2 import TemplateError

from src.config.schema import SupervisedTurns
from src.data.answers import AnswerFrame
from src.data.formats import BadRow
from src.data.formats.messages import THOUGHT, THOUGHT_KEYS
from src.data.pieces import Piece, any_of
from src.errors import TokenError, one_line

FALLBACK_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message.role == 'system' -%}{{ message.content + '\n\n' }}"
    "{%- elif message.role == 'user' -%}{{ 'User:\n' + message.content + '\n\n' }}"
    "{%- else -%}{{ 'Assistant:\n' }}"
    "{%- generation -%}{{ message.content + eos_token }}{%- endgeneration -%}"
    "{{ '' if loop.last else '\n\n' }}"
    "{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ 'Assistant:\n' }}{%- endif -%}"
)
"""For tokenizers without a template of their own; the exported tokenizer has it too."""

# characters of a private use area stand for what must be found again in rendered text
LEARNED_FROM, LEARNED_TO, LITERAL_FROM, LITERAL_TO = "\uf8d0", "\uf8d1", "\uf8d2", "\uf8d3"
TEXT_FROM, TEXT_TO, NUMBER_END = "\uf8d4", "\uf8d5", "\uf8d6"
SIGNS = (LEARNED_FROM, LEARNED_TO, LITERAL_FROM, LITERAL_TO, TEXT_FROM, TEXT_TO, NUMBER_END)
MARKER = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")
LITERAL = re.compile(f"{LITERAL_FROM}(\\d+){LITERAL_TO}")
SIGN = re.compile(f"({LEARNED_FROM}|{LEARNED_TO})|({TEXT_FROM}|{TEXT_TO})(\\d+){NUMBER_END}")

NAMES_THOUGHT = r"(?=[^\s<>\[\]/]*(?i:think|thought|reason))"
OPENED_THOUGHT = re.compile(
    rf"(?:<{NAMES_THOUGHT}(?P<angle>[^\s<>/]+)>|\[{NAMES_THOUGHT}(?P<square>[^\s\[\]/]+)\])(?P<gap>\s*)"
)
"""The end of a generation prompt that opens a thought: <think>, [THINK] and their like."""
EMPTY_THOUGHT = re.compile(r"(<(?P<name>[^\s<>/]+)>)\s*(</(?P=name)>)\s*")
"""A thought without words, which some generation prompts end with, and some templates write before every answer."""
PROMPTED_THOUGHT = re.compile(rf"(?:{EMPTY_THOUGHT.pattern}|{OPENED_THOUGHT.pattern})\Z")

TRIMMED, CHANGED, MISSING = "trimmed", "changed", "missing"
NOT_LEARNED = "turn not learned"
"""What can become of a text of a message, and of a turn: see Rendered.changes."""


class Turn(NamedTuple):
    """A turn that is learned: [start, stop) of the rendered chat, which `text` takes the place of.

    `message` is the number of its message. `opened` is written before it and not learned: the end of a generation
    prompt that the template leaves out once the turn is written. `answer` is `text` up to `end`, the token that ends
    the turn ('' where there is none).
    """

    message: int
    start: int
    stop: int
    text: str
    answer: str
    end: str
    opened: str = ""


class Part(NamedTuple):
    """A text of a message: its content or its thought. [begin, end) is where it is in the rendered chat."""

    message: int
    name: str
    text: str
    begin: int | None
    end: int | None


class Rendered(NamedTuple):
    """A chat as its template writes it.

    `answer` is the last learned turn without the token that ends it, '' where none is learned; `has_end` says that
    it has such a token. `changes` names what the template does to the texts of the messages: "system missing",
    "assistant trimmed", "thought changed", "earlier thought missing" (of a turn that is not learned), …, or "turn not
    learned".
    """

    pieces: list[Piece]
    answer: str
    has_end: bool
    changes: tuple[str, ...]


def give_chat_template(tokenizer: Any) -> None:
    """See to it that the tokenizer has a chat template, and that it writes BOS where the tokenizer would put one."""
    if not tokenizer.chat_template:
        tokenizer.chat_template = FALLBACK_TEMPLATE
    ids = tokenizer("a")["input_ids"]
    if tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id:
        template = tokenizer.get_chat_template()
        for chat in _probes():
            try:
                rendered = _rendered(tokenizer, template, chat)
            except BadRow:  # rows will say so, with their place
                continue
            if not rendered.startswith(tokenizer.bos_token):
                tokenizer.chat_template = "{{- bos_token -}}" + template
            return


def _probes(*turns: str, **thought: str) -> Iterator[list[dict[str, str]]]:
    """Yield a short chat without and with a system message, for templates that refuse one of them."""
    answers = [{"role": "assistant", "content": text} | thought for text in turns or ("b",)]
    chat = [message for answer in answers for message in ({"role": "user", "content": "a"}, answer)]
    yield chat
    yield [{"role": "system", "content": "s"}, *chat]


class ChatTemplate:
    """A tokenizer's chat template, as training sees it."""

    def __init__(self, tokenizer: Any, control_tokens: Sequence[str]) -> None:
        template = tokenizer.get_chat_template()
        self._tokenizer = tokenizer
        self._marks_learned = bool(MARKER.search(template))
        self._template = MARKER.sub(_as_sign, template)
        self._literal = any_of([*control_tokens, *SIGNS])
        added = [token for token in tokenizer.get_added_vocab() if token.strip()]  # some are only white space
        self._added_token = any_of({*added, *control_tokens})
        self._thought_key: str | None = None
        self.frame = AnswerFrame()
        """What it writes around an answer."""
        self.ends: tuple[str, ...] = ()
        """The added tokens that end the assistant's turns: generation must stop there."""
        turns = [turn for chat in (("b",), ("b", "c")) for probe in _probes(*chat) for turn, _ in self._probed(probe)]
        self.ends = tuple(dict.fromkeys(turn.end for turn in turns if turn.end))
        self.frame = self._frame()

    @property
    def is_fallback(self) -> bool:
        return FALLBACK_TEMPLATE in self._tokenizer.get_chat_template()

    def render(self, messages: Sequence[dict[str, str]], learned: list[bool], turns: SupervisedTurns) -> Rendered:
        """Write a chat as pieces of text.

        Args:
            learned: for each assistant's message whether it may be learned.
        Raises:
            BadRow: where the template refuses the chat.
            TokenError: where the template does not say what is learned.
        """
        literals: list[str] = []
        wanted = learned if turns is SupervisedTurns.all else [False] * (len(learned) - 1) + learned[-1:]
        try:
            whole, parts, found = self._turns([self._signed(message, literals) for message in messages], wanted)
        except BadRow as refused:
            raise BadRow(f"{refused}{self._remedy(messages)}") from refused
        pieces: list[Piece] = []
        done = 0
        for turn in found:
            for text, is_learned in ((whole[done : turn.start] + turn.opened, False), (turn.text, True)):
                pieces += _pieces(text, is_learned, literals)
            done = turn.stop
        pieces += _pieces(whole[done:], False, literals)
        return Rendered(
            pieces or [Piece("", is_learned=False, is_rendered=True)],
            answer=_with_literals(found[-1].answer, literals) if found else "",
            has_end=bool(found and found[-1].end),
            changes=tuple(dict.fromkeys([*_changes(whole, parts, found), *_missed(wanted, found)])),
        )

    def _remedy(self, messages: Sequence[dict[str, str]]) -> str:
        """Say what to do about a chat that the template refuses, where that is known."""
        if messages[0]["role"] != "system":
            return ""
        try:
            self._apply([dict(message) for message in messages[1:]])
        except BadRow:
            return ""
        return " (it takes this chat without the system message: leave it out, or write it into the user's first one)"

    def _turns(self, messages: list[dict[str, str]], wanted: list[bool]) -> tuple[str, list[Part], list[Turn]]:
        """Return a rendered chat, the texts of its messages, and the turns of it that are learned."""
        whole, regions = self._plain(messages)
        parts = self._located(messages, whole)
        find = self._marked if self._marks_learned else self._by_prefix
        return whole, parts, find(messages, wanted, whole, parts, regions)

    def _marked(
        self,
        messages: list[dict[str, str]],
        wanted: list[bool],
        whole: str,
        parts: list[Part],
        regions: list[tuple[int, int]],
    ) -> list[Turn]:
        """Take turns as the template marks them."""
        if len(regions) != len(wanted):
            raise TokenError(
                f"the chat template marks {len(regions)} turns with {{% generation %}}, the assistant has {len(wanted)}"
            )
        contents = [part for part in parts if part.name == "assistant"]
        turns = []
        for (start, stop), content, is_wanted in zip(regions, contents, wanted, strict=True):
            if is_wanted:
                said_until = content.end if content.end is not None and start <= content.end <= stop else None
                answer, end = self._until_end(whole[start:stop], None if said_until is None else said_until - start)
                turns.append(Turn(content.message, start, stop, whole[start:stop], answer, end))
        return turns

    def _by_prefix(
        self,
        messages: list[dict[str, str]],
        wanted: list[bool],
        whole: str,
        parts: list[Part],
        _: list[tuple[int, int]],
    ) -> list[Turn]:
        """Take turns from where the generation prompt ends to the token that ends them."""
        turns = []
        contents = [part for part in parts if part.name == "assistant"]
        for content, is_wanted in zip(contents, wanted, strict=True):
            if not is_wanted:
                continue
            i, is_last = content.message, content.message == len(messages) - 1
            prompt, _regions = self._plain(messages[:i], add_generation_prompt=True)
            alone = whole if is_last else self._plain(messages[: i + 1])[0]
            start = len(prompt) if alone.startswith(prompt) else _before_thought(prompt)
            if not alone.startswith(prompt[:start]):
                raise TokenError(_prompt_is_another(prompt, alone))
            only_prompted = prompt[start:]
            if is_last and only_prompted:
                turns.append(self._prompted_turn(messages[i], whole, start, only_prompted, content))
                continue
            turn = None if only_prompted else self._turn(i, alone, whole, start, content.end)
            if turn is not None:
                turns.append(turn)
            elif not all(self._stands(part, whole) for part in parts if part.message == i):
                raise TokenError(
                    "the chat template writes an earlier turn otherwise once more turns follow, so it can't be learned "
                    "as generation would write it; learn the last turn only: data.supervised_turns=last"
                )
        return turns

    def _stands(self, part: Part, whole: str) -> bool:
        """Return whether a text that the template has a place for is in the rendered chat."""
        has_place = part.name != "thought" or bool(self._thought_key or self.frame.thought_close)
        return not has_place or _stands(part, whole)

    def _turn(self, message: int, alone: str, whole: str, start: int, said_until: int | None) -> Turn | None:
        """Return the turn that ends `alone`, a chat up to it; None where `whole`, the whole chat, has it otherwise."""
        if said_until is not None and (said_until < start or whole[:said_until] != alone[:said_until]):
            if alone is not whole:
                return None
            said_until = None
        text = alone[start:]
        answer, end = self._until_end(text, None if said_until is None else said_until - start)
        if end:
            text = answer + end
        elif not whole.startswith(alone):  # white space that only a last turn has is not looked for in others
            answer = text = text.rstrip()
        stop = start + len(text)
        if whole[:stop] == alone[:stop]:
            return Turn(message, start, stop, text, answer, end)
        stop = start + len(answer)  # a token that ends only the chat, after a text that ends each turn
        ends_in_words = said_until is not None and bool(alone[said_until:stop].strip())
        return (
            Turn(message, start, stop, answer, answer, "") if ends_in_words and whole[:stop] == alone[:stop] else None
        )

    def _prompted_turn(self, message: dict[str, str], whole: str, start: int, prompted: str, content: Part) -> Turn:
        """Return a last turn that the template writes without the thought its generation prompt ends with.

        Generation is fed the opening of the thought, so what is learned continues it: the thought, where the message
        has one, its close, and the answer. After a thought that the prompt has closed it is the answer.
        """
        begun = ""
        if (opened := OPENED_THOUGHT.fullmatch(prompted)) is not None:
            opening, close = _thought_tags(opened)
            thought = message.get(THOUGHT) or ""
            before, closed, _ = message["content"].partition(close)
            if not thought and closed and before.lstrip().startswith(opening):
                thought = before.lstrip().removeprefix(opening)
            begun = f"{thought.strip()}{opened['gap']}{close}{opened['gap'] * 2}"
        said_until = None if content.end is None or content.end < start else content.end - start
        answer, end = self._until_end(whole[start:], said_until)
        stop = start + len(answer) + len(end)
        answer = begun + answer.lstrip()
        return Turn(content.message, start, stop, answer + end, answer, end, prompted)

    def _until_end(self, turn: str, said_until: int | None) -> tuple[str, str]:
        """Return a turn's text up to the token that ends it, and that token; all of it and '' where it has none.

        Args:
            said_until: where the message's own text ends; None where that is unknown.
        """
        if said_until is not None:
            found = self._added_token.search(turn, said_until)
            return (turn, "") if found is None else (turn[: found.start()], found.group())
        ends = [(turn.rfind(end), end) for end in self.ends if end in turn]
        at, end = max(ends, default=(len(turn), ""))
        return turn[:at], end

    def _probed(self, chat: list[dict[str, str]]) -> list[tuple[Turn, list[Part]]]:
        """Return the turns of a probe with the texts of its messages; none where the template refuses it."""
        wanted = [True for message in chat if message["role"] == "assistant"]
        try:
            _, parts, turns = self._turns(chat, wanted)
        except (BadRow, TokenError):  # rows will say so, with their place
            return []
        return [(turn, parts) for turn in turns]

    def _frame(self) -> AnswerFrame:
        """Find what the template writes around an answer and around a thought, by probes of one turn."""
        plain = next((found for probe in _probes() for found in self._probed(probe)), None)
        if plain is None:
            return AnswerFrame()
        turn, parts = plain
        begin, end = parts[-1].begin, parts[-1].end
        if turn.opened:
            opened = OPENED_THOUGHT.fullmatch(turn.opened)
            after = turn.answer[turn.answer.rfind("b") + 1 :]
            return AnswerFrame(
                after=after, thought_close=_thought_tags(opened)[1] if opened else "", opens_thought=True
            )
        if begin is None or end is None or not turn.start <= begin <= end <= turn.start + len(turn.answer):
            return AnswerFrame()
        before, after = turn.answer[: begin - turn.start], turn.answer[end - turn.start :]
        for key in THOUGHT_KEYS:
            if key not in self._template:
                continue
            self._thought_key = key
            for probe in _probes(**{THOUGHT: "t"}):
                for turn, parts in self._probed(probe):
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

    def _plain(
        self, messages: list[dict[str, str]], *, add_generation_prompt: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        """Return a rendered chat, and [start, stop) of what the template marks as learned."""
        text, marks, _ = _read_signs(self._apply(messages, add_generation_prompt=add_generation_prompt))
        return text, marks

    def _located(self, messages: list[dict[str, str]], whole: str) -> list[Part]:
        """Find the texts of messages in the rendered chat: content after content, each followed by its thought."""
        given = []
        for i, message in enumerate(messages):
            given.append((i, message["role"], "content", message["content"]))
            if THOUGHT in message:
                given.append((i, "thought", THOUGHT, message[THOUGHT]))
        signed = [dict(message) for message in messages]
        for number, (i, _, key, text) in enumerate(given):
            signed[i][key] = _between_signs(text, number)
        try:
            text, _, places = _read_signs(self._apply(signed))
        except BadRow:  # a template that looks at how a text begins
            text, places = "", {}
        if text != whole:
            return list(_searched(given, whole))
        return [
            Part(i, name, given_text, *places.get(number, (None, None)))
            for number, (i, name, _, given_text) in enumerate(given)
        ]

    def _apply(self, messages: list[dict[str, str]], *, add_generation_prompt: bool = False) -> str:
        if any(THOUGHT in message for message in messages):
            messages = [self._with_thought(message) for message in messages]
        return _rendered(self._tokenizer, self._template, messages, add_generation_prompt=add_generation_prompt)

    def _with_thought(self, message: dict[str, str]) -> dict[str, str]:
        """Return a message with its thought under the key that the template reads."""
        named = {key: text for key, text in message.items() if key != THOUGHT}
        return named | ({self._thought_key or THOUGHT: message[THOUGHT]} if THOUGHT in message else {})

    def _signed(self, message: dict[str, str], literals: list[str]) -> dict[str, str]:
        """Put a sign in place of each control token that stands in a message, so that it stays text.

        A sign that stands there is put out of the way in the same manner.
        """

        def sign(match: re.Match[str]) -> str:
            literals.append(match.group())
            return f"{LITERAL_FROM}{len(literals) - 1}{LITERAL_TO}"

        return message | {k: self._literal.sub(sign, message[k]) for k in ("content", THOUGHT) if k in message}


def _before_thought(prompt: str) -> int:
    """Return where the thought begins, opened or empty, that a generation prompt ends with; its length without one."""
    found = PROMPTED_THOUGHT.search(prompt)
    return len(prompt) if found is None else found.start()


def _thought_tags(opened: re.Match[str]) -> tuple[str, str]:
    """Return what opens a thought and what closes it."""
    if name := opened["angle"]:
        return f"<{name}>", f"</{name}>"
    return f"[{opened['square']}]", f"[/{opened['square']}]"


def _between_signs(text: str, number: int) -> str:
    """Put signs around a text, inside the white space at its ends, which a template may trim."""
    core = text.strip()
    if not core:
        return text
    start = text.index(core)
    begin, end = f"{TEXT_FROM}{number}{NUMBER_END}", f"{TEXT_TO}{number}{NUMBER_END}"
    return text[:start] + begin + core + end + text[start + len(core) :]


def _read_signs(text: str) -> tuple[str, list[tuple[int, int]], dict[int, tuple[int | None, int | None]]]:
    """Return a text without signs, [start, stop) of what is marked as learned, and of each text by its number."""
    parts: list[str] = []
    learned: list[int] = []
    begins: dict[int, int] = {}
    ends: dict[int, int] = {}
    done = length = 0
    for match in SIGN.finditer(text):
        parts.append(text[done : match.start()])
        length += match.start() - done
        done = match.end()
        if match.group(1):
            learned.append(length)
        else:
            (begins if match.group(2) == TEXT_FROM else ends).setdefault(int(match.group(3)), length)
    parts.append(text[done:])
    numbers = begins.keys() | ends.keys()
    places = {number: (begins.get(number), ends.get(number)) for number in numbers}
    return "".join(parts), list(zip(learned[::2], learned[1::2], strict=False)), places


def _searched(given: Sequence[tuple[int, str, str, str]], whole: str) -> Iterator[Part]:
    """Find texts by their words, each after the one before: for a template that changes with the signs."""
    done = 0
    for i, name, _, text in given:
        core = text.strip()
        at = whole.find(core, done)
        if at >= 0:
            done = at + len(core)
        yield Part(i, name, text, at if at >= 0 else None, done if at >= 0 else None)


def _stands(part: Part, whole: str) -> bool:
    """Return whether a text of a message is in the rendered chat, but for white space."""
    core = part.text.strip()
    if part.begin is not None and part.end is not None:
        return whole[part.begin : part.end] == core
    if part.end is not None:  # the template took the text apart, and may have put it together again
        return _squeezed(whole[: part.end]).endswith(_squeezed(core))
    return part.begin is not None and _squeezed(whole[part.begin :]).startswith(_squeezed(core))


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _changes(whole: str, parts: Sequence[Part], turns: Sequence[Turn]) -> Iterator[str]:
    """Name what became of the texts of messages that are not in the rendered chat as they were given."""
    prompted = turns[-1] if turns and turns[-1].opened else None
    learned = {turn.message for turn in turns}
    for part in parts:
        if part.name in ("assistant", "thought") and part.message not in learned:
            part = part._replace(name=f"earlier {part.name}")
        if prompted is not None and part.message == parts[-1].message:
            if _squeezed(part.text) not in _squeezed(prompted.opened + prompted.text):
                yield f"{part.name} {CHANGED if part.end is not None else MISSING}"
        elif not _stands(part, whole):
            is_there = part.begin is not None or part.end is not None
            yield f"{part.name} {CHANGED if is_there else MISSING}"
        elif part.begin is None or part.end is None:
            yield f"{part.name} {TRIMMED}"
        else:
            before = part.text[: len(part.text) - len(part.text.lstrip())]
            after = part.text[len(part.text.rstrip()) :]
            if not (whole[: part.begin].endswith(before) and whole[part.end :].startswith(after)):
                yield f"{part.name} {TRIMMED}"


def _missed(wanted: Sequence[bool], turns: Sequence[Turn]) -> Iterator[str]:
    if len(turns) < sum(wanted):
        yield NOT_LEARNED


def _prompt_is_another(prompt: str, alone: str) -> str:
    differs = next((i for i, (a, b) in enumerate(zip(prompt, alone, strict=False)) if a != b), 0)
    same = max(0, differs - 20)
    return (
        "the chat template's generation prompt is not how the assistant's turn begins in a chat "
        f"(…{prompt[same:][:60]!r} there, …{alone[same:][:60]!r} here); "
        "mark what is learned in the template with {% generation %} … {% endgeneration %}"
    )


def _rendered(
    tokenizer: Any, template: str, messages: list[dict[str, str]], *, add_generation_prompt: bool = False
) -> str:
    try:
        return tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except Exception as error:  # a template is a program: it may raise anything
        what = "refuses it" if isinstance(error, TemplateError) else f"fails with a {type(error).__name__}"
        raise BadRow(f"the chat template {what}: {one_line(error)}") from error


def _as_sign(match: re.Match[str]) -> str:
    """Turn a {% generation %} tag into a sign in the text, with the tag's own control of white space."""
    before, end, behind = match.group(1), match.group(2), match.group(3)
    return f"{{%{before} if true %}}{LEARNED_TO if end else LEARNED_FROM}{{% endif {behind}%}}"


def _with_literals(text: str, literals: list[str]) -> str:
    """Put back what signs took the place of."""
    return LITERAL.sub(lambda match: literals[int(match.group(1))], text)


def _pieces(text: str, is_learned: bool, literals: list[str]) -> Iterator[Piece]:
    for i, part in enumerate(LITERAL.split(text)):
        if part:
            yield Piece(literals[int(part)], is_learned) if i % 2 else Piece(part, is_learned, is_rendered=True)
