"""Whether the rows of a micro-batch lie in one sequence, so that no padding is computed, and how a model is told."""

from collections.abc import Sequence
from typing import Any

from src.config.schema import Attention, Batching, RunConfig
from src.data.batching import BatchSampler, RowBounds, flash_bounds
from src.data.batching_choice import LEAST_SAVING, padding
from src.data.sets import EncodedSet
from src.errors import ModelError
from src.model.row_attention import BY_ROWS, SDPA, can_attend_by_rows, no_mask
from src.runtime.precision import device_of
from src.training.head import ModelWithLoss


def row_lengths(lengths: Sequence[int]) -> dict[str, Any]:
    """Return the lengths of rows in one sequence as arguments of a model that attends by rows."""
    return {"row_lengths": list(lengths), "attention_mask": no_mask()}


def plans_padding_free(config: RunConfig, rows: EncodedSet, sampler: BatchSampler) -> bool:
    """Return whether rows are to lie in one sequence: packed ones, and others where enough would be padding.

    torch's attention does it on a CPU; FlashAttention for packed rows.
    """
    is_packed = sampler.batching is Batching.packed
    if config.model.attn_implementation is Attention.flash_attention_2:
        return is_packed
    if not len(rows) or not attends_by_rows(config, rows):
        return False
    return is_packed or padding(rows, sampler, config.seed) >= LEAST_SAVING


def attends_by_rows(config: RunConfig, rows: EncodedSet) -> bool:
    """Return whether a run's device and settings are those that attention by rows is for.

    Compiled code would be compiled anew for other lengths.
    """
    is_sdpa = config.model.attn_implementation in (None, Attention.sdpa)
    is_on_cpu = device_of(config).type == "cpu"
    return is_sdpa and is_on_cpu and not (rows.is_encoder_decoder or config.runtime.compile)


def find_row_bounds(loss_model: ModelWithLoss, sampler: BatchSampler, config: RunConfig) -> RowBounds | None:
    """Return how the model is told of rows in one sequence; None where each sequence of a micro-batch is padded.

    It is tried out: where the model's attention can't be told, rows are padded. ModelError says that packed rows would
    see each other.
    """
    if sampler.is_padding_free and config.model.attn_implementation is Attention.flash_attention_2:
        loss_model.check_packing(flash_bounds)
        return flash_bounds
    model = loss_model.model
    if sampler.is_padding_free and can_attend_by_rows(model):
        model.set_attn_implementation(BY_ROWS)
        try:
            loss_model.check_packing(row_lengths)
        except ModelError:  # its own attention is tried below, where rows are packed
            model.set_attn_implementation(SDPA)
        else:
            return row_lengths
    if sampler.batching is Batching.packed:
        loss_model.check_packing()
    return None
