"""conf/tokens: tokens added to the vocabulary, and how their rows are initialised."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING

from src.config.schema.checks import STRINGS, up_to
from src.config.schema.fields import key

ROWS_MULTIPLE = up_to(65_536, "more rows than most vocabularies have, for padding alone")


class InitMethod(Enum):
    text = "text"
    mean = "mean"
    description = "description"
    random = "random"


@dataclass
class TokenInitConfig:
    """How the rows of new tokens start: see src.tokens.initial_rows."""

    method: InitMethod = MISSING
    text: list[str] = key(STRINGS)
    descriptions: dict[str, str] = MISSING


@dataclass
class TokensConfig:
    """conf/tokens: tokens that the vocabulary gets, and which of them open and close a thought."""

    additional_special_tokens: list[str] = key(STRINGS)
    thought_open: str | None = MISSING
    thought_close: str | None = MISSING
    init: TokenInitConfig = field(default_factory=TokenInitConfig)
    pad_to_multiple_of: int | None = key(ROWS_MULTIPLE)
