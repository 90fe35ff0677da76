"""How a run's processes share what is trained: all of it in each of them (one process, or DDP), or sharded by ZeRO.

No other file depends on which it is. The door to deepspeed. What takes a sharded tensor together is called by all
processes at once, and returns the same to all of them.
"""

import os
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import fields
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from src.config.schema import MixedPrecision, RunConfig, ZeroConfig, ZeroFileConfig
from src.errors import CheckpointError
from src.runtime.launch import reserved_port

ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
CODE_BOOKS = ("qmap1", "qmap2")
"""State of bitsandbytes' 8-bit optimizers that is the same for all parameters, and never changes."""


class ShardedTensor(NamedTuple):
    """A handle of a tensor that is sharded over the processes; all of them call `gather` together."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    gather: Callable[[], Tensor]  # return the full tensor

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Return the shape of a parameter, of a sharded one that of the full tensor."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def gathered(parameters: Iterable[nn.Parameter], *, writes: bool = False) -> AbstractContextManager[Any]:
    """Return a context in which sharded parameters are full tensors; with `writes` the first process's changes stay."""
    sharded = [p for p in parameters if hasattr(p, "ds_id")]
    if not sharded:
        return nullcontext()
    from deepspeed.runtime.zero import GatheredParameters

    return GatheredParameters(sharded, modifier_rank=0 if writes else None)


def compute_weight(parameter: nn.Parameter) -> Tensor | ShardedTensor:
    """Return the parameter used in forward; for a sharded one, a handle that gathers it."""
    if not hasattr(parameter, "ds_id"):
        return parameter.detach()
    return ShardedTensor(parameter.dtype, full_shape(parameter), partial(_gathered_copy, parameter))


def _gathered_copy(parameter: nn.Parameter) -> Tensor:
    with gathered([parameter]):
        return parameter.detach().to("cpu", copy=True)


def gather_on_cpu(model: nn.Module, *, keeps: bool) -> None:
    """Make a sharded model a plain one on the CPU, gathering one parameter at a time.

    Only a process that `keeps` them gets the full tensors; one is enough, the others only take part in gathering.
    """
    full: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or not hasattr(parameter, "ds_id"):
                continue
            if id(parameter) not in full:
                value = _gathered_copy(parameter)
                full[id(parameter)] = nn.Parameter(value, parameter.requires_grad) if keeps else parameter
            module._parameters[name] = full[id(parameter)]
    if full and keeps:
        for module in model.modules():  # of DeepSpeed's hooks, which would gather what is no longer sharded
            module._forward_pre_hooks.clear()
            module._forward_hooks.clear()
        model.to("cpu")


@contextmanager
def unsharded_models() -> Iterator[None]:
    """Let transformers build and load full models in this block, in each process by itself.

    Under ZeRO-3 it would shard every model that is loaded, and all processes would have to load it together.
    """
    integration: Any = sys.modules.get("transformers.integrations.deepspeed")
    if integration is None:
        yield
        return
    reference = integration._hf_deepspeed_config_weak_ref
    integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        integration._hf_deepspeed_config_weak_ref = reference


class Replicated:
    """Each process holds the model and its optimizer in full: one process, or several under DDP.

    Args:
        model: as Accelerate wrapped it.
        optimizer: the plain one, inside what Accelerate wrapped.
    """

    has_gradients = True  # whether a process has the full gradients between `clip_grad_norm` and `update`

    def __init__(self, accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._accelerator = accelerator
        self._model = model
        self._optimizer = optimizer

    def accumulate(self, *, last: bool) -> AbstractContextManager[Any]:
        """Return a context without exchange of gradients, but for the last micro-batch of a step."""
        return nullcontext() if last else self._accelerator.no_sync(self._model)

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        """Add a loss's gradients, undivided by how many micro-batches there are.

        The processes exchange their gradients after the step's `last` one.
        """
        self._accelerator.backward(loss)

    def clip_grad_norm(self, max_norm: float | None) -> float:
        """Clip the gradients to a total norm (None: no clipping), and return the norm before, unscaled."""
        parameters = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        return float(self._accelerator.clip_grad_norm_(parameters, float("inf") if max_norm is None else max_norm))

    def update(self, optimizer: Any) -> None:
        """Update the weights and drop the gradients, by the optimizer as Accelerate wrapped it."""
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def master_weight(self, parameter: nn.Parameter) -> Tensor | ShardedTensor:
        """Return the weight that the optimizer updates, no copy; for a sharded one, a handle that gathers it."""
        return parameter.detach()

    def set_weight(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Write a full tensor into a trained parameter, and into the weight that the optimizer updates."""
        parameter.copy_(value)

    def optimizer_state(
        self, names: Mapping[int, str]
    ) -> tuple[Mapping[str, Tensor | ShardedTensor], dict[str, dict[str, Any]]]:
        """Return the optimizer's tensors as `<parameter>/<key>`, and its other values by parameter.

        `names` are those of the parameters: id(parameter) -> name.
        """
        tensors: dict[str, Tensor] = {}
        values: dict[str, dict[str, Any]] = {}
        for parameter, state in self._optimizer.state.items():
            name = names[id(parameter)]
            kept = {key: value for key, value in state.items() if key not in CODE_BOOKS}
            values[name] = {key: value for key, value in kept.items() if not isinstance(value, Tensor)}
            tensors |= {f"{name}/{key}": value for key, value in kept.items() if isinstance(value, Tensor)}
        return tensors, values

    def restore_optimizer(
        self, names: Mapping[int, str], tensors: Mapping[str, Tensor], values: Mapping[str, Mapping[str, Any]]
    ) -> None:
        """Restore what `optimizer_state` returned, here or in a run with another way of sharding.

        CheckpointError says that a tensor is not of the parameter's form.
        """
        kept: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for path, tensor in tensors.items():
            name, _, key = path.rpartition("/")
            kept[name][key] = tensor
        for group_number, group in enumerate(self._optimizer.param_groups):
            for number, parameter in enumerate(group["params"]):
                name = names[id(parameter)]
                if name not in values:
                    continue
                if hasattr(self._optimizer, "init_state"):  # bitsandbytes: tensors may be paged, or share a code book
                    self._optimizer.init_state(group, parameter, group_number, number)
                    state = self._optimizer.state[parameter]
                    for key, value in kept[name].items():
                        if key not in state or state[key].shape != value.shape:
                            raise CheckpointError(f"the optimizer's {key} of {name} is of another form")
                        state[key].copy_(value)
                    state.update(values[name])
                    continue
                stays = not (group.get("fused") or group.get("capturable"))  # else the step is where the parameter is
                state = {
                    key: value.to("cpu" if key == "step" and stays else parameter.device, copy=True)
                    for key, value in kept[name].items()
                }
                self._optimizer.state[parameter] = state | dict(values[name])


class Sharded(Replicated):
    """Weights, gradients or optimizer state are sharded over the processes by ZeRO; `model` is DeepSpeed's engine."""

    has_gradients = False

    def __init__(self, accelerator: Accelerator, model: Any, optimizer: torch.optim.Optimizer) -> None:
        from deepspeed import utils

        super().__init__(accelerator, model, optimizer)
        self._engine, self._utils = model, utils
        vars(optimizer)["_opt_called"] = True  # DeepSpeed updates by another one; torch would warn of the schedule
        self._register_dicts()

    def _register_dicts(self) -> None:
        """Have the parameters of a ParameterDict gathered for the module that has it, which computes with them."""
        from deepspeed.runtime.zero import register_external_parameter

        for module in self._engine.module.modules():
            for child in module.children():
                for parameter in child.parameters() if isinstance(child, nn.ParameterDict) else ():
                    if hasattr(parameter, "ds_id"):
                        register_external_parameter(module, parameter)

    @property
    def _zero(self) -> Any:
        """DeepSpeed's optimizer, around the plain one."""
        return self._engine.optimizer

    def accumulate(self, *, last: bool) -> AbstractContextManager[Any]:
        return nullcontext()

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss, scale_wrt_gas=False)

    def clip_grad_norm(self, max_norm: float | None) -> float:
        """Clip, update and drop the gradients, which DeepSpeed does in one; return their norm before."""
        self._engine.step()
        return float(self._engine.get_global_grad_norm())

    def update(self, optimizer: Any) -> None:
        """Do nothing: `clip_grad_norm` has updated the weights."""

    def master_weight(self, parameter: nn.Parameter) -> ShardedTensor:
        gather = partial(self._utils.safe_get_full_fp32_param, parameter)
        return ShardedTensor(torch.float32, full_shape(parameter), gather)

    def set_weight(self, parameter: nn.Parameter, value: Tensor) -> None:
        self._utils.safe_set_full_fp32_param(parameter, value.to(parameter.device, torch.float32))
        with gathered([parameter], writes=True), torch.no_grad():  # the weight used in forward is another tensor
            parameter.copy_(value)

    def optimizer_state(
        self, names: Mapping[int, str]
    ) -> tuple[Mapping[str, Tensor | ShardedTensor], dict[str, dict[str, Any]]]:
        self._link()
        kept: dict[str, Any] = next(iter(self._zero.optimizer.state.values()), {})
        keys = [key for key, value in kept.items() if isinstance(value, Tensor) and value.ndim]
        tensors: dict[str, Tensor | ShardedTensor] = {}
        for parameter in self._trained():
            name, shape = names[id(parameter)], full_shape(parameter)
            for key in keys:
                gather = partial(self._utils.safe_get_full_optimizer_state, parameter, key)
                tensors[f"{name}/{key}"] = ShardedTensor(kept[key].dtype, shape, gather)
            if "step" in kept:
                tensors[f"{name}/step"] = torch.tensor(float(kept["step"]))
        return tensors, {name: {} for name in names.values()}

    def restore_optimizer(
        self, names: Mapping[int, str], tensors: Mapping[str, Tensor], values: Mapping[str, Mapping[str, Any]]
    ) -> None:
        keys = sorted({key.rpartition("/")[2] for key in tensors} - {"step"})
        steps = {float(value) for key, value in tensors.items() if key.endswith("/step")}
        zero = self._zero
        flats = getattr(zero, "fp32_partitioned_groups_flat", None) or zero.single_partition_of_fp32_groups
        for flat in flats:
            state = {key: torch.zeros_like(flat) for key in keys}
            zero.optimizer.state[flat] = state | ({"step": torch.tensor(max(steps))} if steps else {})
        self._link()
        for parameter in self._trained():
            for key in keys:
                value = tensors[f"{names[id(parameter)]}/{key}"].to(parameter.device)
                self._utils.safe_set_full_optimizer_state(parameter, value, key)

    def _link(self) -> None:
        """Have each parameter know its shard of the optimizer's state.

        DeepSpeed 0.19.8 does so after its first update of the first group, when the others have no state yet.
        """
        if hasattr(self._zero, "_hp_optimizer_states_linked"):
            self._zero._hp_optimizer_states_linked = False
            self._zero._lazy_init_hp_params_optimizer_state()

    def _trained(self) -> list[nn.Parameter]:
        return [p for p in self._engine.module.parameters() if p.requires_grad]


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
    requested = {field.name: getattr(zero, field.name) for field in fields(ZeroConfig) if field.name != "type"}
    settings = {key: value for key, value in requested.items() if value is not None}
    if isinstance(zero, ZeroFileConfig) and zero.aio:
        settings["aio"] = zero.aio
    settings |= {key: value for key, value in owned.items() if settings[key] == "auto"}
    for name in ("bf16", "fp16"):
        is_on = training.mixed_precision is MixedPrecision[name]
        settings[name] = settings[name] | ({"enabled": is_on} if settings[name].get("enabled") == "auto" else {})
    return settings | {"zero_allow_untested_optimizer": True, "steps_per_print": 2**31}


@contextmanager
def zero_environment(*, on_cpu: bool, alone: bool) -> Iterator[None]:
    """Set what DeepSpeed and Accelerate read from the environment, for the length of a block.

    `alone` says that this is the only process, and nobody has started it as one of several.
    """
    before = dict(os.environ)
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    # DeepSpeed 0.19 calls what torch 2.13 has other names for
    warnings.filterwarnings("ignore", ".torch.distributed.* is deprecated", FutureWarning)
    # it compiles at first use, with the ninja that it was installed with
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", ""), str(Path(sys.executable).parent)])
    os.environ.setdefault("DS_ACCELERATOR", "cpu" if on_cpu else "cuda")
    if on_cpu:
        _use_gloo_alone()
    try:
        with reserved_port() if alone else nullcontext() as port:
            if port is not None:  # one process is a group of its own
                os.environ.update(ALONE, MASTER_PORT=str(port))
            yield
    finally:  # no more than it has to be: threads of the libraries may read it
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before.items() - os.environ.items())


def _use_gloo_alone() -> None:
    """Have DeepSpeed exchange over gloo on a CPU, without the kernels that it would compile at first use, half a minute
    without a word. Where the CPU lacks their instructions, the other processes would wait for good."""
    from deepspeed import ops

    vars(ops).setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False  # asking for it would run compilers


def forget_groups() -> None:
    """Leave the group of processes, also as far as DeepSpeed knows of it."""
    from deepspeed import comm

    comm.destroy_process_group()
