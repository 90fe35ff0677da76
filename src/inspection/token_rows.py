"""What preflight prints of the configured tokens: their ids, and where the row of each starts."""

from typing import Any

from src.config.schema import InitMethod, RunConfig
from src.data.dataset import Data
from src.inspection.findings import Finding, Level
from src.model.embeddings import InitialisedRows, num_embedding_rows
from src.tokens import ConfiguredTokens
from src.tracking.console import Console

MOST_NAMED = 6  # source tokens of a row that are named one by one


def show_tokens(
    console: Console,
    config: RunConfig,
    model: Any,
    tokenizer: Any,
    new: ConfiguredTokens,
    initialised: InitialisedRows,
    data: Data,
    *,
    are_weights_seen: bool,
) -> None:
    """Print for each configured token whether it is one id, how often it is fed and supervised, and its initial row.

    Args:
        are_weights_seen: whether the checkpoint's rows were read, so that it is known which were never trained.
    """
    special = ", ".join(
        f"{name} {token} = {token_id}"
        for name, token, token_id in (
            ("BOS", tokenizer.bos_token, tokenizer.bos_token_id),
            ("EOS", tokenizer.eos_token, tokenizer.eos_token_id),
            ("pad", tokenizer.pad_token, tokenizer.pad_token_id),
        )
        if token is not None
    )
    lines = [f"{len(tokenizer):,} in the vocabulary, {num_embedding_rows(model):,} rows; {special}"]
    if data.stop_ids[1:] or data.frame.end_text:
        stops = [*tokenizer.convert_ids_to_tokens(data.stop_ids), *filter(None, [data.frame.end_text])]
        lines.append(f"generation stops at {', '.join(stops)}")
    counts = data.reports["train"].new_tokens
    for token, token_id in new.ids.items():
        if token in initialised.ids:
            sources = tokenizer.convert_ids_to_tokens(initialised.sources[token])
            start = "" if token in new.added else "untrained in the checkpoint: "
            start += f"initialised {_initialised_from(config.tokens.init.method, sources)}"
        elif are_weights_seen:
            start = "in the vocabulary, its row is kept"
        else:
            start = "in the vocabulary; whether the checkpoint trained its row is seen when the weights are loaded"
        ids = tokenizer(token, add_special_tokens=False)["input_ids"]
        one = f"one id, {token_id}" if len(ids) == 1 else f"{len(ids)} ids"
        fed, supervised = counts[token]["fed"], counts[token]["supervised"]
        lines.append(f"{token}  {one}; fed {fed:,} times, supervised {supervised:,} times; {start}")
    console.label("tokens", "\n".join(lines))


def _initialised_from(method: InitMethod, sources: list[str]) -> str:
    """Return what a token's row starts as, in words."""
    if sources:
        named = " ".join(map(repr, sources)) if len(sources) <= MOST_NAMED else f"the rows of {len(sources)} tokens"
        return f"from the mean of {named}"
    return "at random" if method is InitMethod.random else "from the mean of all rows"


def about_initialised_rows(new: ConfiguredTokens, initialised: InitialisedRows) -> list[Finding]:
    """Return a note on the tokens that the checkpoint knows by name only."""
    untrained = [token for token in new.existing if token in initialised.ids]
    if not untrained:
        return []
    text = f"{', '.join(untrained)}: in the tokenizer, but never trained in the checkpoint; initialised as a new token"
    return [Finding(Level.note, text)]
