"""The module that is trained: a model whose forward computes the summed loss, from logits of supervised positions only.

Accelerate wraps it, so that hooks of DDP and DeepSpeed see one forward.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from src.config.schema import LossConfig, Reduction
from src.data.batching import RowBounds
from src.errors import ModelError
from src.model.embeddings import num_embedding_rows
from src.runtime.profiling import region
from src.training.head_form import HeadForm, is_fused, last_hidden_states, measure_form
from src.training.loss import TokenLosses, compute_losses, supervised_positions

PLAIN = LossConfig(Reduction.mean, thought_weight=1.0, label_smoothing=0.0)
PROBE_LENGTH = 12  # tokens of the short rows on which a model is probed
MOST_SEEN = 1e-5
"""How far, relatively, a packed row's logits may move when only the row before it changes: the same sums, so 0 but for
mixtures of experts (5e-8 seen); those of models that mix rows moved by 1e-4 and more."""
MOST_ROUNDED = 0.05
"""How far a packed row's logits may be from those of the row by itself, as a share of how far they move in one ordinary
sequence: the sums differ, and so does their rounding."""


class ModelWithLoss(nn.Module):
    """A model whose forward takes ids and labels [batch, seq] and returns the losses of the labels.

    An encoder-decoder also takes `target_ids` [batch, target], which its labels belong to. `parts` and `row_weights`,
    of the labels' shape, are the part of each label and the weight of its row; `label_positions` [supervised] are where
    labels are supervised: see Batch.
    """

    def __init__(self, model: Any, config: LossConfig = PLAIN) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.form: HeadForm | None = HeadForm()
        """What the model does before and after its head; None where the model's own forward has to compute logits."""
        self.num_logits = num_embedding_rows(model)
        """Columns of the logits, to size the chunks."""
        self._compiled: Callable[[Callable[..., Tensor | None], Any, dict[str, Any]], Tensor | None] | None = None

    def compile_training(self) -> None:
        """Have torch compile what the model computes while it is trained, and not when it is evaluated or generates."""
        self._compiled = torch.compile(_call, dynamic=True)

    def _computed(self, compute: Callable[[Any, dict[str, Any]], Tensor | None], inputs: dict[str, Any]) -> Tensor:
        call = self._compiled if self._compiled is not None and self.training else _call
        computed = call(compute, self.model, inputs)
        assert computed is not None  # or the form would not be known
        return computed

    @property
    def uses_full_logits(self) -> bool:
        """Whether the model's own forward computes the logits, those of positions that are not supervised too."""
        return self.form is None or not (self.form.is_identity or is_fused(self.model.get_output_embeddings()))

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        target_ids: Tensor | None = None,
        parts: Tensor | None = None,
        row_weights: Tensor | None = None,
        label_positions: Tensor | None = None,
        **inputs: Any,
    ) -> TokenLosses:
        inputs |= {"input_ids": input_ids, "use_cache": False}
        if target_ids is not None:
            inputs["decoder_input_ids"] = shifted(target_ids, self.model.config.decoder_start_token_id)
        is_causal = target_ids is None
        of_labels = labels, parts, row_weights, label_positions
        if self.form is None or self.uses_full_logits:
            logits = self._computed(_logits_of, inputs)
            chosen = supervised_positions(logits, *of_labels, is_causal=is_causal)
            return compute_losses(chosen, lambda logits: logits, logits.shape[-1], self.config)
        hidden = self._computed(last_hidden_states, inputs)
        head = self.model.get_output_embeddings()
        chosen = supervised_positions(hidden, *of_labels, is_causal=is_causal)
        with region("head"):
            if is_fused(head):
                scale = self.form.before * self.form.after
                chosen = chosen if scale == 1 else chosen._replace(states=chosen.states * scale)
                head = self.form.linear(head)
            return compute_losses(chosen, head, self.num_logits, self.config)

    def probe_head(self) -> None:
        """Find out by forwards on a short row how the model's logits follow from its last hidden states.

        Many models put something between head and logits (a scale, a cap, a bias). Where it is more than can be
        measured, the model's own forward computes the logits from then on.
        """
        training = self.training
        self.eval()
        ids = self._probe(PROBE_LENGTH)
        inputs = {"input_ids": ids, "use_cache": False}
        if self.model.config.is_encoder_decoder:
            mask = torch.ones_like(ids)
            mask[:, -1] = 0
            inputs |= {"decoder_input_ids": ids, "attention_mask": mask}
        try:
            self.form, num_logits = measure_form(self.model, inputs)
            self.num_logits = num_logits or self.num_logits
        finally:
            self.train(training)

    @torch.no_grad()
    def check_packing(self, bounds_of: RowBounds | None = None) -> None:
        """Check that a row packed after another has the logits that it has by itself, whatever the other is.

        Rows are kept apart by position_ids that begin at 0 again; an attention that ignores them would let every row
        see the ones before it, and the loss would not show it: ModelError says so. The model is given `bounds_of` the
        rows too, where it takes them.
        """
        first, second = self._probe(PROBE_LENGTH), self._probe(PROBE_LENGTH).flip(1)
        after_first, after_other = torch.cat([first, second], dim=1), torch.cat([second, second], dim=1)
        positions = torch.arange(PROBE_LENGTH, device=first.device)
        restarted = torch.cat([positions, positions])[None]
        bounds = {} if bounds_of is None else bounds_of([PROBE_LENGTH, PROBE_LENGTH])
        bounds = {name: one.to(first.device) if isinstance(one, Tensor) else one for name, one in bounds.items()}
        training = self.training
        self.eval()
        try:
            alone = self._logits(second, positions[None])
            packed = self._logits(after_first, restarted, **bounds)[:, PROBE_LENGTH:]
            other = self._logits(after_other, restarted, **bounds)[:, PROBE_LENGTH:]
            mixed = self._logits(after_first, torch.arange(2 * PROBE_LENGTH, device=first.device)[None])
        except TypeError as error:
            raise ModelError(
                f"{type(self.model).__name__} takes no position_ids, so rows can't be packed for it: "
                "data.batching=length_grouped or padded"
            ) from error
        finally:
            self.train(training)
        sees_others = (packed - other).norm() > MOST_SEEN * packed.norm()
        is_another = (packed - alone).norm() > MOST_ROUNDED * (mixed[:, PROBE_LENGTH:] - alone).norm()
        if sees_others or is_another:
            raise ModelError(
                f"{type(self.model).__name__} lets packed rows see each other with this attention "
                f"({self.model.config._attn_implementation}); data.batching=length_grouped or padded"
            )

    def _logits(self, input_ids: Tensor, position_ids: Tensor, **bounds: Any) -> Tensor:
        return self.model(input_ids=input_ids, position_ids=position_ids, use_cache=False, **bounds).logits.float()

    def _probe(self, length: int) -> Tensor:
        """Return ids that any vocabulary has, [1, length]."""
        return torch.arange(length, device=self.model.device)[None] % num_embedding_rows(self.model)


def _call(compute: Callable[..., Tensor | None], model: Any, inputs: dict[str, Any]) -> Tensor | None:
    return compute(model, inputs)


def _logits_of(model: Any, inputs: Mapping[str, Any]) -> Tensor:
    return model(**inputs).logits


def shifted(target_ids: Tensor, start_token_id: int) -> Tensor:
    """Return a decoder's inputs for targets, [batch, target]: its start token, and all targets but the last."""
    start = torch.full_like(target_ids[:, :1], start_token_id)
    return torch.cat([start, target_ids[:, :-1]], dim=1)
