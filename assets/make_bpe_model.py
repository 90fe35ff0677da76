"""Make a complete local model folder from text: a trained byte-level BPE tokenizer and a small random Llama.

Where no pretrained model is at hand, this gives a folder that plain from_pretrained loads, with a tokenizer in the
style of GPT-2 and Llama 3 (words split by regular expression, then merges of bytes) whose tokens cover whole words of
the text, unlike the character-level assets/tiny_llama. The weights are random: it is a start for training.

Run: python assets/make_bpe_model.py --text train.jsonl --fields question,answer --out model_folder
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

PAD, BOS, EOS = "<|pad|>", "<|bos|>", "<|eos|>"
MAX_POSITIONS = 1024
MIN_VOCAB = 256 + 3  # every byte and the special tokens


class InputError(Exception):
    """Something the caller can put right; its text is the whole message."""


def read_texts(path: Path, fields: list[str]) -> Iterator[str]:
    """Yield the texts of one file: its named fields for JSONL, else its lines."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text") from None
    if not fields:
        yield from (line + "\n" for line in lines)
        return
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            raise InputError(f"{path}:{number}: not a line of JSON") from None
        for field in fields:
            if not isinstance(row, dict) or not isinstance(row.get(field), str):
                known = [key for key, value in row.items() if isinstance(value, str)] if isinstance(row, dict) else []
                raise InputError(
                    f"{path}:{number}: no text field {field!r} (text fields here: {', '.join(known) or 'none'})"
                )
            yield row[field]


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train byte-level BPE; ids 0 to 2 are the special tokens, then come the 256 bytes, then the merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in (PAD, BOS, EOS)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B:1", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        padding_side="right",
        model_max_length=MAX_POSITIONS,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def build_model(
    tokenizer: PreTrainedTokenizerFast, hidden: int, layers: int, heads: int, seed: int
) -> LlamaForCausalLM:
    """A Llama with tied embeddings and random weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        attention_dropout=0.0,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        dtype="float32",
    )
    return LlamaForCausalLM(config)


def make(args: argparse.Namespace) -> None:
    """Check everything that can be wrong before the folder is touched, then write it."""
    if args.vocab_size < MIN_VOCAB:
        raise InputError(f"--vocab-size must be at least {MIN_VOCAB}, got {args.vocab_size}")
    if min(args.hidden_size, args.layers, args.heads) < 1:
        raise InputError("--hidden-size, --layers and --heads must be at least 1")
    if args.hidden_size % (2 * args.heads):
        raise InputError(f"--hidden-size {args.hidden_size} must be a multiple of twice --heads {args.heads}")
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise InputError(f"{args.out} exists and is not an empty folder")
    fields = [field.strip() for field in args.fields.split(",") if field.strip()]
    texts = [text for path in args.text for text in read_texts(path, fields)]
    if not any(text.strip() for text in texts):
        raise InputError("the files hold no text")

    disable_progress_bar()
    tokenizer = train_tokenizer(texts, args.vocab_size)
    model = build_model(tokenizer, args.hidden_size, args.layers, args.heads, args.seed)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        tokenizer.save_pretrained(args.out)
        model.save_pretrained(args.out)
    except OSError as error:
        raise InputError(f"cannot write {args.out}: {error.strerror or error}") from None
    print(f"wrote {args.out}: {len(tokenizer)} tokens, {model.num_parameters() / 1e6:.2f}M parameters")


def main() -> int:
    parser = argparse.ArgumentParser(description="Train a byte-level BPE tokenizer and write it with a random Llama.")
    parser.add_argument("--text", type=Path, action="append", required=True, help="a text or JSONL file; repeatable")
    parser.add_argument("--fields", default="", help="the files are JSONL: use these fields, e.g. question,answer")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must be new or empty")
    parser.add_argument("--vocab-size", type=int, default=2048, help="tokens, specials included (default: %(default)s)")
    parser.add_argument("--hidden-size", type=int, default=160, help="width of the model (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=4, help="number of layers (default: %(default)s)")
    parser.add_argument("--heads", type=int, default=5, help="attention heads (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random weights (default: %(default)s)")
    try:
        make(parser.parse_args())
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
