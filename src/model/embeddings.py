"""The embedding matrices: resized, initialised for new tokens, read back, monitored.

Only rows of the initialised tokens are written, by their ids, in every matrix, and rows that did not exist before; what
a checkpoint has trained stays bit for bit.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from src.config.schema import InitMethod, TokensConfig
from src.errors import ModelError, TokenError
from src.runtime.sharding import full_shape, gathered
from src.tokens import ConfiguredTokens, num_token_ids
from src.util import in_words


@dataclass(frozen=True)
class Matrix:
    """The input or the output matrix of a model, also where an adapter trains some of its rows."""

    name: str
    module: Any

    @property
    def weight(self) -> nn.Parameter:
        """All rows, [rows, width], as they were before an adapter."""
        module = self.module
        while inner := getattr(module, "token_adapter", getattr(module, "base_layer", None)):  # PEFT's wrappers
            module = inner
        return module.weight

    @property
    def adapter_rows(self) -> tuple[dict[int, int], nn.Parameter | None]:
        """Rows that an adapter trains in place of the matrix's own: id -> index, and the rows, [n, width]."""
        adapter = getattr(self.module, "token_adapter", None)
        if adapter is None:
            return {}, None
        (name,) = adapter.active_adapters
        return {i: n for n, i in enumerate(adapter.token_indices[name])}, adapter.trainable_tokens_delta[name]

    def rows(self, ids: Sequence[int]) -> Tensor:
        """Return some rows as the model uses them, [ids, width], a copy."""
        indices, trained = self.adapter_rows
        with gathered([self.weight, *([] if trained is None else [trained])]):
            found = self.weight.detach()[list(ids)].clone()
            for i, token_id in enumerate(ids):
                if trained is not None and token_id in indices:
                    found[i] = trained.detach()[indices[token_id]]
        return found

    def gradient_norms(self, ids: Sequence[int]) -> Tensor:
        """Return the norm of each row's gradient, [ids]; 0 where it has none."""
        gradient = self.weight.grad
        device = self.weight.device
        norms = torch.zeros(len(ids), device=device) if gradient is None else gradient[list(ids)].float().norm(dim=1)
        indices, trained = self.adapter_rows
        if trained is not None and trained.grad is not None:
            trained_norms = trained.grad.float().norm(dim=1)
            norms = torch.stack([trained_norms[indices[i]] if i in indices else norms[n] for n, i in enumerate(ids)])
        return norms


def embedding_matrices(model: Any) -> list[Matrix]:
    """Return every matrix that has a row for each token, once: input, an encoder's and a decoder's own, output."""
    found = {"input": model.get_input_embeddings()}
    found |= {name: stack.get_input_embeddings() for name, stack in _stacks(model).items()}
    found["output"] = model.get_output_embeddings()
    matrices = [Matrix(name, module) for name, module in found.items() if module is not None]
    return list({id(matrix.weight): matrix for matrix in reversed(matrices)}.values())[::-1]


def num_embedding_rows(model: Any) -> int:
    """Return the number of rows of a model's token matrix."""
    return full_shape(embedding_matrices(model)[0].weight)[0]


def _stacks(model: Any) -> dict[str, Any]:
    """Return the halves of an encoder-decoder; none of another model."""
    return {"encoder": model.get_encoder(), "decoder": model.get_decoder()} if model.config.is_encoder_decoder else {}


def embedding_parameters(model: Any) -> list[nn.Parameter]:
    """Return the trained parameters of the matrices: all rows, or those that an adapter trains."""
    found = [m.weight if m.adapter_rows[1] is None else m.adapter_rows[1] for m in embedding_matrices(model)]
    return [parameter for parameter in found if parameter.requires_grad]


def is_tied(model: Any) -> bool:
    """Return whether input and output matrix are one parameter."""
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


@contextmanager
def true_tie_flag(model: Any) -> Iterator[None]:
    """Set the configuration's tie_word_embeddings in this block to whether input and output matrix are really one.

    Some configurations of transformers 5.23 always claim that (T5's), also where a checkpoint has two: one of them
    would be lost when the model is resized, and PEFT would put the same rows into both.
    """
    flag = model.config.tie_word_embeddings
    model.config.tie_word_embeddings = flag and (model.get_output_embeddings() is None or is_tied(model))
    try:
        yield
    finally:
        model.config.tie_word_embeddings = flag


def resize_embeddings(
    model: Any, num_tokens: int, pad_to_multiple_of: int | None = None, *, cuts: bool = False
) -> None:
    """Resize the matrices to at least `num_tokens` rows; larger ones are shrunk only where it `cuts`.

    Where encoder and decoder have matrices of their own (an untied BART), transformers 5.23 would replace all by one,
    and what they have learned would be lost. So they are put back, resized too.
    """
    inputs = model.get_input_embeddings().weight
    if full_shape(inputs)[0] >= num_tokens and not cuts:
        return
    looked_up = [(stack, stack.get_input_embeddings()) for stack in _stacks(model).values()]
    own = [(stack, module) for stack, module in looked_up if module.weight is not inputs]
    with true_tie_flag(model):
        model.resize_token_embeddings(num_tokens, pad_to_multiple_of=pad_to_multiple_of, mean_resizing=False)
    size = full_shape(model.get_input_embeddings().weight)[0]
    for stack, module in own:
        with gathered([module.weight]):
            old = module.weight.detach().clone()
        rest = old.new_zeros(max(0, size - len(old)), old.shape[1])  # of tokens that are initialised next, or padding
        module.weight, module.num_embeddings = nn.Parameter(torch.cat([old[:size], rest])), size
        stack.set_input_embeddings(module)


@dataclass(frozen=True)
class InitialisedRows:
    """The tokens whose rows were initialised."""

    ids: dict[str, int]  # by token
    sources: dict[str, list[int]]  # ids of the tokens that each started from; empty where it started from no text
    values: dict[str, Tensor]  # the rows by matrix, [tokens, width], to be read back


def reread_rows(model: Any, initialised: InitialisedRows) -> InitialisedRows:
    """Return the same tokens with their rows as they are now, in a model into which trained weights were loaded."""
    ids = list(initialised.ids.values())
    return replace(initialised, values={matrix.name: matrix.rows(ids) for matrix in embedding_matrices(model)})


def resize_and_initialise(
    model: Any, tokenizer: Any, new: ConfiguredTokens, config: TokensConfig, seed: int, untrained: Collection[str] = ()
) -> InitialisedRows:
    """Make room for all tokens and initialise the rows of those that have no pretrained row yet.

    They start from rows that the checkpoint has trained, never from padding or from one another. A token that the
    tokenizer knows but the matrix has no row for, or one whose row the checkpoint never trained (`untrained`, see
    src.model.untrained), is as new as an added one. One that the configuration does not name starts from the mean.
    No other row is written. TokenError says that a text has no pretrained token to start from.
    """
    num_old = full_shape(model.get_input_embeddings().weight)[0]
    vocabulary = tokenizer.get_vocab()
    initialised = {token: i for token, i in new.ids.items() if token in new.added or i >= num_old or token in untrained}
    initialised |= {tag: i for tag, i in new.tags.items() if tag in untrained}
    without_row = sorted((i, token) for token, i in vocabulary.items() if i >= num_old and token not in initialised)
    initialised |= {token: i for i, token in without_row}
    pretrained = sorted({i for token, i in vocabulary.items() if token not in initialised and token not in untrained})
    sources = dict(zip(initialised, source_ids(tokenizer, list(initialised), config, pretrained), strict=True))
    resize_embeddings(model, num_token_ids(tokenizer), config.pad_to_multiple_of)
    ids, values = list(initialised.values()), {}
    padding = sorted(set(range(num_old, num_embedding_rows(model))) - set(ids))
    for offset, matrix in enumerate(embedding_matrices(model) if ids or padding else []):
        generator = torch.Generator().manual_seed(seed + offset)
        with gathered([matrix.weight], writes=True), torch.no_grad():
            # ids that are 0 … n-1 without a gap are a slice, which copies nothing
            is_slice = pretrained[-1] < len(pretrained)
            known = matrix.weight[: len(pretrained)] if is_slice else matrix.weight[pretrained]
            if padding:  # ordinary rows, or it could win where all logits are low
                matrix.weight[padding] = known.float().mean(dim=0).to(matrix.weight.dtype)
            if ids:
                source_rows = [matrix.weight[token_ids] for token_ids in sources.values()]
                rows = initial_rows(known, config.init.method, source_rows, generator)
                matrix.weight[ids] = values[matrix.name] = rows.to(matrix.weight.dtype)
    return InitialisedRows(initialised, sources, values)


def source_ids(
    tokenizer: Any, initialised: Sequence[str], config: TokensConfig, pretrained: Collection[int]
) -> list[list[int]]:
    """Return for each token the ids whose rows it starts from; empty where it does not start from a text.

    They are `pretrained`: the checkpoint has trained their rows. TokenError says that a text has no such token.
    """
    init, named = config.init, config.additional_special_tokens
    texts: dict[str, str] = {}
    if init.method is InitMethod.text:
        texts = dict(zip(named, init.text * len(named) if len(init.text) == 1 else init.text, strict=True))
    elif init.method is InitMethod.description:
        texts = dict(init.descriptions)
    usable, sources = set(pretrained), []
    for token in initialised:
        text = texts.get(token)
        ids = [] if text is None else tokenizer(text, add_special_tokens=False)["input_ids"]
        sources.append([i for i in ids if i in usable])
        if text is not None and not sources[-1]:
            raise TokenError(f"tokens.init: {text!r} has no pretrained token for {token} to start from")
    return sources


def initial_rows(
    known: Tensor, method: InitMethod, source_rows: Sequence[Tensor], generator: torch.Generator
) -> Tensor:
    """Compute the initial rows of new tokens. Pure.

    Args:
        known: the rows the checkpoint has trained, [known, width].
        method: text and description take the mean of each token's `source_rows`; mean, and a token without source rows,
            the mean of all known rows; random draws from a normal with their mean and standard deviation, per column.
        source_rows: for each new token the rows it starts from, [sources, width].
        generator: used by random only.
    Returns:
        float32 rows, [len(source_rows), width].
    """
    if method in (InitMethod.text, InitMethod.description) and all(map(len, source_rows)):
        return torch.stack([rows.float().mean(dim=0) for rows in source_rows])
    mean = known.float().mean(dim=0)
    if method is InitMethod.random:
        noise = torch.randn(len(source_rows), known.shape[1], generator=generator).to(known.device)
        return mean + noise * known.float().std(dim=0)
    return torch.stack([rows.float().mean(dim=0) if len(rows) else mean for rows in source_rows])


def check_new_rows(model: Any, initialised: InitialisedRows) -> None:
    """Read the new rows back from the wrapped model, and compare them bit for bit with what was written.

    Where the model's type has fewer bits now, the rows are compared rounded to it. ModelError names the matrix and the
    tokens that do not start where they should.
    """
    if not initialised.ids:
        return
    matrices = {matrix.name: matrix for matrix in embedding_matrices(model)}
    if matrices.keys() != initialised.values.keys():
        now, before = in_words(matrices), in_words(initialised.values)
        raise ModelError(f"embeddings were {before}, now they are {now}: the tie changed")
    for name, expected in initialised.values.items():
        found = matrices[name].rows(list(initialised.ids.values()))
        is_same = (found == expected.to(found.device, found.dtype)).all(dim=1)
        wrong = [token for token, same in zip(initialised.ids, is_same, strict=True) if not same]
        if wrong:
            raise ModelError(f"new tokens {', '.join(wrong)} lost their starting rows in the {name} matrix")


class TokenMonitor:
    """Metrics of the rows of the configuration's tokens: how far training has moved them from where they started."""

    def __init__(self, model: Any, ids: Mapping[str, int]) -> None:
        self.ids = dict(ids)
        self._matrices = embedding_matrices(model) if ids else []
        self._start = {matrix.name: self._rows(matrix) for matrix in self._matrices}
        self._gradients: dict[str, Tensor] = {}

    def _rows(self, matrix: Matrix) -> Tensor:
        return matrix.rows(list(self.ids.values())).float()

    def record_gradients(self, *, are_whole: bool) -> None:
        """Keep the norms of the gradients before the update, without waiting for the device; of sharded ones none."""
        matrices = self._matrices if are_whole else []
        self._gradients = {m.name: m.gradient_norms(list(self.ids.values())) for m in matrices}

    def state(self) -> dict[str, list[float]]:
        """Return the norms of the last step, as plain values."""
        return {name: norms.tolist() for name, norms in self._gradients.items()}

    def restore(self, state: Mapping[str, Sequence[float]]) -> None:
        """Restore what `state` returned."""
        self._gradients = {name: torch.tensor(norms) for name, norms in state.items()}

    def metrics(self) -> dict[str, float]:
        """Return `tokens/<token>/…` of every token: norm, cosine_to_start and grad_norm (of the last step, clipped).

        The output matrix's own, where it is not tied, are output_norm and so on.
        """
        metrics = {}
        for matrix in self._matrices:
            rows, start = self._rows(matrix), self._start[matrix.name]
            values = {
                "norm": rows.norm(dim=1),
                "cosine_to_start": functional.cosine_similarity(rows, start.to(rows.device), dim=1),
            }
            if matrix.name in self._gradients:
                values["grad_norm"] = self._gradients[matrix.name]
            prefix = "" if matrix.name == "input" else f"{matrix.name}_"
            for name, of_tokens in values.items():
                for token, value in zip(self.ids, of_tokens.tolist(), strict=True):
                    metrics[f"tokens/{token}/{prefix}{name}"] = value
        return metrics
