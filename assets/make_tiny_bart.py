"""Write assets/tiny_bart: the configuration and the tokenizer of a very small BART, without weights.

The encoder-decoder beside assets/tiny_llama, for tests and CPU experiments. Its tokenizer is byte-level too, with no
merges, so any text round-trips exactly; it puts BOS and EOS around a text, as BART's does. The decoder starts from
EOS, so that it reads </s><s>text where it is to write <s>text</s>. The files are part of the repository; running this
again gives identical files.

Run: python assets/make_tiny_bart.py
"""

import argparse
import sys
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import BartConfig, PreTrainedTokenizerFast

BOS, PAD, EOS = "<s>", "<pad>", "</s>"
MAX_POSITIONS = 1024


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Ids 0 to 2 are the special tokens, as BART has them; the 256 byte symbols follow."""
    specials = [BOS, PAD, EOS]
    vocab = {token: i for i, token in enumerate(specials + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A {EOS}",
        pair=f"{BOS} $A {EOS} {EOS} $B:1 {EOS}:1",
        special_tokens=[(BOS, vocab[BOS]), (EOS, vocab[EOS])],
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


def build_config(tokenizer: PreTrainedTokenizerFast) -> BartConfig:
    """About 1.1 million parameters."""
    return BartConfig(
        architectures=["BartForConditionalGeneration"],
        vocab_size=len(tokenizer),
        d_model=128,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=384,
        decoder_ffn_dim=384,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        dropout=0.0,
        init_std=0.05,  # learns in fewer steps than the usual 0.02 at this width
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.eos_token_id,
        forced_eos_token_id=None,
        dtype="float32",
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the config and byte-level tokenizer of a tiny BART.")
    default = Path(__file__).resolve().parent / "tiny_bart"
    parser.add_argument("--out", type=Path, default=default, help="folder to write (default: tiny_bart beside this)")
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
