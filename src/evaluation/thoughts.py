"""Thoughts while generating: whether one is written, and how long it may be."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from src.config.schema import GenerationConfig, ThoughtMode
from src.data.encoding import Encoder
from src.evaluation.thought_counts import Thought, thoughts_in


@dataclass(frozen=True)
class ThoughtRule:
    """How thoughts are written, between two tags that are one token each.

    `max_tokens` counts what is between the tags; None: as many as the model wants. `decode` turns ids into their text.
    """

    open_id: int
    close_id: int
    decode: Callable[[Sequence[int]], str]
    mode: ThoughtMode = ThoughtMode.free
    max_tokens: int | None = None

    @property
    def is_active(self) -> bool:
        """Whether it changes anything that a model writes."""
        return self.mode is not ThoughtMode.free or self.max_tokens is not None

    @property
    def limit(self) -> int | None:
        """The most tokens in a thought; without thoughts, one that the prompt has opened is closed at once."""
        return 0 if self.mode is ThoughtMode.none else self.max_tokens

    def is_opened_by(self, prompt: Sequence[int]) -> bool:
        """Return whether a prompt ends with an opening tag, as generation prompts of some chat templates do."""
        if self.open_id not in prompt:
            return False
        after = len(prompt) - list(prompt)[::-1].index(self.open_id)
        return not self.decode(prompt[after:]).strip()

    def found(self, prompt: Sequence[int], ids: Sequence[int]) -> list[Thought]:
        """Return the thoughts in ids that were generated after a prompt."""
        return thoughts_in(ids, (self.open_id, self.close_id), is_opened=self.is_opened_by(prompt))


def thought_rule(encoder: Encoder, generation: GenerationConfig) -> ThoughtRule | None:
    """Return how a configuration has thoughts written; None where the model writes none."""
    if encoder.tag_ids is None:
        return None
    return ThoughtRule(*encoder.tag_ids, encoder.decode, generation.thoughts, generation.max_thought_tokens)


@dataclass
class ThoughtProcessor(LogitsProcessor):
    """Forces and forbids the tags of thoughts, each row by its own text.

    It has the last word on what `others` (no_repeat_ngram_size, repetition_penalty, min_new_tokens …) leave: a forced
    tag has the model's own score, so that beams are compared by it. With a limit every thought is closed: EOS can't
    end one, and none is opened within another or where the text has no room for its closing tag; nor is there a closing
    tag outside a thought.

    Args:
        opened: whether each prompt ends in a thought that it has opened.
        begin: the index of the first generated id.
        end: the length of the longest text, prompt included.
        stop_ids: they end a text; the first of them where nothing else is left.
    """

    rule: ThoughtRule
    others: LogitsProcessorList
    opened: Sequence[bool]
    begin: int
    end: int
    stop_ids: Sequence[int]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        rule, left = self.rule, self.end - input_ids.shape[1]
        changed = self.others(input_ids, scores).clone()
        beams = len(scores) // len(self.opened)
        opened = torch.tensor(self.opened, device=scores.device).repeat_interleave(beams)
        num_inner = count_inner(input_ids[:, self.begin :], opened, rule.open_id, rule.close_id)
        is_inside = num_inner >= 0
        must_open = ~is_inside & (rule.mode is ThoughtMode.forced and input_ids.shape[1] == self.begin)
        must_close = torch.zeros_like(is_inside)
        if rule.limit is not None:
            must_close = is_inside & ((num_inner >= rule.limit) | (left <= 1))
            can_open = ~is_inside & (rule.mode is not ThoughtMode.none and left > 1)
            changed[:, rule.open_id].masked_fill_(~can_open, -torch.inf)
            changed[:, rule.close_id].masked_fill_(~is_inside, -torch.inf)
            for stop_id in self.stop_ids:
                changed[:, stop_id].masked_fill_(is_inside, -torch.inf)
            has_none = changed.isneginf().all(1)
            must_close |= has_none & is_inside
            changed[:, self.stop_ids[0]].masked_fill_(has_none & ~is_inside, 0)
        for is_forced, tag in ((must_open, rule.open_id), (must_close, rule.close_id)):
            only = torch.full_like(scores, -torch.inf)
            only[:, tag] = scores[:, tag]
            changed = torch.where(is_forced[:, None], only, changed)
        return changed


def count_inner(generated: Tensor, opened: Tensor, open_id: int, close_id: int) -> Tensor:
    """Count the tokens that follow the opening tag of the thought in which each row is, [rows]; -1 where it is in none.

    Args:
        generated: the ids of each row, [rows, tokens]; an opening tag within a thought is a token like any other.
        opened: whether a thought was opened before them, [rows].
    """
    before = torch.where(opened, open_id, close_id)[:, None]
    ids = torch.cat([before, generated], dim=1)
    last = ids.shape[1] - 1
    place = torch.arange(last + 1, device=ids.device)
    closed = torch.where(ids == close_id, place, -1).amax(1, keepdim=True)
    start = torch.where((ids == open_id) & (place > closed), place, last + 1).amin(1)
    return last - start
