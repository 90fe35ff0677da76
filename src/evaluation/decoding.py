"""Decoding of a batch in which no prompt's text depends on its neighbours.

Transformers pads prompts on the left and lets what changes the scores (no_repeat_ngram_size, min_new_tokens, bad words
…) look at the padding too: a padded row repeats the pad, which may be EOS, and is longer than it is alone. And all rows
draw from one stream. Here each prompt has processors of its own, built by transformers for the prompt alone and shown
what belongs to it, and a stream of random numbers of its own.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from src.errors import ModelError

SCORES_ALONE = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper)
"""Processors that look at each row's scores and at nothing else: they take all rows at once."""


@dataclass(frozen=True)
class Decoding:
    """How `generate` decodes a batch, as its `custom_generate`.

    `prompts` are the ids of each row without padding; of an encoder-decoder they go to the encoder. `streams` holds a
    row's random numbers [prompts, tokens], from 0 to 1, where one sequence is sampled for each; else it is None.
    """

    prompts: Sequence[list[int]]
    streams: Tensor | None
    synced_gpus: bool

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: Any,
        generation_config: GenerationConfig,
        **model_inputs: Any,
    ) -> Tensor:
        """Return the ids [prompts, tokens] of prompts and what was written.

        Args:
            input_ids: what the decoder begins with, [prompts * beams, tokens].
            logits_processor: those that transformers made for all rows together; not used.
        """
        config = copy.copy(generation_config)
        processors = self._processors(model, input_ids, config)
        if self.streams is not None:
            config.do_sample = False  # what was drawn is the only token left
        decode = model._sample if config.num_beams == 1 else model._beam_search
        return decode(
            input_ids,
            logits_processor=processors,
            stopping_criteria=stopping_criteria,
            generation_config=config,
            synced_gpus=self.synced_gpus,
            **model_inputs,
        )

    def _processors(self, model: Any, input_ids: Tensor, config: GenerationConfig) -> LogitsProcessorList:
        length = input_ids.shape[1]
        paddings = [0 if model.config.is_encoder_decoder else length - len(prompt) for prompt in self.prompts]
        own = []
        for prompt, padding in zip(self.prompts, paddings, strict=True):
            alone = copy.copy(config)
            alone.max_length = config.max_length - padding
            if config.min_new_tokens is not None:
                alone.min_length = 0  # transformers made it of min_new_tokens and the padded prompt
            own.append(
                model._get_logits_processor(
                    generation_config=alone,
                    input_ids_seq_length=length - padding,
                    encoder_input_ids=torch.tensor([prompt], device=input_ids.device),
                    device=input_ids.device,
                )
            )
        shared = list(takewhile(lambda one: isinstance(one, SCORES_ALONE), reversed(own[0])))[::-1]
        found = LogitsProcessorList()
        if len(own[0]) > len(shared):
            stop = config.eos_token_id if isinstance(config.eos_token_id, int) else config.eos_token_id[0]
            found.append(_RowByRow([each[: len(each) - len(shared)] for each in own], paddings, stop))
        found.extend(shared)
        if self.streams is not None:
            found.append(_Draw(self.streams.to(input_ids.device), length))
        return found


class _RowByRow(LogitsProcessor):
    """Shows each prompt's own processors the ids of its beams, without the padding on their left.

    Where they leave no token at all, as no_repeat_ngram_size may with few tokens, the text ends.
    """

    def __init__(self, processors: Sequence[Sequence[LogitsProcessor]], paddings: Sequence[int], stop_id: int) -> None:
        self._rows = list(zip(processors, paddings, strict=True))
        self._stop_id = stop_id

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        beams = len(scores) // len(self._rows)
        changed = []
        for (processors, padding), ids, own in zip(
            self._rows, input_ids.split(beams), scores.split(beams), strict=True
        ):
            for processor in processors:
                own = processor(ids[:, padding:], own)
            changed.append(own)
        joined = torch.cat(changed)
        joined[:, self._stop_id].masked_fill_(joined.isneginf().all(1), 0)
        return joined


class _Draw(LogitsProcessor):
    """Draws each row's next token from its own stream, and leaves no other a score."""

    def __init__(self, streams: Tensor, begin: int) -> None:
        self._streams = streams
        self._begin = begin

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not scores.logsumexp(1).isfinite().all():
            raise ModelError("no token can be drawn: the model's scores are not finite")
        drawn = draw(scores, self._streams[:, input_ids.shape[1] - self._begin])
        return torch.full_like(scores, -math.inf).scatter_(1, drawn[:, None], 0)


def draw(scores: Tensor, uniform: Tensor) -> Tensor:
    """Return an id for each row of scores [rows, ids] with the probability that softmax gives it.

    Args:
        uniform: a number for each row, at least 0 and below 1.

    Source: inversion of the cumulative distribution, Devroye 1986, "Non-Uniform Random Variate Generation", III.2.1.
    """
    cumulative = scores.double().softmax(1).cumsum(1)
    cumulative = cumulative / cumulative[:, -1:]  # so that no number reaches the last
    return torch.searchsorted(cumulative, uniform[:, None].contiguous(), right=True)[:, 0].clamp(
        max=scores.shape[1] - 1
    )


def row_streams(seed: int, rows: Sequence[int], count: int) -> Tensor:
    """Return `count` random numbers for each row, [rows, count], by seed and the row's number alone."""
    return torch.from_numpy(np.stack([np.random.default_rng([seed, row]).random(count) for row in rows]))
