"""Batched decoding in which no prompt's text depends on its neighbours.

Transformers pads prompts on the left, and its logits processors (no_repeat_ngram_size, min_new_tokens, bad words …) see
the padding too: a padded row repeats the pad, which may be EOS, and is longer than alone. And all rows draw from one
random stream. Here each prompt has its own processors, built by transformers for the prompt alone and called without
its padding, and its own random stream.
"""

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
from src.evaluation.averaging import mean_probabilities
from src.evaluation.thoughts import ThoughtProcessor, ThoughtRule

ROW_WISE = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper)
"""Processors that depend on each row's scores only: they are applied to all rows at once."""


@dataclass(frozen=True)
class Decoding:
    """Decodes a batch, as `custom_generate` of `generate`.

    `prompts` are the ids of each row without padding; an encoder-decoder's encoder gets them. `streams` are the random
    numbers of each row, [prompts, tokens] in [0, 1), where one sequence is sampled for each; else None. `thoughts` is
    how thoughts are written; None: as the model wants. `others` are models whose probabilities are averaged with those
    of the model that generates.
    """

    prompts: Sequence[list[int]]
    streams: Tensor | None
    synced_gpus: bool
    thoughts: ThoughtRule | None = None
    others: Sequence[Any] = ()

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: Any,
        generation_config: GenerationConfig,
        **model_inputs: Any,
    ) -> Tensor:
        """Return the ids of prompts and completions, [prompts, tokens]; `input_ids` are the decoder's first ones,
        [prompts * beams, tokens], and the processors, which transformers built for all rows together, are not used.
        """
        config = copy.copy(generation_config)
        processors = self._processors(model, input_ids, config)
        if self.others:
            mean = mean_probabilities(self.others, self.prompts, model_inputs, config.num_beams)
            processors.insert(0, mean)
        if self.streams is not None:
            config.do_sample = False  # _Draw leaves one token
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
        length, device = input_ids.shape[1], input_ids.device
        paddings = [0 if model.config.is_encoder_decoder else length - len(prompt) for prompt in self.prompts]
        each = []
        for prompt, padding in zip(self.prompts, paddings, strict=True):
            alone = copy.copy(config)
            alone.max_length = config.max_length - padding
            if config.min_new_tokens is not None:
                alone.min_length = 0  # transformers derived it from min_new_tokens and the padded prompt
            sizes = {
                "input_ids_seq_length": length - padding,
                "encoder_input_ids": torch.tensor([prompt], device=device),
            }
            each.append(model._get_logits_processor(generation_config=alone, **sizes, device=device))
        shared = list(takewhile(lambda processor: isinstance(processor, ROW_WISE), reversed(each[0])))[::-1]
        processors, stop_ids = LogitsProcessorList(), ids_of(config.eos_token_id)
        if len(each[0]) > len(shared):
            processors.append(_RowByRow([own[: len(own) - len(shared)] for own in each], paddings, stop_ids[0]))
        if (rule := self.thoughts) is not None and rule.is_active:
            opened = [rule.is_opened_by(prompt) for prompt in self.prompts]
            thoughts = ThoughtProcessor(rule, processors, opened, length, config.max_length, stop_ids)
            processors = LogitsProcessorList([thoughts])
        processors.extend(shared)
        if self.streams is not None:
            processors.append(_Draw(self.streams.to(device), length))
        return processors


@dataclass
class _RowByRow(LogitsProcessor):
    """Applies each prompt's own processors to its beams, without the padding on their left.

    Where they leave no token, as no_repeat_ngram_size may with a small vocabulary, the text ends.
    """

    processors: Sequence[Sequence[LogitsProcessor]]
    paddings: Sequence[int]
    stop_id: int

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        beams = len(scores) // len(self.processors)
        rows = zip(self.processors, self.paddings, input_ids.split(beams), scores.split(beams), strict=True)
        changed = []
        for processors, padding, ids, own in rows:
            for processor in processors:
                own = processor(ids[:, padding:], own)
            changed.append(own)
        joined = torch.cat(changed)
        joined[:, self.stop_id].masked_fill_(joined.isneginf().all(1), 0)
        return joined


@dataclass
class _Draw(LogitsProcessor):
    """Draws each row's next token from its own stream, and masks all others."""

    streams: Tensor
    begin: int

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not scores.logsumexp(1).isfinite().all():
            raise ModelError("no token can be drawn: the model's scores are not finite")
        drawn = draw(scores, self.streams[:, input_ids.shape[1] - self.begin])
        return torch.full_like(scores, -math.inf).scatter_(1, drawn[:, None], 0)


def draw(scores: Tensor, uniform: Tensor) -> Tensor:
    """Draw an id for each row of scores [rows, ids] with its softmax probability, by a number in [0, 1) for each row.

    Source: inversion of the cumulative distribution, Devroye 1986, "Non-Uniform Random Variate Generation", III.2.1.
    """
    cumulative = scores.double().softmax(1).cumsum(1)
    cumulative = cumulative / cumulative[:, -1:]  # so that the last is 1
    drawn = torch.searchsorted(cumulative, uniform[:, None].contiguous(), right=True)[:, 0]
    return drawn.clamp(max=scores.shape[1] - 1)


def row_streams(seed: int, rows: Sequence[int], count: int, samples: Sequence[int] | None = None) -> Tensor:
    """Return `count` random numbers for each row, [rows, count], from the seed and the row's index only; and from the
    number of its sample, from 0, where a row has several.
    """
    numbers = [0] * len(rows) if samples is None else samples
    keys = [[seed, row, *([number] if number else [])] for row, number in zip(rows, numbers, strict=True)]
    return torch.from_numpy(np.stack([np.random.default_rng(key).random(count) for key in keys]))


def ids_of(token_ids: int | list[int]) -> list[int]:
    """Return as a list what generation settings write as an id or a list of them."""
    return [token_ids] if isinstance(token_ids, int) else token_ids
