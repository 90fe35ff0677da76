"""Texts to ids and back, as training and generation need them of any tokenizer.

BOS, EOS and pad that occur in a text stay text; every other added token keeps its id. Text that a chat template wrote
is exempt: its control tokens are meant. Segments of a row are encoded apart and no dummy space is put between them.
"""

import json
import os
import re
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from itertools import chain
from threading import Lock
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from src.errors import TokenError, one_line

PROBE = "a"  # a text that shows what a tokenizer puts around one

WRITES_SPACE = ("normalizer", "pre_tokenizer")
"""Parts of a tokenizer that may put a dummy space in front of a text; what its decoder says of one does not count."""

REPEATED_GROUP = re.compile(r"\)[+*{]")  # with one, the time of matching may grow with a power of the text's length


class Segment(NamedTuple):
    """A text that is tokenised by itself; in one that a chat template rendered control tokens are tokens, else text."""

    text: str
    is_supervised: bool
    is_rendered: bool = False


def last_turn(segments: Sequence[Segment]) -> tuple[int, int]:
    """Return [first, stop) of the last adjacent supervised segments; both are the end where there are none."""
    stop = len(segments)
    while stop > 0 and not segments[stop - 1].is_supervised:
        stop -= 1
    first = stop
    while first > 0 and segments[first - 1].is_supervised:  # control tokens in a message split its turn
        first -= 1
    return (first, stop) if stop else (len(segments), len(segments))


def any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern that finds any of the tokens, the longest first; without tokens it finds nothing."""
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) if longest_first else "(?!)")


class BrokenTokenizerError(TokenError):
    """A tokenizer's own code fails on a text."""


class TextKind(NamedTuple):
    """How a text is encoded: whether a chat template wrote it, and whether it continues a text before it."""

    is_rendered: bool
    continues: bool


class TextEncoder:
    """A tokenizer that encodes and decodes texts without adding special tokens."""

    def __init__(self, tokenizer: Any) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise TokenError("this tokenizer has no fast version (tokenizer.json), which encoding needs")
        self._tokenizer = tokenizer
        self._backends: dict[TextKind, Tokenizer] = {}
        self._lock = Lock()
        control = [tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token]
        self.control_tokens = sorted({token for token in control if token})
        self._control_ids = set(tokenizer.convert_tokens_to_ids(self.control_tokens))

    @cached_property
    def _spec(self) -> dict[str, Any]:
        return json.loads(self._tokenizer.backend_tokenizer.to_str())

    @cached_property
    def _may_explode(self) -> bool:
        """Whether a regular expression of the tokenizer's repeats a group."""
        return any(map(REPEATED_GROUP.search, _patterns([self._spec[part] for part in WRITES_SPACE])))

    @cached_property
    def _adds_space(self) -> bool:
        return any(_without_dummy_space(self._spec[part]) != self._spec[part] for part in WRITES_SPACE)

    @cached_property
    def _space_eaters(self) -> tuple[str, ...]:
        """The added tokens that include the white space after them, as Phi-3's do."""
        tokens = self._tokenizer.added_tokens_decoder.values()
        return tuple(token.content for token in tokens if token.rstrip)

    @cached_property
    def _before_space(self) -> tuple[str, ...]:
        """The added tokens after which the tokenizer writes a dummy space: all of them with an older SentencePiece."""
        added = tuple(self._tokenizer.get_added_vocab())
        if not added:
            return ()
        kind = TextKind(is_rendered=True, continues=False)
        after, alone = (self._ids(text, kind) for text in (added[0] + PROBE, PROBE))
        return added if after[1:] == alone else ()

    @cached_property
    def _added_tokens(self) -> dict[bool, re.Pattern[str]]:
        """Patterns of the added tokens in rendered text (True) and in raw text, where control tokens are text."""
        added = self._tokenizer.get_added_vocab()
        return {True: any_of(added), False: any_of([token for token in added if token not in self.control_tokens])}

    def _backend(self, kind: TextKind) -> Tokenizer:
        with self._lock:  # threads share an encoder
            if kind not in self._backends:
                self._backends[kind] = _copy(self._spec, self.control_tokens, kind)
            return self._backends[kind]

    def _ids(self, text: str, kind: TextKind) -> list[int]:
        backend = self._backend(kind)
        with tokenizer_errors(text):
            return backend.encode(text, add_special_tokens=False).ids

    def encode_segments(
        self, rows: Sequence[Sequence[Segment]], *, restarts: bool
    ) -> Iterator[tuple[list[list[int]], int]]:
        """Yield for each row the ids of its segments, and how many control tokens in it became text.

        With `restarts` the last turn begins a text of its own, a decoder's.
        """
        texts = [list(self._texts(segments, restarts=restarts)) for segments in rows]
        of_kind = defaultdict[TextKind, list[str]](list)
        for text, kind in chain.from_iterable(texts):
            of_kind[kind].append(text)
        encoded = {kind: self._encode(kind_texts, kind) for kind, kind_texts in of_kind.items()}  # a batch a kind
        for row_texts in texts:
            row = [next(encoded[kind]) for _, kind in row_texts]
            yield [ids for ids, _ in row], sum(num_control for _, num_control in row)

    def _texts(self, segments: Sequence[Segment], *, restarts: bool) -> Iterator[tuple[str, TextKind]]:
        """Yield the text of each segment, without white space that the token before it includes, and its kind."""
        beginning = last_turn(segments)[0] if restarts else 0
        before, continues = "", False
        for i, (text, _, is_rendered) in enumerate(segments):
            eats_space = is_rendered and before.endswith(self._space_eaters)
            continues = continues and i != beginning
            yield text.lstrip() if eats_space else text, TextKind(is_rendered, continues)
            before = (text or before) if is_rendered else ""
            if text and self._adds_space:
                continues = not (is_rendered and text.endswith(self._before_space))

    def _encode(self, texts: Sequence[str], kind: TextKind) -> Iterator[tuple[list[int], int]]:
        """Yield each text's ids, and how many control tokens in it became text."""
        backend = self._backend(kind)
        with tokenizer_errors(is_quiet=self._may_explode):
            encoded = [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]
        joined = "" if kind.is_rendered else "\n".join(texts)  # searched at once: control tokens are rare
        control_tokens = [control for control in self.control_tokens if control in joined]
        for text, ids in zip(texts, encoded, strict=True):
            if self._adds_space and kind.is_rendered == kind.continues:
                ids = self._encode_around_token(text, kind, ids)
            num_control = sum(text.count(control) for control in control_tokens)
            if num_control and self._control_ids.intersection(ids):  # the model's own vocabulary holds it too
                ids = self._encode_cut(text, kind)
            yield ids, num_control

    def _encode_around_token(self, text: str, kind: TextKind, whole: list[int]) -> list[int]:
        """Encode a text apart before and from its first added token, where only one of them has a dummy space.

        Tokenizers of the older kind put one after every added token too. In raw text only the very beginning may have
        one; in rendered text all but the beginning has it, as the template's user has it.
        """
        found = self._added_tokens[kind.is_rendered].search(text)
        if found is None:
            return whole
        head, tail = text[: found.start()], text[found.start() :]
        tail_kind = TextKind(kind.is_rendered, not kind.is_rendered)
        return [*(self._ids(head, kind) if head else []), *self._ids(tail, tail_kind)]

    def _encode_cut(self, text: str, kind: TextKind) -> list[int]:
        """Encode a text cut inside every control token in it, so that none can be found whole."""
        inside = "|".join(f"(?<={re.escape(c[0])})(?={re.escape(c[1:])})" for c in self.control_tokens if len(c) > 1)
        first, *rest = re.split(inside, text)
        ids = self._ids(first, kind)
        if self._adds_space and not kind.continues:
            ids = self._encode_around_token(first, kind, ids)
        for part in rest:
            ids += self._ids(part, TextKind(False, True))
        if self._control_ids.intersection(ids):
            raise TokenError(f"this tokenizer can't encode a control token as text, and it occurs in {text[:80]!r}")
        return ids

    def encode_texts(self, texts: Sequence[str], *, is_rendered: bool) -> list[list[int]]:
        """Encode each text by itself, without BOS and EOS."""
        return [ids for ids, _ in self._encode(texts, TextKind(is_rendered, False))]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of generated ids; BOS, EOS and pad are no text, thought tags are."""
        return self.decode_all([i for i in ids if i not in self._control_ids])

    def decode_all(self, ids: Sequence[int]) -> str:
        with tokenizer_errors():
            return self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def decode_batch(self, rows: Sequence[Sequence[int]], *, with_control: bool = False) -> list[str]:
        """Return the texts of many rows' ids as `decode` does (or `decode_all`), on all cores."""
        kept = rows if with_control else [[i for i in ids if i not in self._control_ids] for ids in rows]
        with tokenizer_errors():
            return self._tokenizer.backend_tokenizer.decode_batch(list(kept), skip_special_tokens=False)

    def normalized(self, text: str) -> str:
        """Return a text encoded and decoded again; as it is where it has characters that the tokenizer doesn't know."""
        ids = self._ids(text, TextKind(is_rendered=False, continues=True))
        return text if self._tokenizer.unk_token_id in ids else self.decode_all(ids)


def _copy(spec: dict[str, Any], control: list[str], kind: TextKind) -> Tokenizer:
    """Copy a tokenizer so that control tokens in raw text are text, and all other added tokens are tokens.

    `encode_special_tokens` makes text of whatever is marked special, so in the copy only control tokens are. The copy
    for a text that continues another puts no dummy space in front.
    """
    added = [token | {"special": token["content"] in control} for token in spec["added_tokens"]]
    spaceless = {part: _without_dummy_space(spec[part]) for part in WRITES_SPACE} if kind.continues else {}
    # the post-processor would put special tokens around a text; rows get them as ids
    copy = Tokenizer.from_str(json.dumps(spec | spaceless | {"added_tokens": added, "post_processor": None}))
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


SPACELESS: dict[str, dict[str, Any]] = {
    "Metaspace": {"prepend_scheme": "never"},
    "ByteLevel": {"add_prefix_space": False},
    "Prepend": {"prepend": ""},
}


def _without_dummy_space(node: Any) -> Any:
    """Return a part of a tokenizer without what puts a space (SentencePiece's '▁') in front of every text."""
    if isinstance(node, list):
        return [_without_dummy_space(item) for item in node]
    if not isinstance(node, dict):
        return node
    without = SPACELESS.get(node.get("type", ""), {})
    return {key: _without_dummy_space(value) for key, value in node.items()} | without


@contextmanager
def tokenizer_errors(text: str = "", *, is_quiet: bool = False) -> Iterator[None]:
    """Raise what the tokenizers library raises in this block on a text as a BrokenTokenizerError.

    It raises plain exceptions, and panics, which are no Exception: where a regular expression of tokenizer.json gives
    up on a text, for one. With `is_quiet` what a panic writes to the error stream is kept from there.
    """
    try:
        with _panics_kept_from_stderr() if is_quiet else nullcontext():
            yield
    except (TokenError, MemoryError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and not _is_panic(error):
            raise
        on = f" on {text[:60]!r}{'…' if len(text) > 60 else ''}" if text else ""
        explodes = "; a regular expression in its tokenizer.json does not terminate"
        raise BrokenTokenizerError(
            f"the tokenizer fails{on}: {one_line(error)}{explodes if 'retry-limit' in str(error) else ''}"
        ) from None


def _is_panic(error: BaseException) -> bool:
    return type(error).__name__ == "PanicException"  # of Rust; it can't be imported


_stderr = Lock()


@contextmanager
def _panics_kept_from_stderr() -> Iterator[None]:
    """Hold back what is written to the error stream in this block, and write it afterwards unless it was a panic."""
    with _stderr, tempfile.TemporaryFile() as kept:
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
