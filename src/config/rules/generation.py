"""Rules of `generation`."""

from collections.abc import Iterator

from src.config.problems import Problem
from src.config.rules.rule import applies_to
from src.config.schema import GenerationConfig


@applies_to("run", "predict")
def generation_lengths_fit(generation: GenerationConfig) -> Iterator[Problem]:
    if generation.min_new_tokens > generation.max_new_tokens:
        reason = f"more than generation.max_new_tokens, {generation.max_new_tokens}"
        yield Problem("generation.min_new_tokens", reason, generation.min_new_tokens)
