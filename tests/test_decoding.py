"""Decoding: no prompt's text depends on its neighbours, the size of the batches or the number of processes.

The models are random, small and in float64 with scaled weights: logits are far apart, so that ids are compared exactly
and no rounding, which the shape of a batch does change, flips a token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

from src.config.schema import Device, MixedPrecision, RuntimeConfig
from src.errors import ModelError
from src.evaluation.decoding import draw, row_streams
from src.evaluation.generate import Completion, Generator, cut_at
from src.runtime.session import Runtime, start_runtime
from src.runtime.signals import StopRequest

VOCABULARY, BOS, EOS, PAD = 24, 1, 2, 0
NEW = 9
PREFIX = [5]
"""What the encoder-decoder's decoder is fed before it writes."""


def causal() -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=128, **sizes))


def positions_learned() -> Any:
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=1, n_head=2, n_positions=128))


def encoder_decoder() -> Any:
    sides = {f"{side}_{size}": n for side in ("encoder", "decoder")
             for size, n in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 48))}  # fmt: skip
    ids = {"decoder_start_token_id": EOS, "forced_eos_token_id": None}
    return BartForConditionalGeneration(
        BartConfig(vocab_size=VOCABULARY, d_model=32, max_position_embeddings=128, **sides, **ids)
    )


FAMILIES = {"llama": causal, "bart": encoder_decoder, "gpt2": positions_learned}


@pytest.fixture(scope="module")
def runtime() -> Iterator[Runtime]:
    cpu = RuntimeConfig(device=Device.cpu, deterministic=False)
    with start_runtime(cpu, MixedPrecision.no, 3, StopRequest()) as started:
        yield started


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(7)
    built = FAMILIES[request.param]().double().eval()
    for parameter in built.parameters():
        if parameter.ndim > 1:
            parameter.data *= 8
    return built


def prompts() -> list[list[int]]:
    """Return prompts of 1 to 40 tokens that repeat themselves; some end with EOS, as a turn of a chat may."""
    drawn = torch.Generator().manual_seed(1)
    made = []
    for length in (1, 40, 3, 17, 2, 8):
        ids = torch.randint(3, VOCABULARY, (length,), generator=drawn).tolist()
        ids[length // 2 :] = ids[: length - length // 2]
        if length in (3, 8):
            ids[-1] = EOS
        made.append(ids)
    return made


def generator(model: Any, runtime: Runtime, batch_size: int, pad: int, **settings: Any) -> Generator:
    is_encoder_decoder = model.config.is_encoder_decoder
    start = {"decoder_start_token_id": EOS} if is_encoder_decoder else {}
    model.generation_config = GenerationConfig(
        **({"max_new_tokens": NEW, "num_beams": 1, "do_sample": False, "bos_token_id": BOS, "eos_token_id": EOS,
            "pad_token_id": pad, "use_cache": True} | start | settings)
    )  # fmt: skip
    return Generator(model, runtime, batch_size, PREFIX if is_encoder_decoder else [])


def by_transformers(one: Generator, prompt: list[int], count: int = 1) -> list[list[int]]:
    """Return what plain `generate` writes for a prompt alone, the `count` best, EOS and padding cut."""
    ids = torch.tensor([prompt])
    begin = {"decoder_input_ids": torch.tensor([[EOS, *PREFIX]])} if one.model.config.is_encoder_decoder else {}
    made = one.model.generate(ids, attention_mask=torch.ones_like(ids), num_return_sequences=count, **begin)
    stops = one.model.generation_config.eos_token_id
    written = made[:, 2 if begin else len(prompt) :].tolist()
    return [cut_at(row, [stops] if isinstance(stops, int) else stops).ids for row in written]


LIKELY_END: dict[str, Any] = {"sequence_bias": [[[EOS], 2.5]]}
"""With it the padding of a pad that is EOS would forbid what is written alone."""
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no repeated token": {"no_repeat_ngram_size": 1, **LIKELY_END},
    "no repeated pair": {"no_repeat_ngram_size": 2, **LIKELY_END},
    "penalty": {"repetition_penalty": 1.7},
    "at least": {"min_new_tokens": 7},
    "all": {"no_repeat_ngram_size": 3, "repetition_penalty": 1.3, "min_new_tokens": 3},
    "several ends": {"eos_token_id": [EOS, 9, 11], "min_new_tokens": 2, "no_repeat_ngram_size": 2},
    "bad words": {"bad_words_ids": [[4], [EOS, 5], [7, 8]], "no_repeat_ngram_size": 2},
    "others": {
        "encoder_no_repeat_ngram_size": 2,
        "sequence_bias": [[[EOS], 4.0], [[6, 7], -9.0]],
        "exponential_decay_length_penalty": (4, 1.2),
        "begin_suppress_tokens": [EOS, 3],
        "suppress_tokens": [12],
        "forced_eos_token_id": 15,
    },
}
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beam": {"num_beams": 3},
    "sample": {"do_sample": True, "temperature": 3.0, "top_k": 12, "top_p": 0.95},
    "sampled beams": {"do_sample": True, "temperature": 3.0, "top_k": 0, "top_p": 1.0, "num_beams": 2},
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("way", ["greedy", "beam", "sample"])
def test_a_prompt_gets_the_same_text_alone_and_in_a_batch(model: Any, runtime: Runtime, way: str, setting: str) -> None:
    settings = WAYS[way] | SETTINGS[setting]
    one = generator(model, runtime, 6, EOS, **settings)
    before = model.generation_config.to_dict()
    together = one.generate(prompts(), seed=5)
    assert model.generation_config.to_dict() == before
    if way == "sample" or setting == "no repeated token":  # plain generate may have no token left
        alone = generator(model, runtime, 1, EOS, **settings).generate(prompts(), seed=5)
        assert together == alone
    else:
        assert [completion.ids for completion in together] == [by_transformers(one, prompt)[0] for prompt in prompts()]
    assert len({tuple(completion.ids) for completion in together}) > 1


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("way", WAYS)
def test_neither_the_pad_nor_the_size_of_batches_decides(model: Any, runtime: Runtime, way: str, size: int) -> None:
    settings = WAYS[way] | SETTINGS["all"]
    expected = generator(model, runtime, 6, EOS, **settings).generate(prompts(), seed=5)
    assert generator(model, runtime, size, PAD, **settings).generate(prompts(), seed=5) == expected


def test_positions_that_stretch_with_the_longest_row_are_computed_alone(runtime: Runtime) -> None:
    """Phi-3-128k computes all rows of a batch otherwise once one of them is longer than what it was trained on."""
    half = [1.0] * 4
    stretched = {"rope_type": "longrope", "rope_theta": 10_000.0, "short_factor": half, "long_factor": [4.0] * 4}
    torch.manual_seed(7)
    config = Phi3Config(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, original_max_position_embeddings=16, pad_token_id=0,
        rope_parameters=stretched | {"original_max_position_embeddings": 16},
    )  # fmt: skip
    model = Phi3ForCausalLM(config).double().eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data *= 8
    one = generator(model, runtime, 6, EOS)
    together = one.generate(prompts(), seed=5)
    assert [each.ids for each in together] == [one.generate([prompt], seed=5)[0].ids for prompt in prompts()]


def test_a_text_ends_where_no_token_is_left(runtime: Runtime) -> None:
    torch.manual_seed(0)
    one = generator(causal().eval(), runtime, 2, EOS, suppress_tokens=list(range(VOCABULARY)))
    for way in WAYS.values():
        one = generator(one.model, runtime, 2, EOS, **way, suppress_tokens=list(range(VOCABULARY)))
        assert one.generate([[4], [5, 6]], seed=0) == [Completion([], "eos")] * 2


@pytest.mark.parametrize("way", ["sample", "sampled beams"])
def test_a_row_draws_by_seed_and_number_alone(model: Any, runtime: Runtime, way: str) -> None:
    one = generator(model, runtime, 4, EOS, **WAYS[way])
    state = torch.get_rng_state()
    drawn = one.generate(prompts(), seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    assert one.generate(prompts()[2:5], seed=5, first_row=2) == drawn[2:5]
    assert one.generate(prompts()[2:5], seed=5) != drawn[2:5]
    assert one.generate(prompts(), seed=6) != drawn
    same = one.generate([[4, 5, 6]] * 8, seed=5)
    assert len({tuple(completion.ids) for completion in same}) > 3


class OneOfTwo:
    """A runtime as one of two processes sees it; what the other wrote is known from before, if at all."""

    def __init__(self, runtime: Runtime, rank: int, others: dict[int, Completion | None]) -> None:
        self._runtime, self.rank, self.num_processes, self._others = runtime, rank, 2, others
        self.own: dict[int, Completion] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runtime, name)

    def rounds(self, items: Sequence[Any]) -> list[Sequence[Any]]:
        return Runtime.rounds(self, items)  # type: ignore[arg-type, type-var]

    def split(self, items: Sequence[Any]) -> Iterator[tuple[Any, bool]]:
        return Runtime.split(self, items)  # type: ignore[arg-type, type-var]

    def gather(self, own: dict[int, Completion]) -> list[Any]:
        self.own = own
        return [self._others, own]


@pytest.mark.parametrize("way", ["sample", "sampled beams"])
def test_a_text_is_the_same_whichever_process_writes_it(model: Any, runtime: Runtime, way: str) -> None:
    expected = generator(model, runtime, 2, EOS, **WAYS[way]).generate(prompts(), seed=5)
    first = OneOfTwo(runtime, 0, dict.fromkeys(range(6)))
    generator(model, first, 2, EOS, **WAYS[way]).generate(prompts(), seed=5)  # type: ignore[arg-type]
    second = OneOfTwo(runtime, 1, dict(first.own))
    assert generator(model, second, 2, EOS, **WAYS[way]).generate(prompts(), seed=5) == expected  # type: ignore[arg-type]
    assert first.own
    assert second.own


def test_draws_follow_the_distribution() -> None:
    scores = torch.tensor([[0.0, -torch.inf, 1.0, 2.0, -torch.inf]])
    uniform = (torch.arange(10_000) + 0.5) / 10_000
    drawn = draw(scores.expand(10_000, -1), uniform.double())
    shares = torch.bincount(drawn, minlength=5) / 10_000
    assert shares.tolist() == pytest.approx(scores.softmax(1)[0].tolist(), abs=2e-4)
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert draw(torch.tensor([[-torch.inf, 3.0, 1.0, -torch.inf]]).expand(2, -1), ends).tolist() == [1, 2]
    streams = row_streams(3, [0, 1, 7], 1000)
    assert torch.equal(streams[2:], row_streams(3, [7], 1000))
    assert streams.mean(1).tolist() == pytest.approx([0.5] * 3, abs=0.05)
    assert ((streams >= 0) & (streams < 1)).all()


def test_scores_that_nothing_can_be_drawn_from_are_refused(runtime: Runtime) -> None:
    torch.manual_seed(0)
    broken = causal().eval()
    torch.nn.init.constant_(broken.lm_head.weight, torch.nan)
    with pytest.raises(ModelError, match="not finite"):
        generator(broken, runtime, 2, PAD, **WAYS["sample"]).generate(prompts(), seed=0)
