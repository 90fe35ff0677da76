"""What preflight says of the configuration's tokens: their ids, and where the row of each starts."""

from __future__ import annotations

from typing import Any

from src.config.schema import RunConfig
from src.data.dataset import Data
from src.inspection.findings import Finding, Level
from src.model.embeddings import StartedRows, num_rows
from src.tokens import NewTokens
from src.tracking.console import Console

MOST_NAMED = 6  # that a new token starts from, named one by one


def show_tokens(
    console: Console,
    config: RunConfig,
    model: Any,
    tokenizer: Any,
    new: NewTokens,
    started: StartedRows,
    data: Data,
    *,
    are_weights_seen: bool,
) -> None:
    """Print for each new token whether it is one id, how often it is fed and learned, and where its row starts.

    Args:
        are_weights_seen: whether the checkpoint's rows were looked at, so that it is known which were never learned.
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
    lines = [f"{len(tokenizer):,} in the vocabulary, {num_rows(model):,} rows; {special}"]
    if data.stop_ids[1:] or data.frame.end_text:
        stops = [*tokenizer.convert_ids_to_tokens(data.stop_ids), *filter(None, [data.frame.end_text])]
        lines.append(f"generation stops at {', '.join(stops)}")
    counts = data.reports["train"].new_tokens
    for token, token_id in new.ids.items():
        start = "known already, left as learned"
        if token in started.ids:
            words = tokenizer.convert_ids_to_tokens(started.sources[token])
            named = f" {words if len(words) <= MOST_NAMED else f'of {len(words)} pieces'}" if words else ""
            was = "" if token in new.added else "known already, but never learned: "
            start = f"{was}starts from {config.tokens.init.method.value}{named}"
        elif not are_weights_seen:
            start = "known already; whether it was ever learned is seen when the weights are loaded"
        ids = tokenizer(token, add_special_tokens=False)["input_ids"]
        one = f"one id, {token_id}" if len(ids) == 1 else f"{len(ids)} ids"
        fed, learned = counts[token]["fed"], counts[token]["supervised"]
        lines.append(f"{token}  {one}; fed {fed:,} times, learned {learned:,} times; {start}")
    console.label("tokens", "\n".join(lines))


def about_initialised_rows(new: NewTokens, started: StartedRows) -> list[Finding]:
    """Return a note on the tokens that the checkpoint knows by name only."""
    found = [token for token in new.known if token in started.ids]
    if not found:
        return []
    text = f"{', '.join(found)}: the checkpoint has the token, but never learned its row; it starts as a new one"
    return [Finding(Level.note, text)]
