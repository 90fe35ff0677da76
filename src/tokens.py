"""New special tokens: added to the tokenizer, given rows in the model, initialised, and read back.

Only rows of tokens that were really added are written, by their ids, in the input and the output matrix; what a
checkpoint has learned of a token it already knows is left alone. New tokens are added as ordinary added tokens, not
"special" ones: a decoder that skips special tokens must not swallow the tags of a thought.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AddedToken, AutoTokenizer

from src.config.schema import InitMethod, ModelConfig, TokensConfig
from src.errors import ModelError, TokenError, one_line


@dataclass(frozen=True)
class NewTokens:
    """The tokens of conf/tokens, by what became of them: `added` (token -> id) were not in the vocabulary before."""

    added: dict[str, int]
    known: dict[str, int]

    @property
    def ids(self) -> dict[str, int]:
        return self.known | self.added


def load_tokenizer(model: ModelConfig, tokens: TokensConfig) -> tuple[Any, NewTokens]:
    """Load the checkpoint's tokenizer and add the new tokens to it.

    Raises:
        ModelError: where the checkpoint has no tokenizer that can be loaded.
        TokenError: where a thought's tag is not one id.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            model.checkpoint, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except Exception as error:  # the libraries raise many kinds
        raise ModelError(f"the tokenizer of {model.checkpoint} can't be loaded: {one_line(error)}") from error
    return tokenizer, add_tokens(tokenizer, tokens)


def add_tokens(tokenizer: Any, tokens: TokensConfig) -> NewTokens:
    """Add the tokens that the vocabulary does not have yet; each is one id ever after.

    Raises:
        TokenError: where a thought's tag is not one id in the end.
    """
    vocabulary = tokenizer.get_vocab()
    known = {token: vocabulary[token] for token in tokens.additional_special_tokens if token in vocabulary}
    missing = [token for token in tokens.additional_special_tokens if token not in vocabulary]
    # a known token may be a mere vocabulary entry: marked as added, it is never cut into pieces
    whole = tokenizer.get_added_vocab()
    unmarked = [token for token in known if token not in whole]
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in [*unmarked, *missing]])
    for tag in filter(None, (tokens.thought_open, tokens.thought_close)):
        ids = tokenizer(tag, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise TokenError(
                f"tokens: {tag} opens or closes thoughts but is {len(ids)} tokens; "
                "name it in tokens.additional_special_tokens"
            )
    return NewTokens({token: tokenizer.convert_tokens_to_ids(token) for token in missing}, known)


def embedding_matrices(model: Any) -> list[tuple[str, nn.Parameter]]:
    """Give the input and the output matrix, [rows, width] each; one entry where they are tied."""
    inputs = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    if head is None or head.weight is inputs:
        return [("input", inputs)]
    return [("input", inputs), ("output", head.weight)]


def fit_embeddings(model: Any, num_tokens: int, pad_to_multiple_of: int | None) -> None:
    """Make the matrices at least `num_tokens` rows long; one that has room is left as it is, never shrunk."""
    rows = model.get_input_embeddings().weight.shape[0]
    if rows >= num_tokens:
        return
    model.resize_token_embeddings(num_tokens, pad_to_multiple_of=pad_to_multiple_of, mean_resizing=False)


@dataclass(frozen=True)
class StartedRows:
    """The rows that were written: their tokens' ids, and by matrix the values, [tokens, width], to be read back."""

    ids: dict[str, int]
    values: dict[str, Tensor]


def grow_embeddings(model: Any, tokenizer: Any, new: NewTokens, config: TokensConfig, seed: int) -> StartedRows:
    """Make room for the new tokens and write the starting rows of those that have no learned row yet.

    New rows are made from rows that the checkpoint has learned, never from padding or from one another. A token that
    the tokenizer knows but the matrix has no row for is as new as one that was added.

    Raises:
        TokenError: where a text gives no old token to start from.
    """
    num_rows = int(model.get_input_embeddings().weight.shape[0])
    started = {token: i for token, i in new.ids.items() if token in new.added or i >= num_rows}
    num_old = min([num_rows, *started.values()])
    fit_embeddings(model, len(tokenizer), config.pad_to_multiple_of)
    values: dict[str, Tensor] = {}
    if started:
        ids = list(started.values())
        pieces = source_ids(tokenizer, list(started), config, num_old)
        for offset, (name, matrix) in enumerate(embedding_matrices(model)):
            generator = torch.Generator().manual_seed(seed + offset)
            rows = initial_rows(matrix.detach()[:num_old], config.init.method, pieces, generator)
            with torch.no_grad():
                matrix[ids] = rows.to(matrix.dtype)
            values[name] = matrix.detach()[ids].clone()
    return StartedRows(started, values)


def source_ids(tokenizer: Any, started: Sequence[str], config: TokensConfig, num_old: int) -> list[list[int]]:
    """Give for each token that starts the ids whose rows it starts from; empty lists for methods that use none.

    Raises:
        TokenError: where a text consists of new tokens only.
    """
    init, named = config.init, config.additional_special_tokens
    if init.method is InitMethod.text:
        texts = dict(zip(named, init.text * len(named) if len(init.text) == 1 else init.text, strict=True))
    elif init.method is InitMethod.description:
        texts = dict(init.descriptions)
    else:
        return [[] for _ in started]
    pieces = []
    for token in started:
        ids = [i for i in tokenizer(texts[token], add_special_tokens=False)["input_ids"] if i < num_old]
        if not ids:
            raise TokenError(f"tokens.init: {texts[token]!r} gives {token} no known token to start from")
        pieces.append(ids)
    return pieces


def initial_rows(
    old: Tensor, method: InitMethod, pieces: Sequence[Sequence[int]], generator: torch.Generator
) -> Tensor:
    """Compute where new tokens start. Pure.

    Args:
        old: the rows the checkpoint has learned, [old, width].
        method: text and description take the mean of the rows of each token's `pieces`; mean takes the mean of all
            old rows; random draws from a normal with their mean and standard deviation, per column.
        pieces: for each new token the ids it starts from.
        generator: used by random only.
    Returns:
        float32 rows, [len(pieces), width].
    """
    if method in (InitMethod.text, InitMethod.description):
        return torch.stack([old[list(ids)].float().mean(dim=0) for ids in pieces])
    mean = old.float().mean(dim=0)
    if method is InitMethod.mean:
        return mean.expand(len(pieces), -1).clone()
    noise = torch.randn(len(pieces), old.shape[1], generator=generator).to(old.device)
    return mean + noise * old.float().std(dim=0)


def check_new_rows(model: Any, started: StartedRows) -> None:
    """Read the new rows back, where the model now lies, and compare them bit for bit with what was written.

    Raises:
        ModelError: naming the matrix and the tokens that do not start where they should.
    """
    if not started.ids:
        return
    matrices = dict(embedding_matrices(model))
    if matrices.keys() != started.values.keys():
        now, before = " and ".join(matrices), " and ".join(started.values)
        raise ModelError(f"embeddings were {before}, now they are {now}: the tie changed")
    for name, expected in started.values.items():
        found = matrices[name].detach()[list(started.ids.values())].to(expected.device, expected.dtype)
        wrong = [token for token, same in zip(started.ids, (found == expected).all(dim=1), strict=True) if not same]
        if wrong:
            raise ModelError(f"new tokens {', '.join(wrong)} lost their starting rows in the {name} matrix")
