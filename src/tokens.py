"""New special tokens: added to the tokenizer, given rows in the model, initialised, and read back.

Only rows of tokens that were really added are written, by their ids, in the input and the output matrix; what a
checkpoint has learned of a token it already knows is left alone. New tokens are added as ordinary added tokens, not
"special" ones: a decoder that skips special tokens must not swallow the tags of a thought.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerFast

from src.config.schema import InitMethod, ModelConfig, TokensConfig
from src.errors import ModelError, TokenError, one_line
from src.runtime.sharding import gathered, whole_shape


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
    where = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
    try:
        try:
            tokenizer = AutoTokenizer.from_pretrained(model.checkpoint, **where)
        except (
            TypeError
        ):  # its tokenizer.json is of another kind than the class it names (byte-level T5s): the file counts
            tokenizer = PreTrainedTokenizerFast.from_pretrained(model.checkpoint, **where)
    except Exception as error:  # the libraries raise many kinds
        raise ModelError(f"the tokenizer of {model.checkpoint} can't be loaded: {one_line(error)}") from error
    return tokenizer, add_tokens(tokenizer, tokens)


def add_tokens(tokenizer: Any, tokens: TokensConfig) -> NewTokens:
    """Add the tokens that the vocabulary does not have yet; each is one id ever after.

    Raises:
        TokenError: where one is a word of the model's text, or a thought's tag is not one id in the end.
    """
    vocabulary = tokenizer.get_vocab()
    known = {token: vocabulary[token] for token in tokens.additional_special_tokens if token in vocabulary}
    missing = [token for token in tokens.additional_special_tokens if token not in vocabulary]
    # a known token may be a mere vocabulary entry: marked as added, it is never cut into pieces
    whole = tokenizer.get_added_vocab()
    unmarked = [token for token in known if token not in whole]
    control = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token} & {
        tokens.thought_open,
        tokens.thought_close,
    }
    if control - {None}:
        raise TokenError(
            f"tokens: {', '.join(sorted(filter(None, control)))} begins, ends or pads the model's texts; it can't "
            "open or close thoughts"
        )
    texts = [token for token in unmarked if _is_text(tokenizer, token, known[token])]
    if texts:
        raise TokenError(
            f"tokens.additional_special_tokens: {', '.join(map(repr, texts))} {'is' if len(texts) == 1 else 'are'} "
            "ordinary text of this tokenizer; as a special token it would be cut out of other words too: choose a name "
            f"that no text has, such as <{texts[0].strip('<>')}>"
        )
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in [*unmarked, *missing]])
    for tag in filter(None, (tokens.thought_open, tokens.thought_close)):
        ids = tokenizer(tag, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise TokenError(
                f"tokens: {tag} opens or closes thoughts but is {len(ids)} tokens; "
                "name it in tokens.additional_special_tokens"
            )
    return NewTokens({token: tokenizer.convert_tokens_to_ids(token) for token in missing}, known)


@dataclass(frozen=True)
class Matrix:
    """The input or the output matrix of a model, also where an adapter trains some of its rows apart."""

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
    def apart(self) -> tuple[dict[int, int], nn.Parameter | None]:
        """Give the rows that an adapter trains in place of the matrix's own: id -> number, and the rows, [n, width]."""
        adapter = getattr(self.module, "token_adapter", None)
        if adapter is None:
            return {}, None
        (name,) = adapter.active_adapters
        return {i: n for n, i in enumerate(adapter.token_indices[name])}, adapter.trainable_tokens_delta[name]

    def rows(self, ids: Sequence[int]) -> Tensor:
        """Give some rows as the model uses them, [ids, width], a copy."""
        numbers, apart = self.apart
        with gathered([self.weight, *([] if apart is None else [apart])]):
            found = self.weight.detach()[list(ids)].clone()
            for i, token_id in enumerate(ids):
                if apart is not None and token_id in numbers:
                    found[i] = apart.detach()[numbers[token_id]]
        return found

    def gradient_norms(self, ids: Sequence[int]) -> Tensor:
        """Give the norm of each row's gradient, [ids]; 0 where it has none."""
        gradient = self.weight.grad
        device = self.weight.device
        norms = torch.zeros(len(ids), device=device) if gradient is None else gradient[list(ids)].float().norm(dim=1)
        numbers, apart = self.apart
        if apart is not None and apart.grad is not None:
            of_apart = apart.grad.float().norm(dim=1)
            norms = torch.stack([of_apart[numbers[i]] if i in numbers else norms[n] for n, i in enumerate(ids)])
        return norms


def embedding_matrices(model: Any) -> list[Matrix]:
    """Give every matrix that has a row for each token, once: input, an encoder's and a decoder's own, output."""
    found = {"input": model.get_input_embeddings()}
    found |= {name: stack.get_input_embeddings() for name, stack in _stacks(model).items()}
    found["output"] = model.get_output_embeddings()
    matrices = [Matrix(name, module) for name, module in found.items() if module is not None]
    return list({id(matrix.weight): matrix for matrix in reversed(matrices)}.values())[::-1]


def num_rows(model: Any) -> int:
    """Count the rows of a model's token matrix."""
    return whole_shape(embedding_matrices(model)[0].weight)[0]


def _stacks(model: Any) -> dict[str, Any]:
    """Give the halves of an encoder-decoder; none of another model."""
    return {"encoder": model.get_encoder(), "decoder": model.get_decoder()} if model.config.is_encoder_decoder else {}


def _is_text(tokenizer: Any, token: str, token_id: int) -> bool:
    """Whether ordinary text that holds these characters is encoded with this id."""
    texts = (token, f"{token}{token}", f" {token} ")
    return any(token_id in tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts)


def embedding_parameters(model: Any) -> list[nn.Parameter]:
    """Give what is trained of the matrices: all rows, or those that an adapter trains apart."""
    found = [m.weight if m.apart[1] is None else m.apart[1] for m in embedding_matrices(model)]
    return [parameter for parameter in found if parameter.requires_grad]


def fit_embeddings(model: Any, num_tokens: int, pad_to_multiple_of: int | None) -> None:
    """Make the matrices at least `num_tokens` rows long; one that has room is left as it is, never shrunk.

    Where encoder and decoder have matrices of their own (an untied BART), transformers 5.23 would put one in the place
    of all, and what they have learned would be lost. So they are put back, as long as the rest.
    """
    inputs = model.get_input_embeddings().weight
    if whole_shape(inputs)[0] >= num_tokens:
        return
    looked_up = [(stack, stack.get_input_embeddings()) for stack in _stacks(model).values()]
    own = [(stack, module) for stack, module in looked_up if module.weight is not inputs]
    model.resize_token_embeddings(num_tokens, pad_to_multiple_of=pad_to_multiple_of, mean_resizing=False)
    num_rows = whole_shape(model.get_input_embeddings().weight)[0]
    for stack, module in own:
        with gathered([module.weight]):
            old = module.weight.detach().clone()
        rest = old.new_zeros(num_rows - len(old), old.shape[1])  # of tokens that are written next, or padding
        module.weight, module.num_embeddings = nn.Parameter(torch.cat([old, rest])), num_rows
        stack.set_input_embeddings(module)


@dataclass(frozen=True)
class StartedRows:
    """The rows that were written: their tokens' ids, and by matrix the values, [tokens, width], to be read back."""

    ids: dict[str, int]
    values: dict[str, Tensor]


def as_they_are(model: Any, started: StartedRows) -> StartedRows:
    """Give the same tokens with their rows of now, of a model whose rows have been learned since they started."""
    ids = list(started.ids.values())
    return StartedRows(started.ids, {matrix.name: matrix.rows(ids) for matrix in embedding_matrices(model)})


def grow_embeddings(model: Any, tokenizer: Any, new: NewTokens, config: TokensConfig, seed: int) -> StartedRows:
    """Make room for the new tokens and write the starting rows of those that have no learned row yet.

    New rows are made from rows that the checkpoint has learned, never from padding or from one another. A token that
    the tokenizer knows but the matrix has no row for is as new as one that was added.

    Raises:
        TokenError: where a text gives no old token to start from.
    """
    num_rows = whole_shape(model.get_input_embeddings().weight)[0]
    started = {token: i for token, i in new.ids.items() if token in new.added or i >= num_rows}
    num_old = min([num_rows, *started.values()])
    fit_embeddings(model, len(tokenizer), config.pad_to_multiple_of)
    for matrix in embedding_matrices(model):  # padding: ordinary rows, or it could win where all logits are low
        with gathered([matrix.weight], writes=True), torch.no_grad():
            matrix.weight[max(num_rows, len(tokenizer)) :] = matrix.weight[:num_old].float().mean(dim=0)
    values: dict[str, Tensor] = {}
    if started:
        ids = list(started.values())
        pieces = source_ids(tokenizer, list(started), config, num_old)
        for offset, matrix in enumerate(embedding_matrices(model)):
            generator = torch.Generator().manual_seed(seed + offset)
            with gathered([matrix.weight], writes=True), torch.no_grad():
                rows = initial_rows(matrix.weight[:num_old], config.init.method, pieces, generator)
                matrix.weight[ids] = values[matrix.name] = rows.to(matrix.weight.dtype)
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

    What the model lies in may have fewer bits than what was written: the same, rounded, is right then.

    Raises:
        ModelError: naming the matrix and the tokens that do not start where they should.
    """
    if not started.ids:
        return
    matrices = {matrix.name: matrix for matrix in embedding_matrices(model)}
    if matrices.keys() != started.values.keys():
        now, before = " and ".join(matrices), " and ".join(started.values)
        raise ModelError(f"embeddings were {before}, now they are {now}: the tie changed")
    for name, expected in started.values.items():
        found = matrices[name].rows(list(started.ids.values()))
        is_same = (found == expected.to(found.device, found.dtype)).all(dim=1)
        wrong = [token for token, same in zip(started.ids, is_same, strict=True) if not same]
        if wrong:
            raise ModelError(f"new tokens {', '.join(wrong)} lost their starting rows in the {name} matrix")


class WatchedRows:
    """The rows of the configuration's tokens while they are trained: how far they are from where they started."""

    def __init__(self, model: Any, ids: Mapping[str, int]) -> None:
        self.ids = dict(ids)
        self._matrices = embedding_matrices(model) if ids else []
        self._start = {matrix.name: self._rows(matrix) for matrix in self._matrices}
        self._gradients: dict[str, Tensor] = {}

    def _rows(self, matrix: Matrix) -> Tensor:
        return matrix.rows(list(self.ids.values())).float()

    def see_gradients(self) -> None:
        """Take note of the gradients that an optimizer is about to use; nothing waits for the device."""
        self._gradients = {m.name: m.gradient_norms(list(self.ids.values())) for m in self._matrices}

    def forget_gradients(self) -> None:
        """Have no gradients to tell of: DeepSpeed shares them out, and no process has a row's own."""
        self._gradients = {}

    def state(self) -> dict[str, list[float]]:
        """Give what was noted of the last step, as plain values."""
        return {name: norms.tolist() for name, norms in self._gradients.items()}

    def restore(self, state: Mapping[str, Sequence[float]]) -> None:
        """Take up what `state` gave."""
        self._gradients = {name: torch.tensor(norms) for name, norms in state.items()}

    def telemetry(self) -> dict[str, float]:
        """Give `tokens/<token>/…` of every token: norm, cosine_to_start and grad_norm (of the last step, clipped); the
        output matrix's own, where it is not tied, as output_norm and so on."""
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
