"""Generation in batches: prompts padded on the left, completions cut at EOS."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from src.config.schema import RunConfig
from src.data.answers import AnswerFrame
from src.data.dataset import Data
from src.data.encoding import Encoder
from src.data.sets import EncodedSet
from src.errors import DataError, ModelError
from src.evaluation.decoding import Decoding, row_streams
from src.runtime.session import Runtime
from src.runtime.signals import StopRequest


class _StopRequested(StoppingCriteria):
    """Ends generation between two tokens when a signal asks the run to stop."""

    def __init__(self, stop: StopRequest) -> None:
        self._stop = stop

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.full((input_ids.shape[0],), bool(self._stop.asked()), device=input_ids.device)


@dataclass(frozen=True)
class Completion:
    """Generated ids, without EOS, and why they end: `eos` or `length`."""

    ids: list[int]
    stop_reason: str


@dataclass(frozen=True)
class EndText:
    """A text that ends a turn, for chat templates that end turns with words that are no token."""

    frame: AnswerFrame
    encoder: Encoder

    @classmethod
    def from_frame(cls, frame: AnswerFrame, encoder: Encoder) -> "EndText | None":
        """Return the text that ends turns in a chat template; None where a token does, or nothing."""
        return cls(frame, encoder) if frame.end_text else None

    def is_in(self, ids: Sequence[int]) -> bool:
        """Return whether generated ids contain it; in a thought it ends nothing."""
        return self.frame.is_over(self.encoder.decode(ids))

    def cut(self, completion: Completion) -> Completion:
        """Cut a completion after the token that completes the text."""
        ids = completion.ids
        if not self.is_in(ids):
            return completion
        return Completion(ids[: bisect_left(range(len(ids) + 1), True, key=lambda n: self.is_in(ids[:n]))], "eos")


class _EndTextReached(StoppingCriteria):
    """Ends each row after a text; `begin` is the index of the first generated id."""

    def __init__(self, end: EndText, begin: int) -> None:
        self._end, self._begin = end, begin
        self._window = len(end.frame.end_text.encode()) + 1  # a token writes a byte at least; the last may write more

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        text, decode = self._end.frame.end_text, self._end.encoder.decode
        generated = input_ids[:, self._begin :].tolist()
        is_over = [text in decode(ids[-self._window :]) and self._end.is_in(ids) for ids in generated]
        return torch.tensor(is_over, device=input_ids.device)


@dataclass(frozen=True)
class Generator:
    """A model that generates by its own `generation_config`, see model.build."""

    model: Any
    runtime: Runtime
    batch_size: int
    target_prefix: list[int]  # ids that an encoder-decoder's decoder is fed after its start token
    end: EndText | None = None

    @property
    def pad_token_id(self) -> int:
        return int(self.model.generation_config.pad_token_id)

    @property
    def is_encoder_decoder(self) -> bool:
        return bool(self.model.config.is_encoder_decoder)

    def generate(self, prompts: Sequence[list[int]], seed: int, first_row: int = 0) -> list[Completion]:
        """Generate a completion for each prompt (ids), in their order.

        Prompts of similar length are batched, for little padding. Batching changes no completion: each prompt is
        decoded as it would be alone, and draws from its own random stream, by `seed` and its row.

        Args:
            first_row: the index of the first prompt's row, where the prompts are a part of a set.
        Raises:
            Interrupted: between two tokens, where a signal asked for it.
        """
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        local: dict[int, Completion] = {}
        training = self.model.training
        self.model.eval()
        is_alone = self._samples_beams or self._stretches(max(map(len, prompts), default=0))
        size = 1 if is_alone else self.batch_size
        for start, is_real in self.runtime.split(range(0, len(order), size)):
            self.runtime.check_stop()
            batch = order[start : start + size]
            rows = [first_row + i for i in batch]
            with self.runtime.isolated_rng(_seed_of(seed, rows[0])), torch.no_grad():
                generated = self._batch([prompts[i] for i in batch], rows, seed)
            if is_real:
                local |= dict(zip(batch, generated, strict=True))
        self.runtime.check_stop()
        self.model.train(training)
        completions = {i: one for process in self.runtime.gather(local) for i, one in process.items()}
        return [completions[i] for i in range(len(prompts))]

    @property
    def _samples_beams(self) -> bool:
        """Whether transformers samples among the beams, from the global random stream: prompts can't be batched."""
        settings = self.model.generation_config
        return bool(settings.do_sample and (settings.num_beams or 1) > 1)

    def _stretches(self, longest: int) -> bool:
        """Return whether positions depend on the longest row of a batch.

        Some models (longrope as in Phi-3-128k, dynamic) change them beyond a certain length, for all rows at once.
        """
        settings = self.model.config.get_text_config()
        rope = getattr(settings, "rope_parameters", None) or {}
        kinds = [rope, *(kind for kind in rope.values() if isinstance(kind, dict))]
        limits = [
            kind.get("original_max_position_embeddings") or settings.max_position_embeddings
            for kind in kinds
            if kind.get("rope_type") in ("longrope", "dynamic")
        ]
        return bool(limits) and longest + self.model.generation_config.max_new_tokens > min(limits)

    def _batch(self, prompts: Sequence[list[int]], rows: Sequence[int], seed: int) -> list[Completion]:
        settings = self.model.generation_config
        longest = max(map(len, prompts))
        pad = self.pad_token_id
        ids = torch.full((len(prompts), longest), pad)
        real = torch.zeros_like(ids)
        for i, prompt in enumerate(prompts):
            # an encoder's positions count from the left, a decoder's completion follows on the right
            here = slice(0, len(prompt)) if self.is_encoder_decoder else slice(longest - len(prompt), longest)
            ids[i, here], real[i, here] = torch.tensor(prompt), 1
        decoder = {}
        if self.is_encoder_decoder:
            begin = [settings.decoder_start_token_id, *self.target_prefix]
            decoder["decoder_input_ids"] = torch.tensor([begin] * len(prompts), device=self.runtime.device)
            longest = len(begin)
        draws = settings.do_sample and not self._samples_beams
        decoding = Decoding(
            prompts,
            row_streams(seed, rows, settings.max_new_tokens) if draws else None,
            synced_gpus=self.runtime.zero_stage == 3,  # each process computes as long as another one generates
        )
        criteria: list[StoppingCriteria] = [_StopRequested(self.runtime.stop)]
        if self.end is not None:
            criteria.append(_EndTextReached(self.end, longest))
        with self.runtime.autocast():
            generated = self.model.generate(
                input_ids=ids.to(self.runtime.device),
                attention_mask=real.to(self.runtime.device),
                custom_generate=decoding,
                stopping_criteria=StoppingCriteriaList(criteria),
                **decoder,
            )
        stops = settings.eos_token_id
        stops = [stops] if isinstance(stops, int) else stops
        completions = [cut_at(row, stops) for row in generated[:, longest:].tolist()]
        return completions if self.end is None else [self.end.cut(completion) for completion in completions]


def _seed_of(seed: int, row: int) -> int:
    """Return a seed for the global generators, by a call's seed and the row's number."""
    return int(np.random.SeedSequence([seed, row]).generate_state(1)[0])


def check_prompts(config: RunConfig, model: Any, data: Data) -> None:
    """Check that there is room after every prompt, and that none is empty where answers are compared.

    Args:
        model: only its configuration is used.
    Raises:
        DataError, ModelError: naming the row.
    """
    generated = [*data.validation.values(), *data.test.values()] if config.metrics else []
    for rows in generated:
        lengths = rows.prompt_lengths().tolist()
        if 0 in lengths:
            raise DataError(f"{rows.place(lengths.index(0))}  nothing to generate from: an empty prompt, and no BOS")
    for rows in [*generated, *([data.for_samples()] if config.evaluation.sample_prompts else [])]:
        check_room(rows, model, data.encoder.target_prefix, config.generation.max_new_tokens)


def check_room(rows: EncodedSet, model: Any, target_prefix: list[int], max_new_tokens: int) -> None:
    """Raise ModelError, naming the row, where a set's longest prompt leaves no room for what is generated."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    lengths = rows.prompt_lengths()
    longest = int(lengths.argmax())
    used = 1 + len(target_prefix) if model.config.is_encoder_decoder else int(lengths[longest])
    if positions is not None and used + max_new_tokens > positions:
        raise ModelError(
            f"{rows.place(longest)}: {used} tokens and generation.max_new_tokens = {max_new_tokens} more do not fit "
            f"into the model's {positions} positions; lower one of data.max_seq_length and max_new_tokens"
        )


def cut_at(ids: list[int], stop_ids: Sequence[int]) -> Completion:
    """Cut generated ids before the first stop id, EOS or the end of a turn; padding follows it."""
    for i, token_id in enumerate(ids):
        if token_id in stop_ids:
            return Completion(ids[:i], "eos")
    return Completion(ids, "length")
