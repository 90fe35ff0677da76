"""A DeepSpeed JSON of the user's (deepspeed=file), read into the section that the other options fill.

It is read once, when a configuration is composed: the frozen one has what the file said. What it leaves out is what
conf/deepspeed/_zero.yaml says; keys of the command line come on top.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from src.config.files import unusable
from src.config.options import CONF, OptionFileError, read_option
from src.config.problems import Problem
from src.config.schema import ZeroFileConfig
from src.errors import visible
from src.records import read_bytes
from src.util import merged, nearest

KEY = "deepspeed.config_file"
MOST_BYTES = 2**20
"""The largest file that is taken for a configuration."""
GATHER = "stage3_gather_16bit_weights_on_model_save"
OWN_KEYS = ("type", "config_file", "sha256")
"""Keys of the section that are Towline's, and no key of DeepSpeed's."""
FORMER_NAMES: dict[str, str] = {"bfloat16": "bf16"}
"""Old names that DeepSpeed still takes -> the names of today."""
BLOCKS = {
    "activation_checkpointing": "model.gradient_checkpointing",
    "amp": "training.mixed_precision",
    "torch_autocast": "training.mixed_precision",
    **dict.fromkeys(("tensorboard", "wandb", "csv_monitor", "comet"), "tracking"),
    **dict.fromkeys(("checkpoint", "nebula"), "checkpoint"),
    **dict.fromkeys(
        (
            *("autotuning", "comms_logger", "compile", "compression_training", "curriculum_learning", "data_types"),
            *("data_efficiency", "eigenvalue", "elasticity", "flops_profiler", "hybrid_engine", "pipeline"),
            *("progressive_layer_drop", "sparse_attention", "tensor_parallel", "weight_quantization"),
        ),
        "",
    ),
}
"""Blocks of DeepSpeed's that are not handed on -> the section that has their subject. Switched off they may stay."""
FIXED: dict[str, tuple[Any, ...]] = {
    "prescale_gradients": (False,),
    "gradient_predivide_factor": (1, 1.0),
    "gradient_allreduce_op": ("mean",),
    "sparse_gradients": (False,),
    "disable_allgather": (False,),
    "dump_state": (False,),
    "memory_breakdown": (False,),
    "dataloader_drop_last": (False,),
    "zero_allow_untested_optimizer": (True,),
    "zero_force_ds_cpu_optimizer": (True,),
}
"""Keys of DeepSpeed's that have one value here -> that value."""
_STRING = r'"(?:[^"\\]|\\.)*"'
_TOKEN = re.compile(rf"{_STRING}|[{{}}\[\]:]")
_CONSTANT = re.compile(rf"{_STRING}|-?Infinity|NaN")
UNHEARD = ("steps_per_print", "log_level", "$schema", "comment", "_comment")
"""Keys that change nothing that is computed: Towline prints by itself, as accelerate does."""


def read_deepspeed_file(section: Any, stored: Any) -> list[Problem]:
    """Merge the JSON file into the section as it is used and as it is stored, unless that was done before.

    Returns what is wrong with the file.
    """
    if not isinstance(section, dict) or section.get("type") != "file" or section.get("sha256") is not None:
        return []
    assert isinstance(stored, dict)
    file = section.get("config_file")
    if not isinstance(file, str) or not file:
        return [Problem(KEY, "needs a value: the JSON file of DeepSpeed's that deepspeed=file reads", has_value=False)]
    try:
        content, digest = _read(file)
        defaults = read_option(CONF / "deepspeed" / "_zero.yaml")
    except (_Unreadable, OptionFileError) as reason:
        return [Problem(KEY, str(reason), file)]
    problems = list(_unused(content, file))
    for one in (section, stored):
        given = {key: value for key, value in one.items() if key not in OWN_KEYS}
        one |= merged(defaults, content, given, {"type": "file", "sha256": digest})
        _fill_defaults(one["zero_optimization"])
    return problems


def file_that_set(key: str, section: Any) -> str:
    """Return the file that gave a key of the section its value, with the line where it says so; '' where none did."""
    name = key.removeprefix("deepspeed.")
    if not isinstance(section, dict) or section.get("type") != "file" or section.get("sha256") is None:
        return ""
    if name == key or name in OWN_KEYS:
        return ""
    file, path = str(section["config_file"]), tuple(name.split("."))
    with suppress(OSError, ValueError):  # it was read a moment ago
        text = Path(file).read_text(encoding="utf-8-sig")
        begin = next((begin for found, begin in _keys(text) if found == path), None)
        if begin is not None:
            return f"{visible(file, is_line=True)}, line {text.count(chr(10), 0, begin) + 1}"
    return visible(file, is_line=True)


class _Unreadable(ValueError):
    """A file holds no configuration of DeepSpeed's, for the reason given."""


def _read(file: str) -> tuple[dict[str, Any], str]:
    """Return a file's content, and its SHA-256; _Unreadable names the file, line and column as far as known."""
    if reason := unusable(file):
        raise _Unreadable(reason)
    place = visible(file, is_line=True)
    try:
        content = read_bytes(Path(file), MOST_BYTES)
    except FileNotFoundError as error:
        raise _Unreadable(f"no such file (looked in {Path.cwd()})") from error
    except ValueError as error:
        raise _Unreadable(f"{place}: {error}; is this a configuration of DeepSpeed's?") from error

    def at(position: int) -> str:
        lines = text[:position].split("\n")
        return f"{place}, line {len(lines)}, column {len(lines[-1]) + 1}"

    text = ""
    try:
        text = content.decode("utf-8-sig")
        found = json.loads(text)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise _Unreadable(f"{place}, line {line}: not UTF-8 (byte {error.start + 1} of the file)") from error
    except json.JSONDecodeError as error:
        raise _Unreadable(f"{at(error.pos)}: not JSON: {error.msg.removesuffix(' at')}") from error
    except RecursionError as error:
        raise _Unreadable(f"{place}: nested too deep") from error
    except ValueError as error:  # Python's limit on digits
        raise _Unreadable(f"{place}: a whole number with too many digits") from error
    if constant := next((one for one in _CONSTANT.finditer(text) if one[0][0] != '"'), None):
        raise _Unreadable(f"{at(constant.start())}: not JSON: {constant[0]} is no number")
    if not isinstance(found, dict):
        raise _Unreadable(f"{at(0)}: an object is needed: {{…}}")
    seen = set[tuple[str, ...]]()
    for path, begin in _keys(text):
        if path in seen:
            raise _Unreadable(f"{at(begin)}: the key {path[-1]} a second time")
        seen.add(path)
    for former in FORMER_NAMES.keys() & found.keys():
        found[FORMER_NAMES[former]] = found.pop(former)
    return found, hashlib.sha256(content).hexdigest()


def _keys(text: str) -> Iterator[tuple[tuple[str, ...], int]]:
    """Yield the path of each key of a JSON text, and where it begins."""
    path, last, begin = list[str](), "", 0
    for token in _TOKEN.finditer(text):
        if token.group() == ":":
            path[-1] = json.loads(last)
            yield tuple(path), begin
        elif token.group() in "{[":
            path.append("")
        elif token.group() in "}]":
            path.pop()
        else:
            last, begin = token.group(), token.start()


def _unused(content: dict[str, Any], file: str) -> Iterator[Problem]:
    """Take out of a file's content what is not handed on; yield what of it asks for something that is not done."""
    for key in [key for key in content if key in UNHEARD]:
        del content[key]
    for key in OWN_KEYS:
        if key in content:
            yield Problem(f"deepspeed.{key}", "not a key of DeepSpeed's", content.pop(key), where=file)
    for key, allowed in FIXED.items():
        if key in content and (value := content.pop(key)) not in allowed:
            yield Problem(f"deepspeed.{key}", f"is {json.dumps(allowed[0])} here: leave it out, or the same", value)
    for key, owner in BLOCKS.items():
        if key in content and not _is_off(value := content.pop(key)):
            instead = f"{owner} decides that here" if owner else "not handed on to DeepSpeed by Towline"
            yield Problem(f"deepspeed.{key}", f"{instead}: leave it out, or switch it off", value)
    kept = {one.name for one in dataclasses.fields(ZeroFileConfig)}
    for key in [key for key in content if key not in kept]:
        near = nearest(key, [*kept, *UNHEARD, *FIXED, *BLOCKS, *FORMER_NAMES])
        if near and near not in kept:  # of the others the gate knows more
            yield Problem(f"deepspeed.{key}", f"not a key of DeepSpeed's; did you mean {near}?", content.pop(key))


def _is_off(block: Any) -> bool:
    """Return whether a block asks for nothing: not enabled, or all that it has is off."""
    if not isinstance(block, dict):
        return not block
    if "enabled" in block:
        return block["enabled"] in (False, None, "auto")
    return all(value in (False, None, 0, "auto") for value in block.values())


def _fill_defaults(zero: Any) -> None:
    """Fill in what accelerate fills in where its own configuration says nothing, and what an export needs."""
    if not isinstance(zero, dict):
        return
    if zero.get("stage") == "auto":
        zero["stage"] = 2
    for key in ("offload_optimizer", "offload_param"):
        if isinstance(offload := zero.get(key), dict):
            filled = {"device": "none", "nvme_path": None}
            zero[key] = offload | {name: value for name, value in filled.items() if offload.get(name) == "auto"}
    if zero.get("stage") == 3 and zero.get(GATHER, "auto") == "auto":
        zero[GATHER] = True
    elif zero.get(GATHER) == "auto":
        del zero[GATHER]
