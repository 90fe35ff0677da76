"""From pieces of text to ids, labels and spans. The mask is right by construction, never searched for.

Prompt and completion are tokenised apart and their ids joined, because that is what generation sees. Supervised are the
completion's tokens and the EOS behind it, nothing else; EOS goes on as an id, and only behind a completion that was not
cut. BOS, EOS and pad that stand in a text stay text; every other added token keeps its id. What a chat template wrote
is exempt: its control tokens are meant.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from threading import Lock
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from src.config.schema import Overflow
from src.data.examples import Example
from src.data.segments import any_of, last_turn
from src.errors import TokenError, one_line

IGNORE_INDEX = -100
"""Label of a position that is not learned."""

PROBE = "a"
"""A text that shows what a tokenizer puts around one."""

ANSWER, THOUGHT = 0, 1
SPAN_KINDS = ("answer", "thought")
"""What a supervised token can be: of a thought, its tags included, or of the answer."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """How long a row may be, in tokens.

    `target` is that of an encoder-decoder's completion; None for a causal model, where `sequence` holds for both.
    """

    sequence: int
    target: int | None
    overflow: Overflow


@dataclass(slots=True)
class EncodedRow:
    """The ids of one row.

    `input_ids` are prompt and completion of a causal model, or what an encoder reads; `target_ids` what a decoder
    writes, None for a causal model. `spans` are (kind, start, stop) of the supervised positions, in order, within the
    target or else the input. `prompt_length` counts the ids that generation is fed.
    """

    input_ids: list[int]
    target_ids: list[int] | None
    spans: list[tuple[int, int, int]]
    prompt_length: int
    is_truncated: bool
    num_control_tokens: int

    @property
    def is_supervised(self) -> bool:
        return bool(self.spans)


class Kind(NamedTuple):
    """How a piece of text is encoded: whether a chat template wrote it, and whether it goes on behind another."""

    is_rendered: bool
    continues: bool


WRITES_SPACE = ("normalizer", "pre_tokenizer")
"""Parts of a tokenizer that may put a dummy space in front of a text; what its decoder says of one does not count."""

ALIKE = {is_rendered: Kind(is_rendered, False) for is_rendered in (False, True)}
"""Kinds of text for a tokenizer that writes a text alike wherever it stands."""


class BrokenTokenizerError(TokenError):
    """A tokenizer's own code fails on a text."""


REPEATS_A_GROUP = re.compile(r"\)[+*{]")
"""In a regular expression: it may take a time that grows with a power of the text's length."""

_only_one = Lock()


@contextmanager
def _running(text: str = "", *, is_quiet: bool = False) -> Iterator[None]:
    """Tell what the tokenizers library raises in this block as the tokenizer's fault.

    It raises plain exceptions, and panics, which are no Exception: a regular expression of tokenizer.json that gives up
    on a text is one.

    Args:
        text: that it is run on, where it is one.
        is_quiet: keep what a panic writes to the error stream by itself from it.
    Raises:
        BrokenTokenizerError: naming what it raised.
    """
    try:
        with _kept_from_stderr() if is_quiet else nullcontext():
            yield
    except (TokenError, MemoryError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and not _is_panic(error):
            raise
        on = f" on {text[:60]!r}{'…' if len(text) > 60 else ''}" if text else ""
        explodes = "; a regular expression in its tokenizer.json does not come to an end"
        raise BrokenTokenizerError(
            f"the tokenizer fails{on}: {one_line(error)}{explodes if 'retry-limit' in str(error) else ''}"
        ) from None


def _is_panic(error: BaseException) -> bool:
    return type(error).__name__ == "PanicException"  # of Rust; it can't be imported


@contextmanager
def _kept_from_stderr() -> Iterator[None]:
    """Keep from the error stream what is written there in this block, and write it afterwards unless it was a panic."""
    with _only_one, tempfile.TemporaryFile() as kept:
        stream = os.dup(2)
        os.dup2(kept.fileno(), 2)
        try:
            yield
        except BaseException as error:
            if _is_panic(error):
                kept.truncate(0)
            raise
        finally:
            os.dup2(stream, 2)
            os.close(stream)
            kept.seek(0)
            if text := kept.read():
                os.write(2, text)


class Encoder:
    """A tokenizer, seen as training and generation use it."""

    def __init__(self, tokenizer: Any, tags: tuple[str, str] | None = None) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise TokenError("this tokenizer has no fast version (tokenizer.json), which encoding needs")
        if tokenizer.eos_token_id is None:
            raise TokenError("this tokenizer has no EOS token: a model could not learn where a completion ends")
        self._tokenizer = tokenizer
        self._copies: dict[Kind, Tokenizer] = {}
        self._copying = Lock()
        self.eos_token_id: int = tokenizer.eos_token_id
        control = [tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token]
        self.control_tokens = sorted({token for token in control if token})
        self.bos_token: str = tokenizer.bos_token or ""
        self.eos_token: str = tokenizer.eos_token
        self._control_ids = set(tokenizer.convert_tokens_to_ids(self.control_tokens))
        with _running(PROBE):
            self._prefix, self._suffix = _special_ids(tokenizer(PROBE)["input_ids"], tokenizer)
            self._target_prefix, _ = _special_ids(tokenizer(text_target=PROBE)["input_ids"], tokenizer)
        bos = tokenizer.bos_token_id
        self._causal_prefix = [bos] if bos is not None and self._prefix[:1] == [bos] else []
        self._tag_ids = None if tags is None else tuple(tokenizer.convert_tokens_to_ids(list(tags)))

    @cached_property
    def _spec(self) -> dict[str, Any]:
        return json.loads(self._tokenizer.backend_tokenizer.to_str())

    @cached_property
    def _may_explode(self) -> bool:
        """Whether a regular expression of the tokenizer's repeats a group."""
        return any(map(REPEATS_A_GROUP.search, _patterns([self._spec[part] for part in WRITES_SPACE])))

    @cached_property
    def _adds_space(self) -> bool:
        """Whether the tokenizer puts a dummy space in front of a text."""
        return any(_without_dummy_space(self._spec[part]) != self._spec[part] for part in WRITES_SPACE)

    def _backend(self, kind: Kind) -> Tokenizer:
        """Give the copy of the tokenizer for a kind of text, made when it is needed."""
        with self._copying:  # threads share an encoder
            if kind not in self._copies:
                self._copies[kind] = _copy(self._spec, self.control_tokens, kind)
            return self._copies[kind]

    @cached_property
    def _added_tokens(self) -> dict[bool, re.Pattern[str]]:
        """Finds an added token in rendered text, and in raw text, where control tokens are none."""
        added = self._tokenizer.get_added_vocab()
        return {True: any_of(added), False: any_of([token for token in added if token not in self.control_tokens])}

    def encode(self, examples: Sequence[Example], lengths: Lengths) -> list[EncodedRow | None]:
        """Encode rows; None where one is too long and `overflow` does not cut it."""
        is_causal = lengths.target is None
        kinds = [self._kinds(example, restarts=not is_causal) for example in examples]
        texts: dict[Kind, list[str]] = {kind: [] for of_pieces in kinds for kind in of_pieces}
        for example, of_pieces in zip(examples, kinds, strict=True):
            for text, kind in zip(self._texts(example), of_pieces, strict=True):
                texts[kind].append(text)
        encoded = {kind: self._encode(some, kind) for kind, some in texts.items()}
        join = self._causal_row if is_causal else self._encoder_decoder_row
        rows = []
        for example, of_pieces in zip(examples, kinds, strict=True):
            num_control, ids = 0, []
            for kind in of_pieces:
                piece_ids, found = next(encoded[kind])
                ids.append(piece_ids)
                num_control += found
            rows.append(join(example, ids, num_control, lengths))
        return rows

    def _kinds(self, example: Example, *, restarts: bool) -> Sequence[Kind]:
        """Return how each piece is encoded.

        Args:
            restarts: the last turn begins a text of its own, a decoder's.
        """
        if not self._adds_space:
            return [ALIKE[piece.is_rendered] for piece in example.pieces]
        beginning = last_turn(example.pieces)[0] if restarts else 0
        kinds, continues = [], False
        for i, piece in enumerate(example.pieces):
            continues = continues and i != beginning
            kinds.append(Kind(piece.is_rendered, continues))
            if piece.text:
                continues = not (piece.is_rendered and piece.text.endswith(self._before_space))
        return kinds

    def _texts(self, example: Example) -> Iterator[str]:
        """Yield what is encoded of each piece: of a template's text without the white space that a token took."""
        before = ""
        for piece in example.pieces:
            text = piece.text
            if piece.is_rendered and before.endswith(self._take_space):
                text = text.lstrip()
            yield text
            before = (piece.text or before) if piece.is_rendered else ""

    @cached_property
    def _take_space(self) -> tuple[str, ...]:
        """The added tokens that take the white space after them, as Phi-3's do."""
        tokens = self._tokenizer.added_tokens_decoder.values()
        return tuple(token.content for token in tokens if token.rstrip)

    @cached_property
    def _before_space(self) -> tuple[str, ...]:
        """The added tokens behind which the tokenizer writes a dummy space: all of them with an older SentencePiece."""
        added = tuple(self._tokenizer.get_added_vocab())
        if not added:
            return ()
        backend = self._backend(Kind(is_rendered=True, continues=False))
        after, alone = (_ids(backend, text) for text in (added[0] + PROBE, PROBE))
        return added if after[1:] == alone else ()

    def _encode(self, texts: Sequence[str], kind: Kind) -> Iterator[tuple[list[int], int]]:
        """Give each text's ids, and how many control tokens stood in it and were made text."""
        backend = self._backend(kind)
        with _running(is_quiet=self._may_explode):
            encoded = [found.ids for found in backend.encode_batch_fast(list(texts), add_special_tokens=False)]
        together = "" if kind.is_rendered else "\n".join(texts)  # asked once: control tokens are rare
        control_tokens = [control for control in self.control_tokens if control in together]
        for text, ids in zip(texts, encoded, strict=True):
            found = 0
            if self._adds_space and kind.is_rendered == kind.continues:
                ids = self._encode_sections(text, kind, ids)
            if control_tokens:
                found = sum(text.count(control) for control in control_tokens)
                if found and self._control_ids.intersection(ids):  # the model's own vocabulary holds the piece
                    ids = self._encode_cut(text, kind)
            yield ids, found

    def _encode_sections(self, text: str, kind: Kind, whole: list[int]) -> list[int]:
        """Encode a text apart before and behind its first added token, where a dummy space needs it.

        Tokenizers of the older kind put one behind every added token too. In a raw text only its very beginning may
        have one; in rendered text all but a seam have it, as the template's user has it.
        """
        found = self._added_tokens[kind.is_rendered].search(text)
        if found is None:
            return whole
        head, tail = text[: found.start()], text[found.start() :]
        behind = self._backend(Kind(kind.is_rendered, not kind.is_rendered))
        return [*(_ids(self._backend(kind), head) if head else []), *_ids(behind, tail)]

    def encode_whole(self, texts: Sequence[str], *, is_rendered: bool) -> list[list[int]]:
        """Encode each text in one piece, without BOS and EOS: not as rows are, but to compare with."""
        return [ids for ids, _ in self._encode(texts, Kind(is_rendered, False))]

    def _encode_cut(self, text: str, kind: Kind) -> list[int]:
        """Encode a text cut inside of every control token that stands in it, so that none can be found whole."""
        inside = "|".join(f"(?<={re.escape(c[0])})(?={re.escape(c[1:])})" for c in self.control_tokens if len(c) > 1)
        first, *rest = re.split(inside, text)
        ids = _ids(self._backend(kind), first)
        if self._adds_space and not kind.continues:
            ids = self._encode_sections(first, kind, ids)
        for part in rest:
            ids += _ids(self._backend(Kind(False, True)), part)
        if self._control_ids.intersection(ids):
            raise TokenError(f"this tokenizer can't encode a control token as text, and it stands in {text[:80]!r}")
        return ids

    def _causal_row(
        self, example: Example, pieces: list[list[int]], num_control: int, lengths: Lengths
    ) -> EncodedRow | None:
        """Join a row's pieces behind BOS, with EOS at the end, and cut what is too long."""
        starts_itself = example.pieces[0].is_rendered and pieces[0][:1] == self._causal_prefix
        ids = [] if starts_itself else list(self._causal_prefix)
        first = len(self._causal_prefix)  # what is never cut from the front
        learned: list[tuple[int, int]] = []
        prompt_length = len(ids)
        for piece, piece_ids in zip(example.pieces, pieces, strict=True):
            if piece.is_supervised:
                if learned and learned[-1][1] == len(ids):
                    learned[-1] = (learned[-1][0], len(ids) + len(piece_ids))
                else:
                    prompt_length = len(ids)
                    learned.append((len(ids), len(ids) + len(piece_ids)))
            ids += piece_ids
        if example.needs_eos:
            ids.append(self.eos_token_id)
            learned[-1] = (learned[-1][0], len(ids))
        excess = len(ids) - lengths.sequence
        if excess > 0:
            if lengths.overflow in (Overflow.drop, Overflow.error):
                return None
            if lengths.overflow is Overflow.truncate_prompt:
                cut = max(0, min(excess, prompt_length - first))
                ids = ids[:first] + ids[first + cut :]
                learned = [(max(first, start - cut), max(first, stop - cut)) for start, stop in learned]
                prompt_length -= cut
            ids = ids[: lengths.sequence]
            prompt_length = min(prompt_length, len(ids))
        learned = [(start, min(stop, len(ids))) for start, stop in learned]
        # the first id of all has nothing before it to be predicted from
        spans = [(kind, max(1, start), stop) for kind, start, stop in self._spans(ids, learned) if stop > 1]
        return EncodedRow(ids, None, spans, prompt_length, excess > 0, num_control)

    def _encoder_decoder_row(
        self, example: Example, pieces: list[list[int]], num_control: int, lengths: Lengths
    ) -> EncodedRow | None:
        """Give the prompt to the encoder and the completion to the decoder, as the tokenizer frames them."""
        assert lengths.target is not None
        first, stop = last_turn(example.pieces)
        prompt = [i for ids in pieces[:first] for i in ids]
        target = [*self._target_prefix, *(i for ids in pieces[first:stop] for i in ids)]
        if example.needs_eos:
            target.append(self.eos_token_id)
        if example.pieces[0].is_rendered and self._prefix and prompt[: len(self._prefix)] == self._prefix:
            prompt = prompt[len(self._prefix) :]  # the chat template wrote it already
        room = lengths.sequence - len(self._prefix) - len(self._suffix)
        excess, target_excess = len(prompt) - room, len(target) - lengths.target
        is_long = excess > 0 or target_excess > 0
        if is_long:
            if lengths.overflow in (Overflow.drop, Overflow.error):
                return None
            if excess > 0:
                prompt = prompt[excess:] if lengths.overflow is Overflow.truncate_prompt else prompt[: max(0, room)]
            target = target[: lengths.target]
        input_ids = [*self._prefix, *prompt, *self._suffix]
        spans = self._spans(target, [(len(self._target_prefix), len(target))]) if stop > first else []
        return EncodedRow(input_ids, target, spans, len(input_ids), is_long, num_control)

    def _spans(self, ids: list[int], learned: list[tuple[int, int]]) -> list[tuple[int, int, int]]:
        """Cut the supervised parts into thoughts, from tag to tag, and answers."""
        if self._tag_ids is None:
            return [(ANSWER, start, stop) for start, stop in learned if stop > start]
        opened, closed = self._tag_ids
        spans = []
        for start, stop in learned:
            while start < stop:
                opens = _find(ids, opened, start, stop)
                if opens > start:
                    spans.append((ANSWER, start, opens))
                if opens < stop:
                    start = min(stop, _find(ids, closed, opens, stop) + 1)
                    spans.append((THOUGHT, opens, start))
                else:
                    start = stop
        return spans

    @property
    def target_prefix(self) -> list[int]:
        """What a decoder is fed before it writes, behind its start token."""
        return self._target_prefix

    def decode(self, ids: Sequence[int]) -> str:
        """Give the text of generated ids; BOS, EOS and pad are no text, thought tags are."""
        return self.decode_all([i for i in ids if i not in self._control_ids])

    def decode_all(self, ids: Sequence[int]) -> str:
        """Give the text of ids, control tokens included."""
        with _running():
            return self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def as_written(self, text: str) -> str:
        """Return a text as this tokenizer can write it: encoded and decoded again.

        A text with characters that it does not know at all comes back as it was.
        """
        backend = self._backend(Kind(is_rendered=False, continues=True))
        ids = _ids(backend, text)
        if self._tokenizer.unk_token_id in ids:
            return text
        return self.decode_all(ids)

    def decode_batch(self, rows: Sequence[Sequence[int]], *, with_control: bool = False) -> list[str]:
        """Give the texts of many rows' ids as `decode` does (or `decode_all`), on all cores."""
        kept = rows if with_control else [[i for i in ids if i not in self._control_ids] for ids in rows]
        with _running():
            return self._tokenizer.backend_tokenizer.decode_batch(list(kept), skip_special_tokens=False)


def _ids(backend: Tokenizer, text: str) -> list[int]:
    """Encode a text by itself."""
    with _running(text):
        return backend.encode(text, add_special_tokens=False).ids


def _find(ids: list[int], wanted: int, start: int, stop: int) -> int:
    """Give where an id stands first within [start, stop), or stop."""
    try:
        return ids.index(wanted, start, stop)
    except ValueError:
        return stop


def _special_ids(ids: list[int], tokenizer: Any) -> tuple[list[int], list[int]]:
    """Give the ids that the tokenizer itself puts in front of the probe and behind it."""
    bare = tokenizer(PROBE, add_special_tokens=False)["input_ids"]
    for start in range(len(ids) - len(bare) + 1):
        if ids[start : start + len(bare)] == bare:
            return ids[:start], ids[start + len(bare) :]
    raise TokenError("this tokenizer changes a text when it adds its special tokens; it can't be used")


def _copy(spec: dict[str, Any], control: list[str], kind: Kind) -> Tokenizer:
    """Copy the tokenizer so that control tokens in a text are text, and all other added tokens are still tokens.

    `encode_special_tokens` makes text of whatever is marked special, so in the copy only control tokens are. In
    rendered text all of them are tokens. The copy for a text that goes on behind another puts no dummy space in front.
    """
    added = [token | {"special": token["content"] in control} for token in spec["added_tokens"]]
    bare = {part: _without_dummy_space(spec[part]) for part in WRITES_SPACE} if kind.continues else {}
    # the post-processor would put special tokens around a text; here they are put as ids
    spec = spec | bare | {"added_tokens": added, "post_processor": None}
    copy = Tokenizer.from_str(json.dumps(spec))
    copy.encode_special_tokens = not kind.is_rendered
    copy.no_padding()
    copy.no_truncation()
    return copy


def _patterns(node: Any) -> Iterator[str]:
    """Yield the regular expressions in a part of a tokenizer."""
    if isinstance(node, dict) and isinstance(node.get("Regex"), str):
        yield node["Regex"]
    elif isinstance(node, dict | list):
        for inner in node.values() if isinstance(node, dict) else node:
            yield from _patterns(inner)


def _without_dummy_space(node: Any) -> Any:
    """Take out of a part of a tokenizer what puts a space (SentencePiece's '▁') in front of every text."""
    if isinstance(node, list):
        return [_without_dummy_space(item) for item in node]
    if not isinstance(node, dict):
        return node
    node = {key: _without_dummy_space(value) for key, value in node.items()}
    match node.get("type"):
        case "Metaspace":
            node["prepend_scheme"] = "never"
        case "ByteLevel":
            node["add_prefix_space"] = False
        case "Prepend":
            node["prepend"] = ""
    return node
