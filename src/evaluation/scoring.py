"""The losses of rows one by one, as training computes them, and the thoughts that a model writes for them itself."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import GenerationConfig

from src.data.batching import LabelledRows, collate, similar_batches
from src.data.encoding import IGNORE_INDEX, THOUGHT
from src.data.paired import PairedRows
from src.data.views import Piece
from src.evaluation.generate import Generator
from src.runtime.session import Runtime


@dataclass(frozen=True)
class TokenNll:
    """A row's supervised tokens in reading order: nats, ids and mask of thoughts, [supervised] each."""

    nll: np.ndarray
    targets: np.ndarray
    is_thought: np.ndarray


@dataclass(frozen=True)
class Scorer:
    """A model whose forward computes losses, and in which batches it is fed."""

    loss_model: nn.Module
    runtime: Runtime
    batch_size: int
    pad_token_id: int

    @torch.no_grad()
    def score(self, rows: LabelledRows, indices: Sequence[int]) -> list[TokenNll]:
        """Compute the losses of some rows, in their order; Interrupted between two batches, where a signal asked."""
        self.loss_model.eval()
        batches = similar_batches(np.array([rows[i].num_tokens for i in indices], dtype=int), self.batch_size)
        found: dict[int, TokenNll] = {}
        for chosen in batches:
            self.runtime.check_stop()
            batch = collate(rows, [[indices[i]] for i in chosen], self.pad_token_id)
            with self.runtime.autocast():
                losses = self.loss_model(**batch.to(self.runtime.device).inputs())
            nll, targets = losses.nll.double().cpu().numpy(), losses.targets.cpu().numpy()
            is_thought = losses.is_thought
            mask = np.zeros(len(nll), dtype=bool) if is_thought is None else is_thought.cpu().numpy()
            ends = (batch.labels != IGNORE_INDEX).sum(1).cumsum(0)[:-1].tolist()
            parts = zip(*(np.split(values, ends) for values in (nll, targets, mask)), strict=True)
            found |= {i: TokenNll(*part) for i, part in zip(chosen, parts, strict=True)}
        return [found[i] for i in range(len(indices))]


@contextmanager
def greedy(model: Any, max_new_tokens: int, stop_ids: Sequence[int]) -> Iterator[None]:
    """Have a model generate the likeliest tokens up to one of `stop_ids`, in a block."""
    before = model.generation_config
    model.generation_config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        bos_token_id=before.bos_token_id,
        eos_token_id=list(stop_ids),
        pad_token_id=before.pad_token_id,
        decoder_start_token_id=before.decoder_start_token_id,
        use_cache=True,
    )
    try:
        yield
    finally:
        model.generation_config = before


@dataclass
class _Written:
    """A row while its thoughts are written: `done` are the ids up to here; `thoughts` become None without room."""

    pieces: list[Piece]
    done: list[int] = field(default_factory=list)
    thoughts: list[list[int]] | None = field(default_factory=list)
    num_cut: int = 0

    def advance(self) -> bool:
        """Take over what is given up to the next thought; return whether there is one."""
        while self.pieces:
            piece = self.pieces.pop(0)
            if piece.kind == THOUGHT:
                return True
            self.done += piece.ids
        return False

    def add(self, thought: list[int], *, is_cut: bool) -> None:
        assert self.thoughts is not None
        self.thoughts.append(thought)
        self.done += thought
        self.num_cut += is_cut

    @property
    def num_left(self) -> int:
        """The tokens that are given after the next thought, thoughts left out."""
        return sum(len(piece.ids) for piece in self.pieces if piece.kind != THOUGHT)


def write_thoughts(
    paired: PairedRows, indices: Sequence[int], generator: Generator, budget: int, stop_ids: Sequence[int], seed: int
) -> list[tuple[list[list[int]] | None, int]]:
    """Write the thoughts of some rows, from left to right: after the opening tag the model writes its likeliest tokens,
    up to the closing tag or the end of the text, at most `budget` of them; then what the row has up to its next thought
    is given, and so on.

    Returns: of each row its thoughts, tags included, and how many were closed because the budget was used up; None in
        place of the thoughts where the row has no room for a budget.
    """
    open_id, close_id = paired.tags.ids
    rows = {i: _Written(paired.pieces(i)) for i in indices}
    active = list(indices)
    with greedy(generator.model, budget + 1, [close_id, *stop_ids]):
        while active := [i for i in active if rows[i].advance()]:
            for row in (rows[i] for i in active):
                if len(row.done) + budget + 2 + row.num_left > paired.most_tokens:
                    row.thoughts = None
            active = [i for i in active if rows[i].thoughts is not None]
            begun = [[*rows[i].done, open_id] for i in active]
            prompts, prefixes = begun, None
            if paired.gold.is_encoder_decoder:
                prompts, prefixes = [paired.gold[i].input_ids.tolist() for i in active], begun
            for i, written in zip(active, generator.generate(prompts, seed, target_prefixes=prefixes), strict=True):
                rows[i].add([open_id, *written.ids[:budget], close_id], is_cut=written.stop_reason == "length")
    return [(row.thoughts, row.num_cut) for row in rows.values()]
