"""From files to sets: every row is kept, or counted, or named in an error."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from src.config.schema import RunConfig
from src.data.dataset import Data, build_data
from src.data.encoding import IGNORE_INDEX
from src.data.examples import ExampleBuilder, fill
from src.data.formats import BadRow
from src.data.readers.record import Record
from src.data.splits import hold_out
from src.data.tokenizer import load_tokenizer
from src.errors import DataError
from tests.conftest import GSM8K, ROOT, admitted, read_lines, write_lines
from tests.kinds import words as word_tokenizer


def built(*overrides: str) -> tuple[RunConfig, Any, Data]:
    config = admitted(*overrides).config
    tokenizer, _ = load_tokenizer(config.model, config.tokens)
    return config, tokenizer, build_data(config, tokenizer)


def only(train: str, *overrides: str) -> list[str]:
    return [f"data.train_files=['{train}']", "data.validation_files=null", "data.test_files=null", *overrides]


ROWS = [{"prompt": f"{i}+1=", "completion": f"<ToW>{i} and one</ToW>{i + 1}"} for i in range(10)]


def test_the_same_rows_with_thoughts_without_and_with_other_tags(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "rows.jsonl", ROWS)

    def completion(*overrides: str) -> str:
        _, tokenizer, data = built(*only(file, *overrides))
        return tokenizer.decode([label for label in data.train[3].labels.tolist() if label != IGNORE_INDEX])

    assert completion() == "<ToW>3 and one</ToW>4</s>"
    assert completion("tokens=none") == "4</s>"
    assert completion("data.thoughts=drop") == "4</s>"
    assert completion("tokens=hcot") == "<hCoT>3 and one</hCoT>4</s>"


def test_the_report_accounts_for_every_row_and_token(tmp_path: Path) -> None:
    long = {"prompt": "x" * 200, "completion": "y"}
    file = write_lines(tmp_path / "rows.jsonl", [*ROWS, {"prompt": "say </s>", "completion": "z" * 200}, long])
    _, _, data = built(*only(file, "data.max_dropped_fraction=0.1", "data.max_seq_length=40"))
    report = data.reports["train"]
    assert (report.rows_read, report.rows_kept, report.rows_truncated) == (12, 11, 1)
    assert dict(report.rows_dropped) == {"no_supervised_token": 1}
    assert report.tokens == sum(len(data.train[i].input_ids) for i in range(11))
    assert report.supervised_tokens == data.train.supervised_lengths().sum()
    assert report.dropped_places == {"no_supervised_token": [f"{file}:12"]}
    assert report.new_tokens == {token: {"fed": 10, "supervised": 10} for token in ("<ToW>", "</ToW>")}
    assert report.control_tokens_as_text == 1
    json.dumps(report.as_dict())


def test_too_many_dropped_rows_stop_the_run_and_say_why(tmp_path: Path) -> None:
    rows = [*ROWS, *({"prompt": "x" * 200, "completion": "y"} for _ in range(3))]
    file = write_lines(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError) as caught:
        built(*only(file, "data.max_seq_length=40"))
    for words in (
        "3 of 13 rows",
        "no supervised token",
        "max_dropped_fraction = 0.05",
        "rows.jsonl:11",
        "data.overflow",
    ):
        assert words in str(caught.value)
    with pytest.raises(DataError, match=r"3 rows can't be used(.|\n)*rows.jsonl:11  longer than data.max_seq"):
        built(*only(file, "data.max_seq_length=40", "data.overflow=error"))
    _, _, data = built(*only(file, "data.max_seq_length=40", "data.overflow=drop", "data.max_dropped_fraction=0.3"))
    assert dict(data.reports["train"].rows_dropped) == {"too_long": 3}


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (b'{"prompt": "a", "completion": }', r"rows\.jsonl:3  not JSON: Expecting value, column 31"),
        (b'{"prompt": "a"', r"rows\.jsonl:3  not JSON"),
        (b'["a", "b"]', r"rows\.jsonl:3  a JSON object is needed, this is a list"),
        (b'{"prompt": "\xff", "completion": "b"}', r"rows\.jsonl:3  not UTF-8 \(byte 13\)"),
        (b'{"question": "a", "completion": "b"}', r"rows\.jsonl:3  no field 'prompt'; there are 'question', 'com"),
        (b'{"prompt": "a", "completion": null}', r"rows\.jsonl:3  'completion' is null, not a text"),
        (b'{"prompt": 3, "completion": "b"}', r"rows\.jsonl:3  'prompt' is a number, not a text"),
        (b'{"prompt": "a", "completion": ""}', r"rows\.jsonl:3  'completion' is empty"),
    ],
)  # fmt: skip
def test_a_bad_row_stops_the_run_by_file_and_line(tmp_path: Path, line: bytes, told: str) -> None:
    file = tmp_path / "rows.jsonl"
    good = json.dumps(ROWS[0]).encode()
    file.write_bytes(b"\n".join([good, b"", line, good]))
    with pytest.raises(DataError, match=told):
        built(*only(str(file)))


def test_the_first_ten_bad_rows_are_listed_and_the_rest_counted(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "rows.jsonl", [{"prompt": "a"}] * 25)
    with pytest.raises(DataError) as caught:
        built(*only(file))
    message = str(caught.value)
    assert message.startswith("25 rows can't be used")
    assert len(re.findall(r"rows\.jsonl:\d+", message)) == 10
    assert "and 15 more" in message


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_an_empty_set_is_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(content)
    with pytest.raises(DataError, match=r"train has no rows: .*rows\.jsonl"):
        built(*only(str(file)))


def test_a_share_of_train_is_held_out_by_seed(tmp_path: Path) -> None:
    assert hold_out(100, 0.1, seed=5).sum() == 10
    first, again, other = (hold_out(100, 0.1, seed).tolist() for seed in (5, 5, 6))
    assert first == again != other
    assert not hold_out(100, 0.0, seed=5).any()
    assert not hold_out(1, 0.5, seed=5).any()
    file = write_lines(tmp_path / "rows.jsonl", ROWS)
    _, _, data = built(*only(file, "data.validation_fraction=0.2"))
    assert (len(data.train), len(data.validation["validation"])) == (8, 2)
    held_out = data.validation["validation"]
    assert sorted([data.train.place(i) for i in range(8)] + [held_out.place(i) for i in range(2)]) == sorted(
        f"{file}:{i}" for i in range(1, 11)
    )
    assert (data.reports["train"].rows_read, data.reports["validation"].rows_read) == (8, 2)


def test_named_validation_sets_and_limit(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "rows.jsonl", ROWS)
    more = write_lines(tmp_path / "more.jsonl", ROWS)
    _, _, data = built(f"data.validation_files={{easy:['{file}'],hard:['{file}','{more}']}}", "data.limit=15")
    assert {name: len(rows) for name, rows in data.validation.items()} == {"easy": 10, "hard": 15}
    assert (len(data.train), len(data.test["test"])) == (15, 15)


def test_several_files_come_in_their_order(tmp_path: Path) -> None:
    files = [write_lines(tmp_path / f"{name}.jsonl", [{"prompt": name, "completion": "x"}]) for name in "ba"]
    _, _, data = built(*only("', '".join(files)))
    assert [data.train.prompt(i) for i in range(2)] == ["b", "a"]
    assert [data.train.place(i) for i in range(2)] == [f"{file}:1" for file in files]


def test_templates_and_columns() -> None:
    data = admitted(
        "data.columns={prompt:q,completion:a}",
        "data.prompt_template='question : {prompt} answer :'",
        "data.completion_template=' {completion}.'",
        "data.thought_pattern='<<(.*?)>>'",
    ).config.data
    examples = ExampleBuilder(data, ("<T>", "</T>"), None)
    example = examples.build(Record({"q": "{a} 1+1?", "a": "1+1=<<two>>2"}, "file", 1))
    assert example.prompt == "question : {a} 1+1? answer :"
    assert example.completion == " 1+1=<T>two</T>2."
    assert example.reference == " 1+1=2."
    with pytest.raises(BadRow, match=r"data\.columns\.prompt=FIELD"):
        examples.build(Record({"a": "b"}, "file", 1))


def test_braces_in_a_row_mean_nothing() -> None:
    assert fill("{a}{b}", {"a": "{b}", "b": "\\1 {a}"}) == "{b}\\1 {a}"


def test_a_validation_row_without_an_answer_is_named(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "no number"}])
    with pytest.raises(DataError, match=r"1 row of validation can't be used: no answer(.|\n)*rows\.jsonl:1"):
        built(f"data.validation_files=['{file}']", "data.answer_pattern='#### (.*)'")


def test_a_digest_follows_ids_and_labels(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "rows.jsonl", ROWS)
    digest = built(*only(file))[2].reports["train"].digest
    assert built(*only(file))[2].reports["train"].digest == digest
    assert built(*only(file, "data.thoughts=drop"))[2].reports["train"].digest != digest
    assert len(digest) <= 36  # MLflow's limit


def test_sums_of_validation_and_test_are_never_seen_in_training() -> None:
    def operands(split: str) -> list[frozenset[str]]:
        rows = read_lines(ROOT / "data" / "tow_addition" / f"{split}.jsonl")
        return [frozenset(row["prompt"].rstrip("=").split("+")) for row in rows]

    train, validation, test = map(operands, ("train", "validation", "test"))
    assert (len(validation), len(test)) == (500, 500)
    assert len({*train, *validation, *test}) == len(train) + len(validation) + len(test)


def test_the_working_of_a_sum_is_right() -> None:
    for row in read_lines(ROOT / "data" / "tow_addition" / "train.jsonl")[:500]:
        first, second = row["prompt"].rstrip("=").split("+")
        carry = 0
        columns = list(zip(reversed(first), reversed(second), strict=True))
        thoughts = re.findall("<ToW>(.*?)</ToW>", row["completion"])
        assert len(thoughts) == len(columns)
        for thought, (a, b) in zip(thoughts, columns, strict=True):
            total = int(a) + int(b) + carry
            assert thought == f"{a}+{b}+{carry}={total:02}"
            carry = total // 10
        assert re.sub("<ToW>.*?</ToW>", "", row["completion"]) == str(int(first) + int(second))


def test_the_data_script_writes_the_committed_files_again(tmp_path: Path) -> None:
    import subprocess
    import sys

    subprocess.run(
        [sys.executable, "data/make_tow_addition.py", "--out", str(tmp_path)], check=True, capture_output=True
    )
    for split in ("train", "validation", "test"):
        committed = ROOT / "data" / "tow_addition" / f"{split}.jsonl"
        assert (tmp_path / f"{split}.jsonl").read_bytes() == committed.read_bytes()


def test_the_tiny_tokenizer_gives_every_text_back() -> None:
    tokenizer = AutoTokenizer.from_pretrained("assets/tiny_llama")
    for text in ("4821+3977=", " a  b\n\t", "안녕하세요", "🙂👩‍👩‍👧", "\r\n\x00"):
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids[1:], clean_up_tokenization_spaces=False) == text


def test_a_tokenizer_that_changes_texts_is_told(tmp_path: Path) -> None:
    word_tokenizer().save_pretrained(tmp_path)
    shutil.copy(ROOT / "assets" / "tiny_llama" / "config.json", tmp_path)
    file = write_lines(
        tmp_path / "rows.jsonl", [{"prompt": "low", "completion": "ER"}, {"prompt": "", "completion": "a"}]
    )
    _, _, data = built(
        "model=causal_lm", f"model.checkpoint={tmp_path}", "model.weights=random", "tokens=none", *only(file)
    )
    assert data.reports["train"].rows_changed_by_tokenizer == 1
    assert "1 do not come back as they were from the tokenizer" in data.reports["train"].summary


@pytest.mark.skipif(not GSM8K.is_file(), reason="the GSM8K file is not beside this checkout")
def test_gsm8k_becomes_question_thoughts_and_answer() -> None:
    _, tokenizer, data = built(
        "data=gsm8k", f"data.train_files=['{GSM8K}']", "data.limit=50", "data.max_seq_length=1024"
    )
    train = data.train
    assert "<ToW>48/2=24</ToW>" in train.completion(0) + data.validation["validation"].completion(0)
    assert train.prompt(0).endswith("?\n")
    assert "<ToW>" not in train.reference(0)
    assert "<<" not in train.completion(0)
    row = train[0]
    assert tokenizer.decode(row.input_ids[1:-1]) == train.prompt(0) + train.completion(0)
    assert tokenizer.decode(row.labels[row.labels != IGNORE_INDEX]) == train.completion(0) + "</s>"


def test_a_held_out_set_of_which_nothing_is_left_is_told(tmp_path: Path) -> None:
    is_held_out = hold_out(40, 0.05, seed=42)
    rows = [{"prompt": "x" * (90 if is_held_out[i] else 2), "completion": "y"} for i in range(40)]
    file = write_lines(tmp_path / "rows.jsonl", rows)
    overrides = ["data.validation_fraction=0.05", "data.max_seq_length=40", "data.max_dropped_fraction=0.5"]
    with pytest.raises(DataError, match=r"every row that data\.validation_fraction holds out is dropped"):
        built(*only(file, *overrides))


def test_a_control_token_that_can_not_be_text_is_told_by_its_place(tmp_path: Path) -> None:
    tokenizer = word_tokenizer()
    tokenizer.eos_token = "b"  # one letter: there is no way to cut it
    rows = [{"prompt": "low", "completion": "er"}, {"prompt": "a", "completion": "b low"}]
    config = admitted(*only(write_lines(tmp_path / "rows.jsonl", rows)), "tokens=none").config
    with pytest.raises(
        DataError, match=r"1 row can't be used:\n.*rows\.jsonl:2  this tokenizer can't encode a control"
    ):
        build_data(config, tokenizer)
