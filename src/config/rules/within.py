"""Rules within one section: model, tokens, generation, runtime, tracking."""

import os
from pathlib import Path

from src.config import schema
from src.config.problems import Problem
from src.config.rules.rule import Problems, applies_to
from src.config.schema.fields import GENERATING
from src.util import in_words


@applies_to("run")
def checkpoint_can_be_loaded(model: schema.ModelConfig) -> Problems:
    folder = Path(model.checkpoint)
    if not os.path.exists(folder):
        if folder.is_absolute() or model.checkpoint.startswith((".", "~")) or os.path.isdir(folder.parts[0]):
            yield Problem("model.checkpoint", f"no such folder (looked in {Path.cwd()})", model.checkpoint)
        return
    if not folder.is_dir():
        yield Problem("model.checkpoint", "a file; a checkpoint is a folder or a hub id", model.checkpoint)
    elif not os.path.isfile(folder / "config.json"):
        yield Problem("model.checkpoint", "a folder without config.json: not a model", model.checkpoint)
    elif model.weights is schema.Weights.pretrained and not _has_weights(folder, "model.safetensors"):
        pickled = "only pickled weights (pytorch_model.bin), which may run code; model.use_safetensors=false takes them"
        none = "a folder without weights (model.safetensors); model.weights=random starts without"
        has_pickled = _has_weights(folder, "pytorch_model.bin")
        if model.use_safetensors or not has_pickled:
            yield Problem("model.checkpoint", pickled if has_pickled else none, model.checkpoint)


def _has_weights(folder: Path, name: str) -> bool:
    return any(os.path.isfile(folder / f"{name}{end}") for end in ("", ".index.json"))


@applies_to("run")
def thought_tags_come_in_pairs(tokens: schema.TokensConfig) -> Problems:
    opens, closes = tokens.thought_open, tokens.thought_close
    if (opens is None) != (closes is None):
        yield Problem("tokens.thought_close", "thought_open and thought_close come together", closes)
    elif opens is not None and opens == closes:
        reason = "the same as thought_open: the end of a thought could not be found"
        yield Problem("tokens.thought_close", reason, closes)


@applies_to("run")
def new_tokens_are_distinct(tokens: schema.TokensConfig) -> Problems:
    new = tokens.additional_special_tokens
    for token in sorted({t for t in new if new.count(t) > 1}):
        yield Problem("tokens.additional_special_tokens", "given twice", token)
    for token in new:
        if not token.strip() or token != token.strip():
            yield Problem("tokens.additional_special_tokens", "a token may not be empty or begin or end blank", token)


@applies_to("run")
def new_tokens_can_be_initialised(tokens: schema.TokensConfig) -> Problems:
    new, init = tokens.additional_special_tokens, tokens.init
    if init.method is schema.InitMethod.text and new:
        if len(init.text) not in (1, len(new)):
            yield Problem("tokens.init.text", f"one text for all tokens, or one for each of the {len(new)}", init.text)
        if not all(init.text):
            yield Problem("tokens.init.text", "a text may not be empty", init.text)
    if init.method is schema.InitMethod.description:
        for token in new:
            if not init.descriptions.get(token):
                yield Problem("tokens.init.descriptions", f"no description of {token}", init.descriptions)


@applies_to("run", *GENERATING)
def generation_lengths_fit(generation: schema.GenerationConfig) -> Problems:
    if generation.min_new_tokens > generation.max_new_tokens:
        reason = f"more than generation.max_new_tokens, {generation.max_new_tokens}"
        yield Problem("generation.min_new_tokens", reason, generation.min_new_tokens)


@applies_to("run", *GENERATING)
def samples_can_differ(generation: schema.GenerationConfig) -> Problems:
    count, num_beams = generation.num_return_sequences, generation.num_beams
    if count > 1 and num_beams > 1 and count > num_beams:
        reason = f"the best beams are returned, and there are {num_beams}: generation.num_beams={count}"
        yield Problem("generation.num_return_sequences", reason, count)
    elif count > 1 and num_beams == 1 and not generation.do_sample:
        reason = "the most likely token each time gives one text: generation.do_sample=true, or generation.num_beams"
        yield Problem("generation.num_return_sequences", reason, count)


@applies_to("run", *GENERATING)
def thoughts_have_room(generation: schema.GenerationConfig) -> Problems:
    most, thoughts = generation.max_thought_tokens, generation.thoughts
    if most is None:
        return
    if thoughts is schema.ThoughtMode.none:
        yield Problem("generation.max_thought_tokens", "no thought is written: generation.thoughts is none", most)
    elif thoughts is schema.ThoughtMode.forced and generation.max_new_tokens < 2:
        reason = "a thought that is opened and closed takes 2 tokens: see generation.max_thought_tokens"
        yield Problem("generation.max_new_tokens", reason, generation.max_new_tokens)


@applies_to("run")
def machines_can_meet(runtime: schema.RuntimeConfig) -> Problems:
    if runtime.machine_rank >= runtime.num_machines:
        reason = f"counts from 0 to runtime.num_machines - 1, which is {runtime.num_machines - 1}"
        yield Problem("runtime.machine_rank", reason, runtime.machine_rank)
    if runtime.num_machines > 1 and runtime.main_process_ip is None:
        yield Problem("runtime.main_process_ip", "several machines need the address of the one with rank 0", None)


@applies_to("run")
def tracker_can_be_reached_by_some_scheme(tracking: schema.TrackingConfig) -> Problems:
    schemes = ("sqlite:", "postgresql", "mysql", "mssql", "http:", "https:", "databricks")
    if isinstance(tracking, schema.MlflowConfig) and not tracking.uri.startswith(schemes):
        reason = f"not an address that MLflow knows; it begins with one of {' '.join(schemes)}"
        if tracking.uri.startswith(("file:", "/", "./", "../")):
            reason += "; runs in a folder are kept in a file there: sqlite:///FOLDER/mlflow.db"
        yield Problem("tracking.uri", reason, tracking.uri)


@applies_to("run")
def further_trackers_have_what_they_need(tracking: schema.TrackingConfig) -> Problems:
    for name in tracking.also:
        if name in ("none", tracking.type) or tracking.also.count(name) > 1:
            yield Problem("tracking.also", f"names {name}, which is no further tracker", tracking.also)
        elif lacking := tracking.lacking(name):
            reason = f"{name} needs {in_words(lacking)}, which tracking={tracking.type} has not"
            if tracking.type != "none":
                reason += f"; choose tracking={name} tracking.also=[{tracking.type}]"
            yield Problem("tracking.also", reason, tracking.also)
