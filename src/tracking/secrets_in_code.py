"""Code, such as a difference, without secrets: also without what is assigned to a secret's name in it."""

import re

from src.secrets import MASK, SHORTEST_INSIDE, SHORTEST_KNOWN, clean, looks_like_token


def clean_code(text: str) -> str:
    """Return code without secrets, values of secrets' names (Python, shell, YAML, JSON), and tokens by their prefix."""
    text = _PRIVATE_KEY.sub(rf"\g<1>{MASK}", clean(text))
    text = _BLOCK.sub(lambda found: found[1] + f"{found[2]}{found[3]}  {MASK}\n", text)
    for pattern in (_BARE, _YAML, _LITERAL):
        text = pattern.sub(_without_literal if pattern is _LITERAL else _without_bare, text)
    return _FAMOUS.sub(lambda found: MASK if any(one.isdigit() for one in found[0]) else found[0], text)


_NAME = (
    r"(?<![A-Za-z0-9])(?P<name>[\w.-]*(?:token|key|pass(?:word|wd|phrase)?|pwd|secret|credential|auth(?:orization)?)s?)"
)
_QUOTED = (
    r"[rbfu]{0,2}(?:\"\"\"(?:\\.|[^\\])*?\"\"\"|'{3}(?:\\.|[^\\])*?'{3}|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])*')"
)
_LITERAL = re.compile(
    rf"(?P<before>{_NAME}(?:[\"'][ \t]*\]?)?[ \t]*(?P<sign>:[ \t]*[A-Za-z_][\w.\[\] |\"']*?=|:?=>?|:|,)[ \t]*"
    rf"(?:\([ \t]*(?:\n[+\- ][ \t]*)?)?)(?P<value>{_QUOTED}(?:[ \t]*(?:\n[+\- ][ \t]*)?{_QUOTED})*)",
    re.IGNORECASE,
)
_WORD = r"(?P<value>[^\s\"'`,;()\[\]{}]{4,})"
_BARE = re.compile(rf"(?P<before>{_NAME}(?P<sign>[ \t]*=[ \t]*)){_WORD}(?![\w.]*[(\[])", re.IGNORECASE)
_YAML = re.compile(
    rf"^(?P<before>[+\- ]?[ \t]*(?:- )?[\"']?{_NAME}[\"']?(?P<sign>:[ \t]+)){_WORD}(?=[ \t]*(?:#.*|,)?$)",
    re.IGNORECASE | re.MULTILINE,
)
_BLOCK = re.compile(
    rf"^(([+\- ]?)([ \t]*)(?:- )?{_NAME}[\"']?:\s+[|>][+-]?[ \t]*\n)(?:\2\3[ \t]+\S.*(?:\n|\Z))+",
    re.IGNORECASE | re.MULTILINE,
)
_PRIVATE_KEY = re.compile(r"(?<=-----)(BEGIN [A-Z ]*PRIVATE KEY-----)[\s\S]+?(?=-----END|\Z)")
_FAMOUS = re.compile(
    r"\b(?:hf_|sk-|gh[pousr]_|github_pat_|xox[a-z]-|glpat-|AKIA|AIza|eyJ|(?:Bearer|Basic) +)[\w.~+/=-]{8,}"
)
_OF_A_TOKENIZER = re.compile(
    r"(?:^|_)(?:pad|eos|bos|unk|sep|cls|mask|new|special|stop|additional_special)_tokens?$", re.I
)
_NO_VALUES = re.compile(
    r"(?:str|int|float|bool|bytes|dict|list|tuple|object|any|none|null|true|false|optional|self)\b.*|\$.*|\*\*\*", re.I
)


def _is_given_a_secret(name: str, value: str) -> bool:
    """Return whether code gives a secret to a name."""
    if _OF_A_TOKENIZER.search(name) or value == MASK or value.startswith("${") or name.endswith("tokens"):
        return False
    if re.search(r"keys?$", name, re.I):
        is_named = bool(re.search(r"[_-]key$|api_?keys?$", name, re.I)) and len(value) >= SHORTEST_KNOWN
        return is_named or looks_like_token(value)
    return len(value) >= SHORTEST_KNOWN


def _without_literal(found: re.Match[str]) -> str:
    inner = re.sub(r"^[rbfuRBFU]{0,2}[\"']+|[\"']+$", "", found["value"])
    is_pair = found["sign"] != "," or found["name"].isupper()  # setdefault("HF_TOKEN", "…")
    return f"{found['before']}{MASK}" if is_pair and _is_given_a_secret(found["name"], inner) else found[0]


def _without_bare(found: re.Match[str]) -> str:
    """Mask a value without quotes: of a shell or YAML whatever it is, of other code what is no name."""
    value, is_word = found["value"], found["value"].isidentifier() or "." in found["value"]
    if not _is_given_a_secret(found["name"], value) or _NO_VALUES.fullmatch(value):
        return found[0]
    is_code = found["sign"].strip() == "=" and (found["sign"] != "=" or not found["name"].isupper())
    if is_code and is_word and not (any(one.isdigit() for one in value) and len(value) >= SHORTEST_INSIDE):
        return found[0]
    return f"{found['before']}{MASK}"
