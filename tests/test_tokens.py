"""New tokens: added once, started where they should, everything else untouched, noticed when lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from src.config.schema import InitMethod, RunConfig
from src.data.tokenizer import add_tokens, load_tokenizer
from src.errors import ModelError, TokenError
from src.model.embeddings import (
    InitialisedRows,
    check_new_rows,
    embedding_matrices,
    initial_rows,
    resize_and_initialise,
)
from src.tokens import ConfiguredTokens
from tests.conftest import admitted
from tests.kinds import byte_bpe, words


def model_of(*, tied: bool = False, vocab_size: int = 259) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained("assets/tiny_llama", tie_word_embeddings=tied, vocab_size=vocab_size)
    return AutoModelForCausalLM.from_config(config)


def weights_of(model: Any) -> dict[str, Tensor]:
    return {matrix.name: matrix.weight.detach() for matrix in embedding_matrices(model)}


def grown(config: RunConfig, model: Any) -> tuple[Any, Any, ConfiguredTokens, InitialisedRows, dict[str, Tensor]]:
    tokenizer, new = load_tokenizer(config.model, config.tokens)
    before = {name: weight.clone() for name, weight in weights_of(model).items()}
    return model, tokenizer, new, resize_and_initialise(model, tokenizer, new, config.tokens, seed=1), before


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("option", ["tow", "hcot"])
def test_new_rows_start_as_the_mean_of_the_text_and_old_rows_stay(tied: bool, option: str) -> None:
    model, tokenizer, new, started, before = grown(admitted(f"tokens={option}").config, model_of(tied=tied))
    opened, closed = {"tow": ("<ToW>", "</ToW>"), "hcot": ("<hCoT>", "</hCoT>")}[option]
    assert new.added == {opened: 259, closed: 260}
    assert set(started.values) == ({"input"} if tied else {"input", "output"})
    dash = tokenizer.convert_tokens_to_ids("-")
    for name, matrix in weights_of(model).items():
        assert matrix.shape == (264, 128)  # 261, padded to a multiple of 8
        assert torch.equal(matrix[:259], before[name])
        torch.testing.assert_close(matrix[261:], before[name].mean(dim=0).expand(3, -1))  # padding stays ordinary
        torch.testing.assert_close(matrix[259:261], before[name][dash].expand(2, -1))
    head = model.get_output_embeddings().weight
    assert (head is model.get_input_embeddings().weight) == tied
    check_new_rows(model, started)


def test_each_method_by_its_numbers() -> None:
    old = torch.tensor([[0.0, 0.0], [2.0, 4.0], [4.0, 8.0]])
    generator = torch.Generator().manual_seed(0)

    def rows(method: InitMethod, pieces: list[list[int]]) -> list[list[float]]:
        return initial_rows(old, method, [old[some] for some in pieces], generator).tolist()

    assert rows(InitMethod.text, [[1], [0, 2]]) == [[2.0, 4.0], [2.0, 4.0]]
    assert rows(InitMethod.description, [[2], [1, 2]]) == [[4.0, 8.0], [3.0, 6.0]]
    assert rows(InitMethod.text, [[1, 2], []]) == [[3.0, 6.0], [2.0, 4.0]]  # one that nobody named has no text
    assert rows(InitMethod.mean, [[], []]) == [[2.0, 4.0], [2.0, 4.0]]
    drawn = initial_rows(old, InitMethod.random, [old[:0]] * 4000, generator)
    torch.testing.assert_close(drawn.mean(dim=0), old.mean(dim=0), rtol=0, atol=0.25)
    torch.testing.assert_close(drawn.std(dim=0), old.std(dim=0), rtol=0.05, atol=0)


def test_one_text_for_each_token_and_descriptions() -> None:
    config = admitted("tokens.init.text=[ab,'=']").config
    model, tokenizer, _, _, before = grown(config, model_of())
    ids = tokenizer("ab=", add_special_tokens=False)["input_ids"]
    matrix = model.get_input_embeddings().weight
    torch.testing.assert_close(matrix[259], before["input"][ids[:2]].mean(dim=0))
    torch.testing.assert_close(matrix[260], before["input"][ids[2]])
    described = admitted("tokens.init.method=description").config
    model, tokenizer, _, _, before = grown(described, model_of())
    ids = tokenizer(described.tokens.init.descriptions["</ToW>"], add_special_tokens=False)["input_ids"]
    torch.testing.assert_close(model.get_input_embeddings().weight[260], before["input"][ids].mean(dim=0))


def test_a_matrix_that_has_room_is_not_resized() -> None:
    model, _, new, _, before = grown(admitted().config, model_of(vocab_size=300))
    assert model.get_input_embeddings().weight.shape[0] == 300
    assert list(new.added.values()) == [259, 260]
    assert torch.equal(model.get_input_embeddings().weight[261:], before["input"][261:])


def test_without_padding_there_are_as_many_rows_as_tokens() -> None:
    model, *_ = grown(admitted("tokens.pad_to_multiple_of=null").config, model_of())
    assert model.get_input_embeddings().weight.shape[0] == 261
    assert model.config.vocab_size == 261


def test_what_a_checkpoint_has_learned_of_a_token_is_kept(tmp_path: Path) -> None:
    model, tokenizer, _, _, _ = grown(admitted().config, model_of())
    with torch.no_grad():
        for matrix in weights_of(model).values():
            matrix[259:261] = torch.tensor([[7.0], [8.0]])
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    config = admitted(
        "model=causal_lm",
        f"model.checkpoint={tmp_path}",
        "tokens.additional_special_tokens=['<ToW>','</ToW>','<new>']",
        "tokens.init.method=mean",
    ).config
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    loaded, _, new, started, _ = grown(config, loaded)
    assert new.existing == {"<ToW>": 259, "</ToW>": 260}
    assert new.added == {"<new>": 261}
    for name, matrix in weights_of(loaded).items():
        assert (matrix[259] == 7.0).all()
        assert (matrix[260] == 8.0).all()
        torch.testing.assert_close(matrix[261], matrix[:261].mean(dim=0))
        assert torch.equal(matrix[261:262], started.values[name])


def test_texts_belong_to_their_tokens_when_some_are_known(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained("assets/tiny_llama")
    tokenizer.add_tokens(["<ToW>", "</ToW>"])
    config = admitted("tokens.additional_special_tokens=['<ToW>','</ToW>','<new>']", "tokens.init.text=[a,b,c]").config
    new = add_tokens(tokenizer, config.tokens)
    model = model_of(vocab_size=261)
    before = model.get_input_embeddings().weight.detach().clone()
    started = resize_and_initialise(model, tokenizer, new, config.tokens, seed=1)
    assert started.ids == {"<new>": 261}
    c = tokenizer.convert_tokens_to_ids("c")
    torch.testing.assert_close(model.get_input_embeddings().weight[261], before[c])


def test_a_token_that_the_tokenizer_knows_but_the_matrix_has_no_row_for_starts_as_a_new_one() -> None:
    tokenizer = AutoTokenizer.from_pretrained("assets/tiny_llama")
    tokenizer.add_tokens(["<ToW>", "</ToW>"])
    tokens = admitted().config.tokens
    new = add_tokens(tokenizer, tokens)
    assert (new.added, new.existing) == ({}, {"<ToW>": 259, "</ToW>": 260})
    model = model_of()
    started = resize_and_initialise(model, tokenizer, new, tokens, seed=1)
    assert started.ids == new.existing
    dash = model.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids("-")]
    torch.testing.assert_close(model.get_input_embeddings().weight[259], dash)


def test_special_tokens_of_the_checkpoint_stay_special() -> None:
    tokenizer = AutoTokenizer.from_pretrained("assets/tiny_llama")
    add_tokens(tokenizer, admitted("tokens.additional_special_tokens=['</s>','<ToW>','</ToW>']").config.tokens)
    assert tokenizer.decode([2, 2], skip_special_tokens=True) == ""


def test_tags_are_one_id_survive_saving_and_are_not_skipped(tmp_path: Path) -> None:
    config = admitted().config
    tokenizer, new = load_tokenizer(config.model, config.tokens)
    tokenizer.save_pretrained(tmp_path)
    plain = AutoTokenizer.from_pretrained(tmp_path)
    for tag, token_id in new.added.items():
        assert plain(tag, add_special_tokens=False)["input_ids"] == [token_id]
    ids = plain("a<ToW>b</ToW>c")["input_ids"]
    assert plain.decode(ids, skip_special_tokens=True) == "a<ToW>b</ToW>c"


def test_a_vocabulary_entry_that_was_never_whole_becomes_one_id() -> None:
    tokenizer = words()
    tokens = admitted(
        "tokens.additional_special_tokens=['<New>',new]", "tokens.thought_open='<New>'", "tokens.thought_close=new"
    ).config.tokens
    assert 7 not in tokenizer("a <New> b", add_special_tokens=False)["input_ids"]  # texts are put in lower case
    new = add_tokens(tokenizer, tokens)
    assert new.existing == {"<New>": 7}
    assert tokenizer("a<New>bnew", add_special_tokens=False)["input_ids"] == [4, 7, 5, new.added["new"]]


@pytest.mark.parametrize("token", ["low", "---"])
def test_a_word_of_the_model_is_no_special_token(token: str) -> None:
    tokens = admitted(f"tokens.additional_special_tokens=['<ToW>','{token}','</ToW>']").config.tokens
    with pytest.raises(TokenError, match=f"'{token}' is ordinary text of this tokenizer.* choose a name .*<{token}>"):
        add_tokens(words(), tokens)


def test_a_tag_that_is_many_tokens_is_refused() -> None:
    tokens = admitted("tokens.additional_special_tokens=[]").config.tokens
    tokenizer = AutoTokenizer.from_pretrained("assets/tiny_llama")
    with pytest.raises(TokenError, match="<ToW> opens or closes thoughts but is 5 tokens"):
        add_tokens(tokenizer, tokens)


def test_a_tokenizer_of_another_kind_than_its_class_is_read_by_its_file(tmp_path: Path) -> None:
    """Byte-level BPE under T5's class, as Korean T5s have it, which transformers 5.23 does not construct."""
    byte_bpe().save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": "T5TokenizerFast"}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    with pytest.raises(TypeError):
        AutoTokenizer.from_pretrained(tmp_path)
    config = admitted("model=causal_lm", f"model.checkpoint={tmp_path}", "model.weights=random").config
    tokenizer, new = load_tokenizer(config.model, config.tokens)
    assert tokenizer("안녕 <ToW>")["input_ids"][-1] == new.added["<ToW>"]


def test_what_ends_a_text_closes_no_thought() -> None:
    tokens = admitted("tokens.additional_special_tokens=['<T>','</s>']", "tokens.thought_open='<T>'",
                      "tokens.thought_close='</s>'").config.tokens  # fmt: skip
    with pytest.raises(
        TokenError, match="</s> begins, ends or pads the model's texts; it can't open or close thoughts"
    ):
        add_tokens(AutoTokenizer.from_pretrained("assets/tiny_llama"), tokens)


def test_rows_that_were_lost_are_noticed() -> None:
    model, _, _, started, _ = grown(admitted().config, model_of())
    with torch.no_grad():
        model.get_output_embeddings().weight[260] += 1e-3
    with pytest.raises(ModelError, match="</ToW> lost their starting rows in the output matrix"):
        check_new_rows(model, started)


def test_tying_that_appears_after_the_rows_were_written_is_noticed() -> None:
    model, _, _, started, _ = grown(admitted().config, model_of())
    model.get_output_embeddings().weight = model.get_input_embeddings().weight
    with pytest.raises(ModelError, match="tie changed"):
        check_new_rows(model, started)


def test_random_rows_come_from_the_seed() -> None:
    config = admitted("tokens.init.method=random").config
    first, again = (grown(config, model_of())[3].values for _ in range(2))
    assert torch.equal(first["input"], again["input"])
    assert not torch.equal(first["input"], first["output"])
