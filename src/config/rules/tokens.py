"""Rules of `tokens`."""

from collections.abc import Iterator

from src.config.problems import Problem
from src.config.rules.rule import applies_to
from src.config.schema import InitMethod, TokensConfig


@applies_to("run")
def thought_tags_come_in_pairs(tokens: TokensConfig) -> Iterator[Problem]:
    if (tokens.thought_open is None) != (tokens.thought_close is None):
        yield Problem("tokens.thought_close", "thought_open and thought_close come together", tokens.thought_close)
    elif tokens.thought_open is not None and tokens.thought_open == tokens.thought_close:
        yield Problem(
            "tokens.thought_close",
            "the same as thought_open: the end of a thought could not be found",
            tokens.thought_close,
        )


@applies_to("run")
def new_tokens_are_distinct(tokens: TokensConfig) -> Iterator[Problem]:
    new = tokens.additional_special_tokens
    for token in sorted({t for t in new if new.count(t) > 1}):
        yield Problem("tokens.additional_special_tokens", "given twice", token)
    for token in new:
        if not token.strip() or token != token.strip():
            yield Problem("tokens.additional_special_tokens", "a token may not be empty or begin or end blank", token)


@applies_to("run")
def new_tokens_can_be_initialised(tokens: TokensConfig) -> Iterator[Problem]:
    new, init = tokens.additional_special_tokens, tokens.init
    if init.method is InitMethod.text and new:
        if len(init.text) not in (1, len(new)):
            yield Problem("tokens.init.text", f"one text for all tokens, or one for each of the {len(new)}", init.text)
        if not all(init.text):
            yield Problem("tokens.init.text", "a text may not be empty", init.text)
    if init.method is InitMethod.description:
        for token in new:
            if not init.descriptions.get(token):
                yield Problem("tokens.init.descriptions", f"no description of {token}", init.descriptions)
