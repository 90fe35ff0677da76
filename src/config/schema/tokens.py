"""conf/tokens: tokens added to the vocabulary, and how their rows are initialised."""

from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial

from src.config.schema.checks import STRINGS, up_to
from src.config.schema.fields import AT_START, BY_OUTCOME, key

ROWS_MULTIPLE = up_to(65_536, "more rows than most vocabularies have, for padding alone")


InitMethod = StrEnum("InitMethod", "text mean description random")
_init_key = partial(key, resume=BY_OUTCOME, why=AT_START, shapes_rows=False)


@dataclass
class TokenInitConfig:
    """How the rows of new tokens start: see src.model.embeddings.initial_rows."""

    method: InitMethod = _init_key()
    text: list[str] = _init_key(STRINGS, counts_where=lambda config: config.get("tokens.init.method") == "text")
    descriptions: dict[str, str] = _init_key(
        counts_where=lambda config: config.get("tokens.init.method") == "description"
    )


@dataclass
class TokensConfig:
    """conf/tokens: tokens that the vocabulary gets, and which of them open and close a thought."""

    additional_special_tokens: list[str] = key(STRINGS, resume=BY_OUTCOME, cache_key_field="tokenizer", read_by=())
    thought_open: str | None = key(resume=BY_OUTCOME, cache_key_field="tags", read_by=())
    thought_close: str | None = key(resume=BY_OUTCOME, cache_key_field="tags", read_by=())
    init: TokenInitConfig = field(default_factory=TokenInitConfig)
    pad_to_multiple_of: int | None = key(ROWS_MULTIPLE, resume=BY_OUTCOME, shapes_rows=False)
