"""A dialogue and its summary; the dialogue can be cleaned of what exports and crawls leave in it."""

import re
from typing import Any

from src.config.schema import DataConfig
from src.data.formats import FORMATS, Pair, read_texts

LINE_END = re.compile(r"\r\n?|\\r\\n|\\n|[\u2028\u2029\x0b\x0c]")
BLANKS = re.compile(r"[^\S\n]+")
BLANK_LINES = re.compile(r" ?\n[ \n]*")
ELLIPSIS = re.compile(r"[.…]*(?:\.{3}|…)[.…]*")
REPEATED = re.compile(r"([!?,;:~])\1+")


@FORMATS.register("dialogue_summary")
def read(fields: dict[str, Any], data: DataConfig) -> Pair:
    """Return dialogue and summary; with `data.clean_dialogue` the dialogue is cleaned."""
    pair = read_texts(fields, data)
    if not data.clean_dialogue:
        return pair
    cleaned = clean(pair.parts["dialogue"])
    return pair._replace(parts=pair.parts | {"dialogue": cleaned}, was_cleaned=cleaned != pair.parts["dialogue"])


def clean(text: str) -> str:
    """Clean a dialogue lightly; words are never changed, and cleaning is idempotent.

    Line ends of any kind, also those written out as backslash and n, become one newline; blanks become one space, none
    at the ends of lines; empty lines go; repeated marks (`!!!`, `??`, `,,`, `~~`) become one, dots three or more `...`.
    """
    text = LINE_END.sub("\n", text)
    text = BLANK_LINES.sub("\n", BLANKS.sub(" ", text)).strip()
    return REPEATED.sub(r"\1", ELLIPSIS.sub("...", text))
