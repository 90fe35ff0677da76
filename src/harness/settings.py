"""How the text of a task is generated: what the task says, and for all else what the run says. Pure.

Several answers to a prompt are a task's `repeats`, not generation.num_return_sequences.
"""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from src.config.schema import GenerationConfig, ThoughtMode
from src.errors import DataError
from src.util import in_words

LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""The names by which a task may say how long its answers are, the first one given counts, as in the harness."""


def generation_settings(
    given: Mapping[str, Any], run: GenerationConfig, *, thinks: bool
) -> tuple[GenerationConfig, tuple[str, ...]]:
    """Return the settings that a task's `generation_kwargs` make of the run's, and the texts that end an answer.

    The length that a task gives is that of an answer; a model that `thinks` gets the run's generation.max_new_tokens in
    addition, for its thoughts. DataError names a setting that is not known.
    """
    settings = {name: value for name, value in given.items() if value is not None}
    stops = settings.pop("until", [])
    lengths = [int(settings.pop(name)) for name in LENGTHS if name in settings]
    known = [field.name for field in fields(GenerationConfig) if field.name != "num_return_sequences"]
    if unknown := settings.keys() - set(known):
        there_are = in_words(["until", LENGTHS[0], *known])
        raise DataError(f"generation_kwargs: {in_words(sorted(unknown))} can't be set by a task; there are {there_are}")
    if "temperature" in settings:  # 0 stands for greedy decoding, and so does any without sampling
        settings["do_sample"] = settings.get("do_sample", True) and settings["temperature"] > 0
    if not settings.get("do_sample", run.do_sample):
        settings.pop("temperature", None)
    if lengths:
        settings["max_new_tokens"] = lengths[0] + (
            run.max_new_tokens if thinks and run.thoughts is not ThoughtMode.none else 0
        )
    return replace(run, num_return_sequences=1, **settings), tuple(
        filter(None, [stops] if isinstance(stops, str) else stops)
    )
