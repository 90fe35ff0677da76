"""The model card (README.md) of an exported model: how it was trained, its metrics, and how to load it.

People publish it. So it has the configuration that shaped the model, but no paths, tracker or user names.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from src.errors import visible
from src.markdown import code, fenced, inline, table
from src.secrets import map_texts

SHAPING = (
    *("seed", "init_from", "model", "quantization", "adapter", "tokens", "data", "optimizer", "scheduler", "training"),
    *("loss", "deepspeed", "generation", "export"),
)
"""The parts of a configuration that shape a model."""
PATHS = ("init_from", "checkpoint", "train_files", "validation_files", "test_files", "dataset_name", "config_file")
"""Keys whose values may be relative paths; the card has only the last part of these, as of every absolute path."""
PATH_ENDINGS = ("_path", "_dir", "_file", "_folder")
NOT_SHAPING = ("cache_dir", "preprocessing_num_workers", "max_seconds", "logging_steps")
ROWS_ALONE = "An adapter of the rows of new tokens alone (tokens_only)"
SHOWN = ("train/loss", "eval/")  # prefixes of the metrics that the card shows


def model_card(
    frozen: Mapping[str, Any],
    data: Mapping[str, Any],
    metrics: Mapping[str, float],
    provenance: Mapping[str, Any],
    new_tokens: Mapping[str, int],
    *,
    about: str = "",
    has_modelfile: bool = False,
) -> str:
    """Return the card of a run: of its config.yaml, data_report.json, last metrics, provenance.json, and token ids.

    `about` says more of the weights; `has_modelfile`: whether an Ollama Modelfile is beside it.
    """
    model, git = frozen["model"], provenance.get("git", {})
    head = {"library_name": "peft" if _is_adapter(frozen) else "transformers"}
    if model["weights"] != "random" and _name(model["checkpoint"]) == model["checkpoint"]:  # else it is on no hub
        head["base_model"] = model["checkpoint"]
    commit = git.get("commit") or "unknown"
    sections = {
        inline(frozen["name"]): f"{_what(frozen)} Trained with Towline at commit {commit}"
        f"{', with changes that are not committed' if git.get('dirty') else ''} (config hash "
        f"{provenance.get('config_hash', 'unknown')}).{about and f' {about}'}",
        "## How to load it": _loading(frozen),
        "## How to serve and publish it": _serving(frozen, new_tokens, has_modelfile=has_modelfile),
        "## Data": table(
            ("set", "rows", "tokens", "supervised"),
            [
                (inline(name), *(f"{of_set[key]:,}" for key in ("rows_kept", "tokens", "supervised_tokens")))
                for name, of_set in data.items()
            ],
        ),
        "## Metrics": table(
            ("metric", "value"),
            [(inline(name), f"{value:.4g}") for name, value in sorted(metrics.items()) if name.startswith(SHOWN)],
        ),
        "## New tokens": table(("token", "id"), [(code(token), f"{i:,}") for token, i in new_tokens.items()])
        if new_tokens
        else "None.",
        "## Configuration": fenced(_as_yaml(shaping(frozen)), "yaml"),
    }
    body = "\n\n".join(f"{title}\n\n{text}" for title, text in sections.items())
    return f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n# {body}\n"


def _as_yaml(node: Any) -> str:
    """Return YAML without characters that change how others are displayed, such as marks of direction."""
    dumped = yaml.safe_dump(node, sort_keys=False, allow_unicode=True)
    if visible(dumped) == dumped:
        return dumped
    return yaml.safe_dump(node, sort_keys=False)  # escapes all but ASCII


def shaping(frozen: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sections of a configuration that shaped the model, with names in place of paths."""
    sections = {key: frozen[key] for key in SHAPING if key in frozen}
    for key, section in sections.items():
        if isinstance(section, Mapping):
            sections[key] = {name: value for name, value in section.items() if name not in NOT_SHAPING}
    return map_texts(sections, lambda text, key: _name(text) if _is_path(text, key) else text)


def _is_path(text: str, key: str) -> bool:
    """Return whether a text is a path, by its dotted key or by itself."""
    is_in_path = any(part in PATHS or part.endswith(PATH_ENDINGS) for part in key.split("."))
    is_from_root = _FROM_ROOT.fullmatch(text) is not None or (text.startswith("/") and os.path.exists(text))
    return is_in_path or is_from_root


def _name(place: str) -> str:
    """Return a path's last part; the id of a model or a dataset on a hub is returned as it is."""
    is_path = Path(place).exists() or place.startswith(("/", "~", ".")) or place.count("/") > 1
    return Path(place).resolve().name if is_path else place


_FROM_ROOT = re.compile(r"(?:file:/+|/|~[\w.-]*/|[A-Za-z]:[\\/])[^/\\{}<>()*\n]+(?:[/\\][^{}<>()*\n]*)+")
"""An absolute path of several parts; templates and patterns do not match."""


def _is_adapter(frozen: Mapping[str, Any]) -> bool:
    return frozen["adapter"]["type"] != "none" and not frozen["export"]["merge"]


def _is_quantised(frozen: Mapping[str, Any]) -> bool:
    return bool(frozen["quantization"]["load_in_8bit"] or frozen["quantization"]["load_in_4bit"])


def _what(frozen: Mapping[str, Any]) -> str:
    model, adapter = frozen["model"], frozen["adapter"]
    start = ", from random weights" if model["weights"] == "random" else ""
    if frozen.get("init_from"):
        start = f", from the weights of {inline(_name(frozen['init_from']))}"
    base = f"{inline(_name(model['checkpoint']))}{start}"
    if adapter["type"] == "none":
        return f"A full fine-tune of {base}."
    bits = " in 8 bits" if frozen["quantization"]["load_in_8bit"] else " in 4 bits" if _is_quantised(frozen) else ""
    merged = " The adapter is merged into the weights here." if frozen["export"]["merge"] else ""
    kind = f"A {adapter['type']} adapter (r {adapter['r']})" if "r" in adapter else ROWS_ALONE
    return f"{kind} on {base}, whose weights were frozen{bits}.{merged}"


def _loading(frozen: Mapping[str, Any]) -> str:
    is_pair = frozen["model"]["type"] == "encoder_decoder"
    auto = "AutoModelForSeq2SeqLM" if is_pair else "AutoModelForCausalLM"
    if not _is_adapter(frozen):
        lines = ["model = " + auto + ".from_pretrained(FOLDER)", "tokenizer = AutoTokenizer.from_pretrained(FOLDER)"]
        note = (
            "\n\nThe adapter was trained on quantised weights. These are the same weights dequantised and merged in "
            f"float32, written as {frozen['model']['dtype']}: their logits are those of training but for rounding "
            "(2e-2 at most in float32, more in 16 bits and after training in 8 bits)."
        )
        loading = fenced("\n".join([f"from transformers import {auto}, AutoTokenizer", *lines]), "python")
        return loading + (note if _is_quantised(frozen) else "")
    checkpoint, revision = frozen["model"]["checkpoint"], frozen["model"]["revision"]
    is_local = _name(checkpoint) != checkpoint
    settings = ["BASE" if is_local else repr(checkpoint), *([f"revision={revision!r}"] if revision else [])]
    settings += [f"dtype={frozen['model']['dtype']!r}"]
    imports, before, note = [auto, "AutoTokenizer", "GenerationConfig"], [], ""
    if _is_quantised(frozen):
        imports.append("BitsAndBytesConfig")
        before = [f"quantization = BitsAndBytesConfig({_bits(frozen)})"]
        settings.append("quantization_config=quantization")
        note = (
            "\n\nThese are the quantised weights that it was trained on; on whole weights its logits differ a little."
        )
    if is_local:
        note += f"\n\nBASE is the folder of the model that it was trained on, {inline(_name(checkpoint))}."
    lines = [
        "from peft import PeftModel",
        f"from transformers import {', '.join(imports)}",
        "tokenizer = AutoTokenizer.from_pretrained(FOLDER)",
        *before,
        f"base = {auto}.from_pretrained({', '.join(settings)})",
        "num_ids = max(tokenizer.get_vocab().values()) + 1",
        "if base.get_input_embeddings().weight.shape[0] < num_ids:  # room for the new tokens",
        "    base.resize_token_embeddings(num_ids, mean_resizing=False)",
        "model = PeftModel.from_pretrained(base, FOLDER)",
        "model.generation_config = GenerationConfig.from_pretrained(FOLDER)",
    ]
    return fenced("\n".join(lines), "python") + note


def _serving(frozen: Mapping[str, Any], new_tokens: Mapping[str, int], *, has_modelfile: bool) -> str:
    """Return how to serve a model with vLLM and Ollama, which take causal models only, and how to put it on a hub."""
    is_causal, lines = frozen["model"]["type"] == "causal_lm", ["hf upload USER/NAME FOLDER"]
    notes = []
    if is_causal and not _is_adapter(frozen):
        lines.insert(0, "vllm serve FOLDER")
        if has_modelfile:
            lines.insert(1, "ollama create NAME -f FOLDER/Modelfile")
    elif is_causal and not new_tokens:
        base = frozen["model"]["checkpoint"]
        lines.insert(
            0, f"vllm serve {'BASE' if _name(base) != base else base} --enable-lora --lora-modules NAME=FOLDER"
        )
    elif is_causal:
        notes.append("vLLM refuses adapters with rows of new tokens, so it needs whole weights.")
    if _is_adapter(frozen):
        notes.append("`python -m src.export run=DIR` writes whole weights, with a Modelfile for Ollama.")
    if new_tokens and is_causal:
        notes.append(
            'Servers leave special tokens out of the text; vLLM keeps them with `"skip_special_tokens": false`.'
        )
    return "\n\n".join([fenced("\n".join(lines), "bash"), *notes])


def _bits(frozen: Mapping[str, Any]) -> str:
    quantization = frozen["quantization"]
    if quantization["load_in_8bit"]:
        return "load_in_8bit=True"
    mixed = {"bf16": "bfloat16", "fp16": "float16"}.get(frozen["training"]["mixed_precision"], frozen["model"]["dtype"])
    names = ("bnb_4bit_quant_type", "bnb_4bit_compute_dtype", "bnb_4bit_use_double_quant")
    settings = {name: quantization[name] for name in names}
    if settings["bnb_4bit_compute_dtype"] == "auto":
        settings["bnb_4bit_compute_dtype"] = mixed
    return ", ".join(["load_in_4bit=True", *(f"{key}={value!r}" for key, value in settings.items() if value != "auto")])
