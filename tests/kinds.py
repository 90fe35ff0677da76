"""Tokenizers of the kinds that differ in what they do to a text, and a model that trains quickly: made on the spot."""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

CORPUS = ["What is 12 plus 30? It is 42.", "안녕하세요 세계", "def f(x): return x", "low lower lowest", "a b c"] * 4


def character_level() -> Any:
    """The default run's own: bytes, BOS in front."""
    return AutoTokenizer.from_pretrained("assets/tiny_llama")


@cache
def thin_llama() -> str:
    """Return a folder with the default model's tokenizer and configuration, but two layers of width 64."""
    folder = tempfile.mkdtemp(prefix="towline-test-model-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    shutil.copytree("assets/tiny_llama", folder, dirs_exist_ok=True)
    file = Path(folder, "config.json")
    thin = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "head_dim": 16}
    file.write_text(json.dumps(json.loads(file.read_text()) | thin))
    return folder


def byte_bpe(*, pad: str | None = "<pad>", adds_eos: bool = False, bos: bool = True) -> Any:
    """Byte-level BPE with merges, as GPT-2 and Llama 3 have it; with BOS and EOS around a text as BART has it."""
    from tokenizers.trainers import BpeTrainer

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<pad>", "<s>", "</s>", "<|turn|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, BpeTrainer(vocab_size=320, special_tokens=specials, initial_alphabet=alphabet, show_progress=False)
    )
    template = f"{'<s> ' if bos else ''}$A{' </s>' if adds_eos else ''}"
    ids = [(token, tokenizer.token_to_id(token)) for token in specials]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>" if bos else None, eos_token="</s>", pad_token=pad
    )


def one_control_token() -> Any:
    """Byte-level BPE whose one control token is BOS, EOS and pad, and is put nowhere, as GPT-2 has it."""
    tokenizer = byte_bpe(bos=False, pad="</s>")
    tokenizer.bos_token = "</s>"
    return tokenizer


BYTES = [f"<0x{i:02X}>" for i in range(256)]
SPACE_DECODERS = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]


def sentencepiece(*, legacy: bool) -> Any:
    """BPE that writes a space as '▁' and puts one in front of every text, as Llama 2 and Mistral do.

    `legacy` puts it also in front of a text that begins with a space, and behind every control token.
    """
    from tokenizers.trainers import BpeTrainer

    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    if legacy:
        replace = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        tokenizer.normalizer = normalizers.Sequence(replace)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(SPACE_DECODERS)
    specials = ["<unk>", "<s>", "</s>", *BYTES]
    tokenizer.train_from_iterator(CORPUS, BpeTrainer(vocab_size=400, special_tokens=specials, show_progress=False))
    spec = json.loads(tokenizer.to_str())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if not token["content"].startswith("<0x")]
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def unigram() -> Any:
    """Unigram whose vocabulary itself holds the control tokens, a space in front and EOS behind, as T5 has them."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), ("▁low", -2.5), ("er", -2.5)]
    pieces += [(character, -3.0) for character in sorted(set("".join(CORPUS)) | set("</>s")) if character != " "]
    pieces += [(byte, -1000.0) for byte in BYTES]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Sequence(SPACE_DECODERS)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")


def wordpiece(characters: str) -> Any:
    """WordPiece between [CLS] and [SEP], of the characters given, as multilingual BERT has it; it forgets spaces."""
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "low", "##er", "answer"]
    single = sorted({character for character in characters if not character.isspace()})
    vocabulary = {token: i for i, token in enumerate([*tokens, *single, *(f"##{one}" for one in single)])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(strip_accents=False, lowercase=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    ends = [(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    names = {"bos_token": "[CLS]", "eos_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def words() -> Any:
    """Words in lower case, no BOS, no pad."""
    vocabulary = {"[UNK]": 0, "[SEP]": 1, "low": 2, "er": 3, "a": 4, "b": 5, "---": 6, "<New>": 7}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(" "), "removed")
    tokenizer.add_special_tokens([AddedToken("[SEP]", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="[SEP]", unk_token="[UNK]")
