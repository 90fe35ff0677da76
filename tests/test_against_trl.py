"""The same rows through TRL's own SFTTrainer: ids and labels are the same, one by one.

What TRL 1.16 does, found by running it: plain texts are tokenised as prompt + completion + EOS in one piece, with the
tokenizer's own BOS in front, and learned from where this parts with the prompt tokenised alone. Messages get what the
template writes and nothing else, neither BOS nor EOS, and `{% generation %}` says what is learned.

The rows are those on which there is one right answer: no control token stands in a text, no token of a prompt merges
with its completion, a template writes BOS where the tokenizer would (Towline adds it where one forgets), and what is
learned ends with an ASCII character (of any other, transformers' mask leaves out all bytes but the first).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle, islice, product
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken
from transformers import AutoConfig, LlamaForCausalLM

from src.data.dataset import build_data
from src.data.tokenizer import load_tokenizer
from tests.conftest import GSM8K, admitted, read_lines, write_lines
from tests.kinds import byte_bpe, character_level

pytest.importorskip("trl", reason="trl is an optional extra of the project")

Row = dict[str, Any]

PROMPTS = [
    "",
    "What is 12 plus 30?\n",
    "Q: low lower lowest?",
    "세계에서 가장 긴 강은?\n",
    "Say 안녕하세요 in English:",
    "🚢⚓ tow this 👩‍👩‍👧‍👦 line\n\n",
    "def f(x):\n    return x + 1\n\n\n# what is f(1)?\n",
    "  a\tb \u00a0c  \r\n",
    "{prompt} <<not a thought>> {% raw %} \\n\n",
]
COMPLETIONS = ["It is 42.", " 42", "안녕하세요 세계", "🚢 e\u0301 👩‍👩‍👧‍👦", "def f(x):\n\treturn x\n", "a\n\nb  c \n"]
PAIRS = [{"prompt": prompt, "completion": completion} for prompt, completion in product(PROMPTS, COMPLETIONS)]

ROLES_AND_EOS = """\
{{ bos_token }}{% for message in messages %}
<|{{ message.role }}|>
{% if message.role == 'assistant' %}
{% generation %}{{ message.content + eos_token }}{% endgeneration %}

{% else %}
{{ message.content + eos_token }}
{% endif %}
{% endfor %}
{% if add_generation_prompt %}
<|assistant|>
{% endif %}"""
"""BOS by the template, EOS behind every turn, roles in plain letters; as Zephyr has it."""

CHATML = """\
{{ bos_token }}
{%- if messages[0].role != 'system' %}
{{ '<|im_start|>system\\nYou help.<|im_end|>\\n' }}
{%- endif %}
{% for message in messages %}
{{ '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' %}
{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}
{%- else %}
{{ message.content + '<|im_end|>\\n' }}
{%- endif %}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\\n' }}
{%- endif %}"""
"""Turns between tokens of their own, no EOS, a system turn where the row has none; as Qwen has it."""


def bpe_without_bos() -> Any:
    return byte_bpe(bos=False)


def trl_rows(rows: list[Row], tokenizer: Any, folder: Path, **settings: Any) -> list[tuple[list[int], list[int]]]:
    """Give input_ids and labels of rows as SFTTrainer would feed them to the model."""
    from accelerate.state import AcceleratorState
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    arguments = SFTConfig(
        output_dir=str(folder / "trl"),
        report_to="none",
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
        disable_tqdm=True,
        **settings,
    )
    model = LlamaForCausalLM(AutoConfig.from_pretrained("assets/tiny_llama"))
    try:
        trainer = SFTTrainer(model, arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
        batches = [trainer.data_collator([row]) for row in trainer.train_dataset]
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)  # other tests choose their device afresh
    return [(batch["input_ids"][0].tolist(), batch["labels"][0].tolist()) for batch in batches]


def towline_rows(rows: list[Row], folder: Path, *overrides: str) -> list[tuple[list[int], list[int]]]:
    """Give input_ids and labels of rows as Towline would, with the tokenizer that lies in the folder."""
    file = write_lines(folder / "rows.jsonl", rows)
    checkpoint = [f"model.checkpoint={folder / 'model'}", "model.weights=random", "tokens=none"]
    config = admitted(f"data.train_files=['{file}']", *checkpoint, *overrides).config
    tokenizer, _ = load_tokenizer(config.model, config.tokens)
    train = build_data(config, tokenizer).train
    return [(row.input_ids.tolist(), row.labels.tolist()) for row in (train[i] for i in range(len(train)))]


def save(tokenizer: Any, folder: Path) -> Any:
    """Make the model folder that Towline is given, with this tokenizer."""
    AutoConfig.from_pretrained("assets/tiny_llama").save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return tokenizer


def differing(theirs: list[Any], ours: list[Any]) -> list[Any]:
    """Give the first rows that differ, for a message that can be read."""
    assert len(theirs) == len(ours)
    return [(i, *both) for i, both in enumerate(zip(theirs, ours, strict=True)) if both[0] != both[1]][:2]


def gsm8k(count: int) -> list[Row]:
    """Give questions and answers of GSM8K as prompts and completions, where the data is here."""
    rows = read_lines(GSM8K)[:count] if GSM8K.is_file() else []
    return [{"prompt": row["question"] + "\n", "completion": row["answer"]} for row in rows]


def conversations(pairs: list[Row]) -> list[Row]:
    """Put pairs together to rows of one to three turns, some with a system message in front."""
    rows: list[Row] = []
    turns, systems, left = cycle([1, 2, 3]), cycle([None, "Calculate.\n", "한국어로 답하세요. 🙂", None]), iter(pairs)
    while some := list(islice(left, next(turns))):
        system = next(systems)
        messages = [{"role": "system", "content": system}] if system else []
        for pair in some:
            messages.append({"role": "user", "content": pair["prompt"]})
            messages.append({"role": "assistant", "content": pair["completion"]})
        rows.append({"messages": messages})
    return rows


@pytest.mark.parametrize("max_length", [1024, 40])
@pytest.mark.parametrize("kind", [character_level, byte_bpe])
def test_prompt_and_completion_as_trl_has_them(tmp_path: Path, kind: Callable[[], Any], max_length: int) -> None:
    rows = [*PAIRS, *gsm8k(30)]
    theirs = trl_rows(rows, save(kind(), tmp_path), tmp_path, max_length=max_length)
    limits = [f"data.max_seq_length={max_length}", "data.max_dropped_fraction=1"]
    assert differing(theirs, towline_rows(rows, tmp_path, "data=prompt_completion", *limits)) == []
    assert (len(theirs) == len(rows)) is (max_length == 1024)  # cut to 40, a long prompt leaves nothing to learn


@pytest.mark.parametrize("template", [ROLES_AND_EOS, CHATML], ids=["roles_and_eos", "chatml"])
@pytest.mark.parametrize("kind", [character_level, byte_bpe, bpe_without_bos])
def test_messages_as_trl_has_them(tmp_path: Path, kind: Callable[[], Any], template: str) -> None:
    rows = conversations([*(pair for pair in PAIRS if pair["prompt"]), *gsm8k(30)])
    tokenizer = kind()
    tokenizer.add_tokens([AddedToken(f"<|im_{end}|>", normalized=False, special=True) for end in ("start", "end")])
    tokenizer.chat_template = template
    theirs = trl_rows(rows, save(tokenizer, tmp_path), tmp_path, max_length=4096, assistant_only_loss=True)
    as_trl = ["data.max_seq_length=4096", "data.supervised_turns=all"]
    assert differing(theirs, towline_rows(rows, tmp_path, "data=messages", *as_trl)) == []
