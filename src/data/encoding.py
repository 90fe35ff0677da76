"""From prompt and completion to ids and labels. The mask is right by construction, never searched for.

Prompt and completion are tokenised apart and their ids joined, because that is what generation sees. Supervised are the
completion's tokens and the EOS behind it, nothing else; EOS goes on as an id, and only behind a completion that was not
cut. BOS, EOS and pad that stand in a text stay text; every other added token keeps its id.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from src.config.schema import Overflow
from src.errors import TokenError

IGNORE_INDEX = -100
"""Label of a position that is not learned."""


@dataclass(frozen=True)
class EncodedRow:
    """Ids and labels of one row, [length] each; labels are not shifted: label i is id i, or IGNORE_INDEX."""

    input_ids: np.ndarray
    labels: np.ndarray
    prompt_length: int
    truncated: bool


class Encoder:
    """A tokenizer, seen as training and generation use it."""

    def __init__(self, tokenizer: Any) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise TokenError("this tokenizer has no fast version (tokenizer.json), which encoding needs")
        if tokenizer.eos_token_id is None:
            raise TokenError("this tokenizer has no EOS token: a model could not learn where a completion ends")
        self._tokenizer = tokenizer
        self.eos_token_id: int = tokenizer.eos_token_id
        control = [tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token]
        self._control = sorted({token for token in control if token})
        self._control_ids = set(tokenizer.convert_tokens_to_ids(self._control))
        self._start_backend = _without_control_tokens(tokenizer, set(self._control), continues=False)
        self._continuation_backend = _without_control_tokens(tokenizer, set(self._control), continues=True)
        self._prefix = _bos(tokenizer)
        self.num_control_tokens_as_text = 0
        """How many BOS, EOS and pad stood in texts and were encoded as text."""

    def encode_prompts(self, prompts: Sequence[str]) -> list[list[int]]:
        """Encode prompts as generation feeds them: BOS in front where the model wants one."""
        return [self._prefix + ids for ids in self._encode(prompts, self._start_backend)]

    def encode_completions(self, prompts: Sequence[str], completions: Sequence[str]) -> list[list[int]]:
        """Encode what follows a prompt, without EOS; behind an empty prompt a completion begins the text."""
        following = iter(self._encode([c for p, c in _pairs(prompts, completions) if p], self._continuation_backend))
        beginning = iter(self._encode([c for p, c in _pairs(prompts, completions) if not p], self._start_backend))
        return [next(following if prompt else beginning) for prompt in prompts]

    def _encode(self, texts: Sequence[str], backend: Tokenizer) -> list[list[int]]:
        encoded = [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]
        for i, text in enumerate(texts):
            if found := sum(text.count(control) for control in self._control):
                self.num_control_tokens_as_text += found
                if self._control_ids.intersection(encoded[i]):  # the model's own vocabulary holds the piece
                    encoded[i] = self._encode_in_pieces(text, backend)
        return encoded

    def _encode_in_pieces(self, text: str, backend: Tokenizer) -> list[int]:
        """Encode a text cut inside of every control token that stands in it, so that none can be found whole."""
        inside = "|".join(f"(?<={re.escape(c[0])})(?={re.escape(c[1:])})" for c in self._control if len(c) > 1)
        first, *rest = re.split(inside, text)
        ids = list(backend.encode(first, add_special_tokens=False).ids)
        for piece in rest:
            ids += self._continuation_backend.encode(piece, add_special_tokens=False).ids
        if self._control_ids.intersection(ids):
            raise TokenError(f"this tokenizer can't encode a control token as text, and it stands in {text[:80]!r}")
        return ids

    def encode_rows(
        self, prompts: Sequence[str], completions: Sequence[str], max_length: int, overflow: Overflow
    ) -> list[EncodedRow | None]:
        """Encode pairs; None where a row is too long and `overflow` does not cut it."""
        pairs = zip(self.encode_prompts(prompts), self.encode_completions(prompts, completions), strict=True)
        return [self._join(prompt, completion, max_length, overflow) for prompt, completion in pairs]

    def _join(self, prompt: list[int], completion: list[int], max_length: int, overflow: Overflow) -> EncodedRow | None:
        completion = [*completion, self.eos_token_id]
        excess = len(prompt) + len(completion) - max_length
        if excess > 0:
            if overflow in (Overflow.drop, Overflow.error):
                return None
            if overflow is Overflow.truncate_prompt:
                prompt = _cut_start(prompt, excess, len(self._prefix))
            prompt = prompt[:max_length]
            completion = completion[: max_length - len(prompt)]
        ids = np.array(prompt + completion, dtype=np.int32)
        labels = ids.copy()
        labels[: max(1, len(prompt))] = IGNORE_INDEX  # the first id of all has nothing before it to be predicted from
        return EncodedRow(ids, labels, len(prompt), truncated=excess > 0)

    def decode(self, ids: Sequence[int]) -> str:
        """Give the text of generated ids; BOS, EOS and pad are no text, thought tags are."""
        kept = [i for i in ids if i not in self._control_ids]
        return self._tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _pairs(prompts: Sequence[str], completions: Sequence[str]) -> zip[tuple[str, str]]:
    return zip(prompts, completions, strict=True)


def _cut_start(prompt: list[int], excess: int, num_prefix: int) -> list[int]:
    """Drop `excess` ids from the front of a prompt, behind its BOS, as far as there are any."""
    return prompt[:num_prefix] + prompt[num_prefix:][excess:]


def _bos(tokenizer: Any) -> list[int]:
    """Give [BOS] where the tokenizer itself would put one in front of a text, else []."""
    ids = tokenizer("a", add_special_tokens=True)["input_ids"]
    return [ids[0]] if tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id] else []


def _without_control_tokens(tokenizer: Any, control: set[str], *, continues: bool) -> Tokenizer:
    """Copy the tokenizer so that control tokens in a text are text, and all other added tokens are still tokens.

    `encode_special_tokens` makes text of whatever is marked special, so in the copy only control tokens are. With
    `continues`, the copy is for a text that goes on behind another: it puts no dummy space in front.
    """
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    for token in spec["added_tokens"]:
        token["special"] = token["content"] in control
    if continues:
        spec = _without_dummy_space(spec)
    copy = Tokenizer.from_str(json.dumps(spec))
    copy.encode_special_tokens = True
    copy.no_padding()
    copy.no_truncation()
    return copy


def _without_dummy_space(node: Any) -> Any:
    """Take out of a tokenizer's specification what puts a space (SentencePiece's '▁') in front of every text."""
    if isinstance(node, list):
        return [_without_dummy_space(item) for item in node]
    if not isinstance(node, dict):
        return node
    node = {
        key: value if key in ("model", "added_tokens") else _without_dummy_space(value) for key, value in node.items()
    }
    match node.get("type"):
        case "Metaspace":
            node["prepend_scheme"] = "never"
        case "ByteLevel":
            node["add_prefix_space"] = False
        case "Prepend":
            node["prepend"] = ""
    return node
