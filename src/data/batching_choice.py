"""How much of what is computed would be padding, and whether rows are grouped by length, where that is left open
(`data.batching=auto`): counted, not guessed."""

from dataclasses import replace

from src.config.schema import Batching
from src.data.batching import BatchSampler
from src.data.sets import EncodedSet

LEAST_SAVING = 0.05
"""Share of the positions that grouping, or computing without padding, must save."""


def num_positions(rows: EncodedSet, sampler: BatchSampler, seed: int) -> int:
    """Count the positions of a first epoch's micro-batches, padding included; those of targets too."""
    batches = sampler.micro_batches(rows.lengths, [seed, 0], 0, rows.target_lengths)
    return batches.num_positions(rows.lengths) + batches.num_positions(rows.target_lengths)


def padding(rows: EncodedSet, sampler: BatchSampler, seed: int) -> float:
    """Return the share of the first epoch's positions that are padding, from 0 to 1."""
    return 1 - rows.num_tokens / num_positions(rows, sampler, seed)


def choose_batching(rows: EncodedSet, sampler: BatchSampler, seed: int) -> BatchSampler:
    """Return a sampler as the given one that groups rows by length where that saves enough positions, else pads them.

    Without a budget of tokens, the positions are those of whole steps in one micro-batch: a step has the same rows
    however it is cut, into micro-batches and over processes.
    """
    step_size = sampler.batch_size * sampler.micro_batches_per_step
    whole = sampler if sampler.counts_tokens else replace(sampler, batch_size=step_size, micro_batches_per_step=1)
    if not len(rows) or _saved_share(rows, whole, seed) < LEAST_SAVING:
        return replace(sampler, batching=Batching.padded)
    return replace(sampler, batching=Batching.length_grouped, saved_share=_saved_share(rows, sampler, seed))


def _saved_share(rows: EncodedSet, sampler: BatchSampler, seed: int) -> float:
    """Return the share of positions that grouping saves."""
    each = (replace(sampler, batching=one) for one in (Batching.padded, Batching.length_grouped))
    padded, grouped = (num_positions(rows, one, seed) for one in each)
    return 1 - grouped / padded


def about_choice(sampler: BatchSampler) -> str:
    """Return what Batching.auto chose to group for, in words."""
    return f"rows of similar length together, {sampler.saved_share:.0%} fewer positions (data.batching=auto)"
