"""The checkpoint's tokenizer, with the new special tokens added: each is one id, which no other token has.

New tokens are added as ordinary added tokens, not "special" ones: a decoder that skips special tokens must not swallow
the tags of a thought. Their ids follow the highest one, also where a vocabulary has holes (docs/decisions/0027).
"""

import json
import tempfile
from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer
from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerFast

from src.config.schema import ModelConfig, TokensConfig
from src.errors import ModelError, TokenError, one_line
from src.tokens import ConfiguredTokens, num_token_ids
from src.util import listed, plural


def load_tokenizer(model: ModelConfig, tokens: TokensConfig) -> tuple[Any, ConfiguredTokens]:
    """Load the checkpoint's tokenizer and add the new tokens to it.

    ModelError where it can't be loaded, TokenError where two tokens have one id, or a thought's tag is not one id.
    """
    hub_args = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
    try:
        try:
            tokenizer = AutoTokenizer.from_pretrained(model.checkpoint, **hub_args)
        except TypeError:  # its tokenizer.json is not of the class that it names (byte-level T5s): the file counts
            tokenizer = PreTrainedTokenizerFast.from_pretrained(model.checkpoint, **hub_args)
    except Exception as error:  # the libraries raise many kinds
        raise ModelError(f"the tokenizer of {model.checkpoint} can't be loaded: {one_line(error)}") from error
    if shared := _shared_ids(tokenizer.get_vocab()):
        raise TokenError(
            f"the tokenizer of {model.checkpoint} has one id for two tokens:\n{listed(shared)}\n"
            "What is learned of one would be learned of the other: its tokenizer.json must give each an id of its own "
            "(an added token gets the one that it has in the vocabulary of the file's `model`)"
        )
    return tokenizer, add_tokens(tokenizer, tokens)


def add_tokens(tokenizer: Any, tokens: TokensConfig) -> ConfiguredTokens:
    """Add the tokens that the vocabulary does not have yet, so that each is encoded as one id.

    TokenError where one is a word of the model's text or can't have an id of its own, or a thought's tag is not one id.
    """
    vocabulary = tokenizer.get_vocab()
    existing = {token: vocabulary[token] for token in tokens.additional_special_tokens if token in vocabulary}
    missing = [token for token in tokens.additional_special_tokens if token not in vocabulary]
    # an existing token may be a mere vocabulary entry: marked as added, it is never cut into pieces
    unmarked = [token for token in existing if token not in tokenizer.get_added_vocab()]
    _check_choice(tokenizer, tokens, {token: existing[token] for token in unmarked})
    first = num_token_ids(tokenizer)
    added = {token: first + n for n, token in enumerate(missing)}
    _add_with_ids(tokenizer, existing | added, [*unmarked, *missing])
    tags = {}
    for tag in filter(None, (tokens.thought_open, tokens.thought_close)):
        ids = tokenizer(tag, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise TokenError(
                f"tokens: {tag} opens or closes thoughts but is {plural(len(ids), 'token')}; "
                "name it in tokens.additional_special_tokens"
            )
        if tag not in existing | added:
            tags[tag] = ids[0]
    return ConfiguredTokens(added, existing, tags)


def _check_choice(tokenizer: Any, tokens: TokensConfig, unmarked: Mapping[str, int]) -> None:
    """Raise TokenError where a tag begins, ends or pads texts, or an `unmarked` token is a word of ordinary text."""
    control = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token} - {None}
    if tags := sorted(control & {tokens.thought_open, tokens.thought_close}):
        raise TokenError(
            f"tokens: {', '.join(tags)} begins, ends or pads the model's texts; it can't open or close thoughts"
        )
    if texts := [token for token, token_id in unmarked.items() if _is_text(tokenizer, token, token_id)]:
        raise TokenError(
            f"tokens.additional_special_tokens: {', '.join(map(repr, texts))} {'is' if len(texts) == 1 else 'are'} "
            "ordinary text of this tokenizer; as a special token it would be cut out of other words too: choose a name "
            f"that no text has, such as <{texts[0].strip('<>')}>"
        )


def _is_text(tokenizer: Any, token: str, token_id: int) -> bool:
    """Return whether ordinary text that holds these characters is encoded with this id."""
    texts = (token, f"{token}{token}", f" {token} ")
    return any(token_id in tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts)


def _shared_ids(vocabulary: Mapping[str, int]) -> list[str]:
    """Return a line for every token whose id another token has too."""
    first: dict[int, str] = {}
    return [
        f"{first[token_id]!r} and {token!r} are both {token_id}"
        for token, token_id in sorted(vocabulary.items())
        if first.setdefault(token_id, token) != token
    ]


def _add_with_ids(tokenizer: Any, ids: Mapping[str, int], new: list[str]) -> None:
    """Make the `new` tokens added ones, so that all keep their ids when saved and loaded; TokenError if they don't."""
    is_pinned = _counts_past_holes(tokenizer) and not ids.keys() <= tokenizer.get_vocab().keys()
    if is_pinned:
        _pin(tokenizer, tokenizer.get_added_vocab() | {token: ids[token] for token in new})
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in new])
    wrong = _other_ids(tokenizer.get_vocab(), ids)
    if is_pinned and not wrong:
        with tempfile.TemporaryDirectory() as folder:  # some classes build their vocabulary anew when they are loaded
            tokenizer.save_pretrained(folder)
            again = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)  # code that has run already, if any
        wrong = _other_ids(again.get_vocab(), tokenizer.get_vocab())
    if wrong:
        raise TokenError(
            f"tokens.additional_special_tokens: the ids of this tokenizer ({type(tokenizer).__name__}) have holes, and "
            f"it can't give a new token an id that is its own and lasts:\n{listed(wrong)}\nName tokens that it has "
            "already, such as reserved ones, or give its tokenizer.json a vocabulary without holes"
        )


def _other_ids(found: Mapping[str, int], ids: Mapping[str, int]) -> list[str]:
    """Return a line for each token whose id is not the one it should have, or is another token's too."""
    taken = {token_id: token for token, token_id in found.items() if token not in ids}
    lines = []
    for token, wanted in ids.items():
        got = found.get(token)
        if got is None:
            lines.append(f"{token!r} should be {wanted} and is no token")
        elif got != wanted or got in taken:
            shared = f", the id of {taken[got]!r}" if got in taken else ""
            lines.append(f"{token!r} should be {wanted} and is {got}{shared}")
    return lines


def _counts_past_holes(tokenizer: Any) -> bool:
    """Return whether the ids have holes, so that the library, which counts tokens, would give away one in use."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    own = tokenizer.get_vocab() if backend is None else backend.get_vocab(with_added_tokens=False)
    everything = tokenizer.get_vocab()
    return any(len(vocabulary) <= max(vocabulary.values(), default=-1) for vocabulary in (own, everything))


def _pin(tokenizer: Any, ids: Mapping[str, int]) -> None:
    """Write ids into the vocabulary itself: an added token that stands there keeps the id that it has there.

    A vocabulary that is a list (Unigram) has no room for ids of one's own.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    spec = {} if backend is None else json.loads(backend.to_str())
    vocabulary = spec.get("model", {}).get("vocab")
    if isinstance(vocabulary, dict):
        vocabulary |= ids
        tokenizer._tokenizer = Tokenizer.from_str(json.dumps(spec))
