"""What a computation holds and costs, counted by doing it on fake tensors: real code, shapes and types, no memory.

The model's own forward and backward run under torch's FakeTensorMode, so any model that transformers can build is
counted as it is, adapters and gradient checkpointing included. What can't run without values (experts that are looped
over, data that decides a shape) can't be counted.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from src.config.schema import LossConfig
from src.errors import one_line
from src.forecast.head_steps import HeadSteps
from src.forecast.live_tensors import LiveTensors
from src.forecast.parameters import NESTED_BLOCK, SCALE_BLOCK
from src.model.build import no_packing_detection
from src.training.head import ModelWithLoss


class MicroBatchShape(NamedTuple):
    """The sizes of a micro-batch."""

    batch: int
    seq: int  # tokens of its longest row, to which the others are padded
    num_supervised: int  # positions that are scored
    target_seq: int | None = None  # the longest target of an encoder-decoder; None for a causal model
    is_packed: bool = False  # whether several rows share a sequence, so that attention needs a mask
    has_padding: bool = False  # whether an encoder-decoder's input is padded, so that attention needs a mask

    @property
    def num_tokens(self) -> int:
        """Positions that are computed, padding included."""
        return self.batch * (self.seq + (self.target_seq or 0))


@dataclass(frozen=True)
class TrainingCount:
    """What forward and backward of a micro-batch hold, besides weights and optimizer state; in bytes."""

    saved_bytes: int  # what is kept for backward when the forward is over, autocast's copies of weights included
    peak_bytes: int  # the most that is held at once
    peak_gradient_bytes: int  # bytes of peak_bytes that are gradients of parameters
    flops: int  # multiplications and additions of matrix products and attention, forward and backward


class ForwardCount(NamedTuple):
    """What a computation without gradients holds besides weights, in bytes, and its operations."""

    peak_bytes: int
    flops: int


NO_LABELS = MicroBatchShape(0, 0, num_supervised=0)


class UncountableError(Exception):
    """A model can't be computed without values; says why."""


@dataclass(frozen=True)
class ModelCounter:
    """A model on fake tensors, which can be computed with."""

    loss_model: ModelWithLoss
    mode: FakeTensorMode
    device: torch.device
    autocast: torch.dtype | None

    @torch.no_grad()
    def probe_head(self) -> None:
        """Find out how logits follow from the last hidden states, as ModelWithLoss.probe_head does; without values by
        what is done to them before and after the head.
        """
        model, steps = self.loss_model.model, HeadSteps()
        self.loss_model.form = None
        head = model.get_output_embeddings()
        inner = model.get_decoder() if model.base_model is model else model.base_model
        if head is None or inner is None or inner is model:
            return
        hooks = [
            inner.register_forward_hook(lambda *_: steps.begin()),
            head.register_forward_pre_hook(lambda *_: steps.pause()),
            head.register_forward_hook(lambda *_: steps.resume()),
        ]
        with self._computing(), steps:
            inputs = {"input_ids": self._ids(1, 2)}
            if model.config.is_encoder_decoder:
                inputs["decoder_input_ids"] = self._ids(1, 2)
            model(**inputs, use_cache=False)
        for hook in hooks:
            hook.remove()
        self.loss_model.form = steps.form(self.loss_model.num_logits, self.device)

    def count_training(self, shape: MicroBatchShape, num_micro_batches: int = 1) -> TrainingCount:
        """Count forward and backward of a micro-batch; from the second one of a step on, gradients exist already."""
        self.loss_model.train()
        with self._computing(shape) as live:
            inputs = self._inputs(shape)
            num_forwards = min(2, num_micro_batches)
            for _ in range(num_forwards):
                before = live.alive()
                with self._autocasting():
                    objective = self.loss_model(**inputs).objective
                saved_bytes = sum(size for number, size in live.alive().items() if number not in before)
                objective.backward()
                del objective
        gradients = {live.number_of(p.grad) for p in self.loss_model.parameters() if p.grad is not None}
        gradient_bytes = sum(size for number, size in live.at_peak().items() if number in gradients)
        self.loss_model.zero_grad()
        return TrainingCount(saved_bytes, live.peak, gradient_bytes, live.flops // num_forwards)

    @torch.no_grad()
    def count_evaluation(self, shape: MicroBatchShape) -> ForwardCount:
        """Count the losses of a batch."""
        self.loss_model.eval()
        with self._computing(shape) as live, self._autocasting():
            self.loss_model(**self._inputs(shape))
        return ForwardCount(live.peak, live.flops)

    @torch.no_grad()
    def count_generation(self, batch: int, prompt: int, num_new: int) -> ForwardCount:
        """Count a batch of completions (rows times beams), all as long as they may be: the longest prompt, of an
        encoder-decoder its input, then token by token with the keys and values of all tokens before.
        """
        self.loss_model.eval()
        with self._computing() as live, self._autocasting():
            inputs, cache = self._prefill(batch, prompt)
            peak, prefill = live.peak, live.flops
            if num_new > 1:
                _lengthen(cache, num_new - 1)
            live.restart_peak()
            before = live.flops
            if "encoder_outputs" not in inputs:
                inputs["attention_mask"] = self._ids(batch, prompt + num_new)
            self.loss_model.model(**inputs, past_key_values=cache, use_cache=True)
            step = live.flops - before
        return ForwardCount(max(peak, live.peak), prefill + num_new * step)

    def _prefill(self, batch: int, prompt: int) -> tuple[dict[str, Any], Any]:
        """Compute a prompt; return the inputs of the token after it, and the cache of keys and values."""
        model, real = self.loss_model.model, self._ids(batch, prompt)
        inputs: dict[str, Any] = {"attention_mask": real}
        if model.config.is_encoder_decoder:
            inputs["encoder_outputs"] = model.get_encoder()(input_ids=self._ids(batch, prompt), attention_mask=real)
            inputs["decoder_input_ids"] = self._ids(batch, 1)
            return inputs, model(**inputs, use_cache=True).past_key_values
        ids = self._ids(batch, prompt)
        cache = model(input_ids=ids, attention_mask=real, logits_to_keep=1, use_cache=True).past_key_values
        return inputs | {"input_ids": self._ids(batch, 1), "logits_to_keep": 1}, cache

    @contextmanager
    def _computing(self, shape: MicroBatchShape = NO_LABELS) -> Iterator[LiveTensors]:
        live = LiveTensors([*self.loss_model.parameters(), *self.loss_model.buffers()])
        with nullcontext() if shape.is_packed else no_packing_detection(), self.mode, live:
            try:
                yield live
            except Exception as error:  # each model fails in its own way
                name = type(self.loss_model.model).__name__
                raise UncountableError(f"{name} can't be computed without values: {one_line(error)}") from error

    def _autocasting(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None)

    def _ids(self, batch: int, seq: int) -> Tensor:
        return torch.ones(batch, seq, dtype=torch.long, device=self.device)

    def _inputs(self, shape: MicroBatchShape) -> dict[str, Tensor]:
        lengths = {
            "input_ids": shape.seq,
            "labels": shape.target_seq or shape.seq,
            "target_ids": shape.target_seq,
            "attention_mask": shape.seq if shape.has_padding else None,
            "position_ids": shape.seq if shape.is_packed else None,
        }
        inputs = {name: self._ids(shape.batch, seq) for name, seq in lengths.items() if seq is not None}
        return inputs | {"label_positions": self._ids(1, shape.num_supervised)[0]}


@contextmanager
def counted(
    model: Any, loss: LossConfig, device: torch.device, autocast: torch.dtype | None = None
) -> Iterator[ModelCounter]:
    """Yield a counter of a model.

    Args:
        model: on the meta device; its tensors are fake ones from then on, good for nothing else.
        device: where they lie; kernels keep other things on a GPU than on a CPU.
        autocast: the type that mixed precision computes in; None: without.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        _put_on(model, device)
    counter = ModelCounter(ModelWithLoss(model, loss), mode, device, autocast)
    counter.probe_head()
    yield counter


def _lengthen(cache: Any, num: int) -> None:
    """Append keys and values of some tokens to every layer of a cache; of an encoder-decoder's, to the decoder's."""
    cache = getattr(cache, "self_attention_cache", cache)
    for i, layer in enumerate(cache.layers):
        if isinstance(getattr(layer, "keys", None), Tensor):
            new = (one.new_empty(*one.shape[:2], num, one.shape[3]) for one in (layer.keys, layer.values))
            cache.update(*new, i)


@dataclass(eq=False)
class _Kept:
    """A tensor that autograd keeps, for as long as it keeps it."""

    tensor: Tensor


def measure_saved_bytes(compute: Callable[[], object], exclude: Iterable[Tensor] = ()) -> int:
    """Run a forward and return the bytes that autograd keeps of it for backward, each storage counted once and whole.

    Autocast's copies of the weights are among them. Of what `torch.utils.checkpoint` computes again it sees what is
    kept to do so, not what comes then; of bitsandbytes' 8-bit layers it does not see the inputs that they keep.

    The result of the forward, without its backward, is held until it is counted; `exclude` are tensors that exist
    anyway, such as the model's parameters.
    """
    excluded = {tensor.untyped_storage().data_ptr() for tensor in exclude}
    living = WeakSet[_Kept]()

    def keep(tensor: Tensor) -> _Kept:
        living.add(kept := _Kept(tensor))
        return kept

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept.tensor):
        result = compute()
    storages = {kept.tensor.untyped_storage().data_ptr(): kept.tensor.untyped_storage() for kept in living}
    del result
    return sum(storage.nbytes() for pointer, storage in storages.items() if pointer not in excluded)


def _put_on(model: nn.Module, device: torch.device) -> None:
    """Replace every tensor of a model by an empty one on a device; tied ones stay tied."""
    replaced: dict[int, Tensor] = {}

    def empty_like(tensor: Tensor) -> Tensor:
        if id(tensor) not in replaced:
            empty = torch.empty_like(tensor, device=device, requires_grad=False)
            is_parameter = isinstance(tensor, nn.Parameter)
            replaced[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
        return replaced[id(tensor)]

    for module in model.modules():
        if type(module).__name__ in ("Linear4bit", "Linear8bitLt") and hasattr(module, "in_features"):
            _put_quantised_weight(module, device)
        places: tuple[dict[str, Any], ...] = (module._parameters, module._buffers, vars(module))
        for tensors in places:
            for name, tensor in list(tensors.items()):
                if isinstance(tensor, Tensor) and not isinstance(tensor, FakeTensor):
                    tensors[name] = empty_like(tensor)


def _put_quantised_weight(layer: Any, device: torch.device) -> None:
    """Put an empty weight into a layer of bitsandbytes, as it is when the layer is on its device."""
    rows, columns = layer.out_features, layer.in_features
    if type(layer).__name__ == "Linear4bit":
        packed = torch.empty(math.ceil(rows * columns / 2), 1, dtype=torch.uint8, device=device)
        weight: Any = nn.Parameter(packed, requires_grad=False)
        weight.quant_state = _state_of_4_bits(layer, torch.Size([rows, columns]), device)
        layer.compute_type_is_set = True
    else:
        weight = nn.Parameter(torch.empty(rows, columns, dtype=torch.int8, device=device), requires_grad=False)
        weight.CB = weight.SCB = None
        layer.state.CB, layer.state.SCB = weight.data, torch.empty(rows, device=device)
        layer.state.has_fp16_weights = False
        layer.state.threshold = 0.0  # which columns are outliers is a matter of values
    layer._parameters["weight"] = weight


def _state_of_4_bits(layer: Any, shape: torch.Size, device: torch.device) -> Any:
    from bitsandbytes.functional import QuantState

    def empty(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(sizes, dtype=dtype, device=device)

    is_nested = layer.weight.compress_statistics
    blocks = math.ceil(shape.numel() / SCALE_BLOCK)
    nested = QuantState(
        absmax=empty(math.ceil(blocks / NESTED_BLOCK)), code=empty(256), blocksize=NESTED_BLOCK, dtype=torch.float32
    )
    return QuantState(
        absmax=empty(blocks, dtype=torch.uint8 if is_nested else torch.float32),
        shape=shape,
        code=empty(16),
        blocksize=SCALE_BLOCK,
        quant_type=layer.weight.quant_type,
        dtype=torch.float32,
        offset=empty() if is_nested else None,
        state2=nested if is_nested else None,
    )
