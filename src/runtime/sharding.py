"""ZeRO: DeepSpeed's settings, and whole tensors of what is shared out over the processes. The door to deepspeed.

Everything here is called by all processes together, and gives all of them the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from functools import partial
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from src.config.schema import MixedPrecision, RunConfig, ZeroConfig, ZeroFileConfig


def deepspeed_settings(config: RunConfig, num_processes: int) -> dict[str, Any] | None:
    """Return DeepSpeed's JSON with every `auto` resolved but those by the model's width; None where it is not used."""
    zero, training = config.deepspeed, config.training
    if not isinstance(zero, ZeroConfig):
        return None
    size, accumulation = training.per_device_train_batch_size, training.gradient_accumulation_steps
    owned = {
        "train_batch_size": size * accumulation * num_processes,
        "train_micro_batch_size_per_gpu": size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": training.max_grad_norm or 0.0,
    }
    handed_on = [field.name for field in fields(ZeroConfig) if field.name != "type"]
    settings = {key: value for key in handed_on if (value := getattr(zero, key)) is not None}
    if isinstance(zero, ZeroFileConfig) and zero.aio:
        settings["aio"] = zero.aio
    settings |= {key: value for key, value in owned.items() if settings[key] == "auto"}
    for name in ("bf16", "fp16"):
        is_on = training.mixed_precision is MixedPrecision[name]
        settings[name] = settings[name] | ({"enabled": is_on} if settings[name].get("enabled") == "auto" else {})
    return settings | {"zero_allow_untested_optimizer": True, "steps_per_print": 2**31}


def use_gloo_alone() -> None:
    """Have DeepSpeed exchange over gloo on a CPU, without the kernels that it would compile at first use, half a minute
    without a word. Where the CPU lacks their instructions, the other processes would wait for good."""
    from deepspeed import ops

    vars(ops).setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False  # asking for it would run compilers


def forget_groups() -> None:
    """Leave the group of processes, also as far as DeepSpeed knows of it."""
    from deepspeed import comm

    comm.destroy_process_group()


class Whole(NamedTuple):
    """A tensor that is shared out, as what it is whole. `gather` gives it; all processes call it together."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    gather: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def whole_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Give a parameter's shape, also where this process holds a part of it."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def gathered(parameters: Iterable[nn.Parameter], *, writes: bool = False) -> AbstractContextManager[Any]:
    """Have parameters whole for the length of a block.

    Args:
        writes: whether what the first process writes into them stays; only then does it.
    """
    shared_out = [p for p in parameters if hasattr(p, "ds_id")]
    if not shared_out:
        return nullcontext()
    from deepspeed.runtime.zero import GatheredParameters

    return GatheredParameters(shared_out, modifier_rank=0 if writes else None)


def whole(parameter: nn.Parameter) -> Tensor | Whole:
    """Give a parameter as it is computed with; of one that is shared out, how it comes together."""
    if not hasattr(parameter, "ds_id"):
        return parameter.detach()

    def gather() -> Tensor:
        with gathered([parameter]):
            return parameter.detach().to("cpu", copy=True)

    return Whole(parameter.dtype, whole_shape(parameter), gather)


def bring_together(model: nn.Module, *, keeps: bool) -> None:
    """Have what is shared out whole on the CPU, one parameter after the other.

    There the model computes as a plain one: what DeepSpeed hooked into its modules is taken off them.

    Args:
        keeps: whether this process gets the whole ones; one is enough, the others only come along.
    """
    together: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or not hasattr(parameter, "ds_id"):
                continue
            if id(parameter) not in together:
                value = one.gather() if isinstance(one := whole(parameter), Whole) else one
                together[id(parameter)] = nn.Parameter(value, parameter.requires_grad) if keeps else parameter
            module._parameters[name] = together[id(parameter)]
    if together and keeps:
        for module in model.modules():
            module._forward_pre_hooks.clear()
            module._forward_hooks.clear()
        model.to("cpu")


class Sharded:
    """A model and its optimizer as DeepSpeed has shared them out."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self._announce_dicts()

    def _announce_dicts(self) -> None:
        """Have the parameters of a ParameterDict come together for the module that has it, which computes with them."""
        for module in self.engine.module.modules():
            for child in module.children():
                if isinstance(child, nn.ParameterDict):
                    for parameter in child.parameters():
                        if hasattr(parameter, "ds_id"):
                            from deepspeed.runtime.zero import register_external_parameter

                            register_external_parameter(module, parameter)

    @property
    def _zero(self) -> Any:
        """DeepSpeed's optimizer, around the plain one."""
        return self.engine.optimizer

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add a loss's gradients; after the step's last micro-batch they are exchanged."""
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss, scale_wrt_gas=False)

    def update(self) -> float:
        """Clip, update and forget the gradients; gives their norm before."""
        self.engine.step()
        return float(self.engine.get_global_grad_norm())

    def weight(self, parameter: nn.Parameter) -> Whole:
        """Give a trained parameter in float32, as it is updated."""
        from deepspeed.utils import safe_get_full_fp32_param

        return Whole(torch.float32, whole_shape(parameter), partial(safe_get_full_fp32_param, parameter))

    def put_weight(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Put a whole value in a trained parameter's place."""
        from deepspeed.utils import safe_set_full_fp32_param

        safe_set_full_fp32_param(parameter, value.to(parameter.device, torch.float32))
        with gathered([parameter], writes=True), torch.no_grad():  # what is computed with, beside what is updated
            parameter.copy_(value)

    def optimizer_state(self, names: Mapping[int, str]) -> dict[str, Tensor | Whole]:
        """Give the optimizer's tensors as `<parameter>/<key>`."""
        from deepspeed.utils import safe_get_full_optimizer_state

        self._link()
        kept: dict[str, Any] = next(iter(self._zero.optimizer.state.values()), {})
        keys = [key for key, value in kept.items() if isinstance(value, Tensor) and value.ndim]
        tensors: dict[str, Tensor | Whole] = {}
        for parameter in self._trained():
            name, shape = names[id(parameter)], whole_shape(parameter)
            for key in keys:
                gather = partial(safe_get_full_optimizer_state, parameter, key)
                tensors[f"{name}/{key}"] = Whole(kept[key].dtype, shape, gather)
            if "step" in kept:
                tensors[f"{name}/step"] = torch.tensor(float(kept["step"]))
        return tensors

    def restore_optimizer(self, names: Mapping[int, str], tensors: Mapping[str, Tensor]) -> None:
        """Put back what `optimizer_state` gave, or the same of a run that was shared out otherwise."""
        from deepspeed.utils import safe_set_full_optimizer_state

        keys = sorted({key.rpartition("/")[2] for key in tensors})
        steps = {float(value) for key, value in tensors.items() if key.endswith("/step")}
        zero = self._zero
        flats = getattr(zero, "fp32_partitioned_groups_flat", None) or zero.single_partition_of_fp32_groups
        for flat in flats:
            state = {key: torch.zeros_like(flat) for key in keys if key != "step"}
            zero.optimizer.state[flat] = state | ({"step": torch.tensor(max(steps))} if steps else {})
        self._link()
        for parameter in self._trained():
            for key in keys:
                if key != "step":
                    value = tensors[f"{names[id(parameter)]}/{key}"].to(parameter.device)
                    safe_set_full_optimizer_state(parameter, value, key)

    def _link(self) -> None:
        """Have each parameter know its part of the optimizer's state.

        DeepSpeed 0.19.8 does so after its first update of the first group, when the others have no state yet.
        """
        if hasattr(self._zero, "_hp_optimizer_states_linked"):
            self._zero._hp_optimizer_states_linked = False
            self._zero._lazy_init_hp_params_optimizer_state()

    def _trained(self) -> list[nn.Parameter]:
        return [p for p in self.engine.module.parameters() if p.requires_grad]
