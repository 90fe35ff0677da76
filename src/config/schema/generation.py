"""conf/generation: how text is generated."""

from dataclasses import dataclass
from enum import StrEnum
from functools import partial

from src.config.schema.checks import AT_LEAST_ONE, COUNT, Check, in_float32, is_number, up_to
from src.config.schema.fields import GENERATING, READING_ROWS, Impact, key

SCALE = in_float32(1e-30, "of at least 1e-30")
"""What scores are divided by, which may be in the hundreds: below, they are infinite in 32 bits."""
BEAMS = up_to(1_000, "each beam holds every row of a batch once more")
SAMPLES = up_to(10_000, "each is generated for every row")
ThoughtMode = StrEnum("ThoughtMode", "free none forced")


_key = partial(key, resume=Impact.harmless, read_by=GENERATING)


@dataclass
class GenerationConfig:
    """conf/generation: Hugging Face's generation settings, by their own names."""

    max_new_tokens: int = _key(AT_LEAST_ONE)
    min_new_tokens: int = _key(COUNT)
    num_beams: int = _key(BEAMS)
    do_sample: bool = _key()
    temperature: float = _key(SCALE)
    top_k: int = _key(COUNT)
    top_p: float = _key(Check("a number above 0 and at most 1", lambda v: is_number(v) and 0 < v <= 1))
    repetition_penalty: float = _key(SCALE)
    no_repeat_ngram_size: int = _key(COUNT)
    num_return_sequences: int = _key(SAMPLES, 1, read_by=READING_ROWS)
    thoughts: ThoughtMode = _key(default=ThoughtMode.free)
    max_thought_tokens: int | None = _key(COUNT, None)
