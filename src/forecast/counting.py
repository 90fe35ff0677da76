"""What a computation holds and costs, counted by doing it on fake tensors: real code, shapes and types, no memory.

The model's own forward and backward run under torch's FakeTensorMode, so any model that transformers can build is
counted as it is, adapters and gradient checkpointing included. What can't run without values (experts that are looped
over, data that decides a shape) can't be counted.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from src.config.schema import LossConfig
from src.errors import one_line
from src.forecast.quantised import is_quantised, put_fake_weight
from src.model.masks import taken_for_single_rows
from src.training.head import ScoredModel

aten = torch.ops.aten


def _attention_flops(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(q.shape, k.shape, v.shape)


def _attention_backward_flops(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad.shape, q.shape, k.shape, v.shape)


FLOPS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}
"""Floating-point operations of matrix products and attention, by operator: torch's own formulas, and two that it lacks,
of attention on a CPU."""


class MicroBatchShape(NamedTuple):
    """The sizes of a micro-batch."""

    batch: int
    seq: int
    """Tokens of its longest row, to which the others are padded."""
    num_supervised: int
    """Positions that are scored."""
    target_seq: int | None = None
    """Of an encoder-decoder's targets; None for a causal model."""
    is_packed: bool = False
    """Whether several rows share a sequence, so that attention needs a mask."""
    has_padding: bool = False
    """Whether an encoder-decoder's input is padded, so that attention needs a mask."""

    @property
    def num_tokens(self) -> int:
        """Positions that are computed, padding included."""
        return self.batch * (self.seq + (self.target_seq or 0))


@dataclass(frozen=True)
class TrainingCount:
    """What forward and backward of a micro-batch hold, beside weights and optimizer state; in bytes."""

    saved_bytes: int
    """What is kept for backward when the forward is over, autocast's copies of weights included."""
    peak_bytes: int
    """The most that is held at once."""
    peak_gradient_bytes: int
    """Of peak_bytes: gradients of parameters."""
    flops: int
    """Multiplications and additions of matrix products and attention, forward and backward."""
    has_gradients: bool = True
    """Whether gradients of parameters are among them."""

    def without_gradients(self) -> TrainingCount:
        """Return what is held beside gradients, where those were all there at the worst moment, as from the second
        micro-batch on.
        """
        peak = self.peak_bytes - self.peak_gradient_bytes
        return replace(self, peak_bytes=peak, peak_gradient_bytes=0, has_gradients=False)


class ForwardCount(NamedTuple):
    """What a computation without gradients holds beside weights, in bytes, and its operations."""

    peak_bytes: int
    flops: int


class UncountableError(Exception):
    """A model can't be computed without values; says why."""


class ModelCounter:
    """A model on fake tensors, which can be computed with."""

    def __init__(self, scored: ScoredModel, mode: FakeTensorMode, device: torch.device, autocast: torch.dtype | None):
        self._scored = scored
        self._mode = mode
        self._device = device
        self._autocast = autocast

    @torch.no_grad()
    def probe_head(self) -> None:
        """See whether logits are the head's result for the last hidden states, as ScoredModel.probe_head does; of
        tensors without values by whether they are the same ones.
        """
        scored, model, seen = self._scored, self._scored.model, dict[str, Any]()
        scored.uses_full_logits = True
        head, inner = model.get_output_embeddings(), model.base_model
        if head is None or inner is model:
            return
        hooks = [
            head.register_forward_hook(lambda _, given, result: seen.update(fed=given[0], result=result)),
            inner.register_forward_hook(lambda _, given, result: seen.update(hidden=result)),
        ]
        with self._computing():
            inputs = {"input_ids": self._ids(1, 2)}
            if model.config.is_encoder_decoder:
                inputs["decoder_input_ids"] = self._ids(1, 2)
            seen["logits"] = model(**inputs, use_cache=False).logits
        for hook in hooks:
            hook.remove()
        hidden = getattr(seen.get("hidden"), "last_hidden_state", None)
        if hidden is not None and "fed" in seen:
            is_head = _is_same(seen["fed"], hidden) and _is_same(seen["logits"], seen["result"])
            scored.uses_full_logits = not is_head

    def count_training(self, shape: MicroBatchShape, num_micro_batches: int = 1) -> TrainingCount:
        """Count forward and backward.

        Args:
            num_micro_batches: of a step; from the second one on, gradients are there already.
        """
        self._scored.train()
        with self._computing(num_supervised=shape.num_supervised, is_packed=shape.is_packed) as live:
            inputs = self._inputs(shape)
            num_forwards = min(2, num_micro_batches)
            for _ in range(num_forwards):
                before = live.alive()
                with self._autocasting():
                    objective = self._scored(**inputs).objective
                saved = live.alive() - before
                saved_bytes = live.bytes_of(saved)
                objective.backward()
                del objective
        gradients = {live.number_of(p.grad) for p in self._scored.parameters() if p.grad is not None}
        at_peak = live.at_peak()
        for parameter in self._scored.parameters():
            parameter.grad = None
        return TrainingCount(
            saved_bytes=saved_bytes,
            peak_bytes=live.peak,
            peak_gradient_bytes=sum(size for number, size in at_peak.items() if number in gradients),
            flops=live.flops // num_forwards,
        )

    @torch.no_grad()
    def count_evaluation(self, shape: MicroBatchShape) -> ForwardCount:
        """Count the losses of a batch."""
        self._scored.eval()
        with (
            self._computing(num_supervised=shape.num_supervised, is_packed=shape.is_packed) as live,
            self._autocasting(),
        ):
            self._scored(**self._inputs(shape))
        return ForwardCount(live.peak, live.flops)

    @torch.no_grad()
    def count_generation(self, batch: int, prompt: int, num_new: int) -> ForwardCount:
        """Count a batch of completions, all as long as they may be: the prompt, then token by token beside the keys and
        values of all tokens before.

        Args:
            batch: rows, times beams.
            prompt: tokens of the longest prompt; of an encoder-decoder's input.
        """
        self._scored.eval()
        with self._computing() as live, self._autocasting():
            self._read(batch, prompt, None)
            peak, prefill = live.peak, live.flops
            given, cache = self._read(batch, prompt, num_new - 1)
            live.restart_peak()
            before = live.flops
            self._scored.model(**given, past_key_values=cache, use_cache=True)
            step = live.flops - before
        return ForwardCount(max(peak, live.peak), prefill + num_new * step)

    def _read(self, batch: int, prompt: int, num_written: int | None) -> tuple[dict[str, Any], Any]:
        """Compute a prompt and what was written after it at once.

        Args:
            num_written: tokens written so far; None: before the first one.
        Returns:
            What the next token is computed from, the cache of keys and values apart.
        """
        model, written = self._scored.model, num_written or 0
        if model.config.is_encoder_decoder:
            real = self._ids(batch, prompt)
            states = model.get_encoder()(input_ids=self._ids(batch, prompt), attention_mask=real)
            given: dict[str, Any] = {"encoder_outputs": states, "attention_mask": real}
            cache = model(**given, decoder_input_ids=self._ids(batch, 1 + written), use_cache=True).past_key_values
            return given | {"decoder_input_ids": self._ids(batch, 1)}, cache
        seq = prompt + written
        cache = model(
            input_ids=self._ids(batch, seq), attention_mask=self._ids(batch, seq), logits_to_keep=1, use_cache=True
        ).past_key_values
        return {
            "input_ids": self._ids(batch, 1),
            "attention_mask": self._ids(batch, seq + 1),
            "logits_to_keep": 1,
        }, cache

    @contextmanager
    def _computing(self, *, num_supervised: int = 0, is_packed: bool = False) -> Iterator[LiveTensors]:
        held = [*self._scored.parameters(), *self._scored.buffers()]
        live = LiveTensors(held, num_supervised)
        with ExitStack() as stack:
            if not is_packed:
                stack.enter_context(taken_for_single_rows())
            stack.enter_context(self._mode)
            stack.enter_context(live)
            try:
                yield live
            except Exception as error:  # as many as there are models
                name = type(self._scored.model).__name__
                raise UncountableError(f"{name} can't be computed without values: {one_line(error)}") from error

    @contextmanager
    def _autocasting(self) -> Iterator[None]:
        with torch.autocast(self._device.type, self._autocast, enabled=self._autocast is not None):
            yield

    def _ids(self, batch: int, seq: int) -> Tensor:
        return torch.ones(batch, seq, dtype=torch.long, device=self._device)

    def _inputs(self, shape: MicroBatchShape) -> dict[str, Tensor]:
        inputs = {
            "input_ids": self._ids(shape.batch, shape.seq),
            "labels": self._ids(shape.batch, shape.target_seq or shape.seq),
        }
        if shape.target_seq is not None:
            inputs["target_ids"] = self._ids(shape.batch, shape.target_seq)
        if shape.has_padding:
            inputs["attention_mask"] = self._ids(shape.batch, shape.seq)
        if shape.is_packed:
            inputs["position_ids"] = self._ids(shape.batch, shape.seq)
        return inputs


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
    scored = ScoredModel(model, loss)
    counter = ModelCounter(scored, mode, device, autocast)
    counter.probe_head()
    yield counter


def _is_same(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage()._cdata == other.untyped_storage()._cdata


class _Kept:
    """A tensor that autograd keeps, for as long as it keeps it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def _keep_in(living: WeakSet[_Kept]) -> Callable[[Tensor], _Kept]:
    def keep(tensor: Tensor) -> _Kept:
        kept = _Kept(tensor)
        living.add(kept)
        return kept

    return keep


def _given_back(kept: _Kept) -> Tensor:
    return kept.tensor


def measure_saved_bytes(compute: Callable[[], object], exclude: Iterable[Tensor] = ()) -> int:
    """Run a forward and return the bytes that autograd keeps of it for backward, each storage counted once and whole.

    Autocast's copies of the weights are among them. Of what `torch.utils.checkpoint` computes again it sees what is
    kept to do so, not what comes then; of bitsandbytes' 8-bit layers it does not see the inputs that they keep.

    Args:
        compute: a forward without its backward; its result is held until it is counted.
        exclude: tensors that are there anyway, such as the model's parameters.
    """
    there = {tensor.untyped_storage().data_ptr() for tensor in exclude}
    living: WeakSet[_Kept] = WeakSet()
    with torch.autograd.graph.saved_tensors_hooks(_keep_in(living), _given_back):
        result = compute()
    storages = {kept.tensor.untyped_storage().data_ptr(): kept.tensor.untyped_storage() for kept in living}
    del result
    return sum(storage.nbytes() for pointer, storage in storages.items() if pointer not in there)


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
        if is_quantised(module):
            put_fake_weight(module, device)
        places: tuple[dict[str, Any], ...] = (module._parameters, module._buffers, vars(module))
        for tensors in places:
            for name, tensor in list(tensors.items()):
                if isinstance(tensor, Tensor) and not isinstance(tensor, FakeTensor):
                    tensors[name] = empty_like(tensor)


def _grouped_product(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Multiply experts' matrices; torch's rule for shapes takes bfloat16 only, though a CPU multiplies float32 too."""
    dtype = args[0].dtype
    halves = [
        _with_dtype(one, torch.bfloat16) if isinstance(one, Tensor) and one.is_floating_point() else one for one in args
    ]
    return _with_dtype(func(*halves, **{name: one for name, one in kwargs.items() if name != "out_dtype"}), dtype)


def _with_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype, device=tensor.device)


class LiveTensors(TorchDispatchMode):
    """Follows which storages are alive, how many bytes at most at once, and counts floating-point operations."""

    def __init__(self, there: Iterable[Tensor], num_supervised: int) -> None:
        """Begin.

        Args:
            there: tensors that are not counted.
            num_supervised: how many positions a mask picks, since its values are unknown.
        """
        super().__init__()
        self._not_counted = {tensor.untyped_storage()._cdata for tensor in there}
        self._num_supervised = num_supervised
        self._numbers: dict[int, int] = {}  # of storages that are alive, by address
        self._alive: dict[int, int] = {}  # bytes, by number
        self._bytes: list[int] = []  # of all that ever were
        self._total = 0
        self._at_peak: dict[int, int] | None = None
        self.peak = 0
        self.flops = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is aten.index.Tensor:
            args = (args[0], self._positions(args[1]), *args[2:])
        kwargs = kwargs or {}
        result = _grouped_product(func, args, kwargs) if func is aten._grouped_mm.default else func(*args, **kwargs)
        if (formula := FLOPS.get(func._overloadpacket)) is not None:
            self.flops += formula(*args, **kwargs, out_val=result)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._see(tensor)
        return result

    def _positions(self, indices: list[Tensor | None]) -> list[Tensor | None]:
        """Turn masks into positions, as many as are supervised."""
        given: list[Tensor | None] = []
        for index in indices:
            is_mask = index is not None and index.dtype is torch.bool
            if is_mask and index is not None:
                given += [torch.empty(self._num_supervised, dtype=torch.long, device=index.device)] * index.ndim
            else:
                given.append(index)
        return given

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._not_counted or address in self._numbers:
            return
        number = len(self._bytes)
        self._bytes.append(storage.nbytes())
        self._numbers[address], self._alive[number] = number, storage.nbytes()
        self._total += storage.nbytes()
        if self._total > self.peak:
            self.peak, self._at_peak = self._total, None
        weakref.finalize(storage, self._forget, address)

    def _forget(self, address: int) -> None:
        self._note_peak()
        self._total -= self._alive.pop(self._numbers.pop(address))

    def _note_peak(self) -> None:
        if self._at_peak is None and self._total == self.peak:
            self._at_peak = dict(self._alive)

    def restart_peak(self) -> None:
        """Look for the most from here on."""
        self.peak, self._at_peak = self._total, None

    def at_peak(self) -> dict[int, int]:
        """Return number and bytes of each storage that was alive at the worst moment."""
        self._note_peak()
        return self._at_peak or {}

    def alive(self) -> set[int]:
        """Return the numbers of the storages that are alive."""
        return set(self._alive)

    def number_of(self, tensor: Tensor) -> int | None:
        """Return the number of a tensor's storage; None where it is not counted."""
        return self._numbers.get(tensor.untyped_storage()._cdata)

    def bytes_of(self, numbers: Iterable[int]) -> int:
        """Return the bytes of storages together."""
        return sum(self._bytes[number] for number in numbers)
