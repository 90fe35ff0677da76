"""Write assets/tiny_llama: the configuration and the tokenizer of a very small Llama, without weights.

Tests and CPU experiments need a model that trains in a minute and that no download can break. The tokenizer is
character-level: byte-level BPE over the 256 byte symbols with no merges, so any text round-trips exactly and each
ASCII character is one token. The files are part of the repository; running this again gives identical files.

Run: python assets/make_tiny_llama.py
"""

import argparse
import sys
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, PreTrainedTokenizerFast

PAD, BOS, EOS = "<pad>", "<s>", "</s>"
MAX_POSITIONS = 1024


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Ids 0 to 2 are the special tokens; the 256 byte symbols follow."""
    specials = [PAD, BOS, EOS]
    vocab = {token: i for i, token in enumerate(specials + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B:1", special_tokens=[(BOS, vocab[BOS])]
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


def build_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """About 0.7 million parameters."""
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=False,
        initializer_range=0.05,  # learns in fewer steps than the usual 0.02 at this width
        attention_dropout=0.0,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        dtype="float32",
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the config and character-level tokenizer of a tiny Llama.")
    default = Path(__file__).resolve().parent / "tiny_llama"
    parser.add_argument("--out", type=Path, default=default, help="folder to write (default: tiny_llama beside this)")
    args = parser.parse_args()
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        tokenizer = build_tokenizer()
        tokenizer.save_pretrained(args.out)
        build_config(tokenizer).save_pretrained(args.out)
    except OSError as error:
        print(f"error: cannot write {args.out}: {error.strerror or error}", file=sys.stderr)
        return 2
    print(f"wrote {args.out}: {len(tokenizer)} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())
