"""Thoughts while generating, and several samples of a prompt: what is forced, forbidden and drawn.

Every model here wants to open a thought wherever it may, never to close one, and to end its text at any time.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from src.config.schema import ThoughtMode
from src.evaluation.decoding import row_streams
from src.evaluation.generate import Generator
from src.evaluation.thought_counts import Thought, thought_metrics, thoughts_in
from src.evaluation.thoughts import ThoughtRule, count_inner
from src.metrics import THOUGHTS, has_direction
from src.runtime.session import Runtime
from tests.test_decoding import EOS, NEW, SETTINGS, WAYS, by_transformers, generator, model, prompts, runtime

__all__ = ["model", "runtime"]
OPEN, CLOSE, BLANK = 6, 7, 8
EAGER = {"sequence_bias": [[[OPEN], 9.0], [[CLOSE], -30.0], [[EOS], 3.0]]}
FREE, NONE, FORCED = ThoughtMode


def thinking(one: Generator, mode: ThoughtMode, most: int | None = None) -> Generator:
    rule = ThoughtRule(OPEN, CLOSE, lambda ids: "".join(" " if i == BLANK else "x" for i in ids))
    return replace(one, thoughts=rule).with_thoughts(mode, most)


def asked() -> list[list[int]]:
    """Return prompts that end with no tag."""
    return [[*prompt, 9] for prompt in prompts()]


def thoughts_of(ids: list[int], *, is_inside: bool = False) -> list[int | None]:
    """Return how many tokens each thought has; None of one that is not closed."""
    found: list[int | None] = []
    since: int | None = 0 if is_inside else None
    for token_id in ids:
        if since is None:
            since = 0 if token_id == OPEN else None
        elif token_id == CLOSE:
            found.append(since)
            since = None
        else:
            since += 1
    return [*found, *([] if since is None else [None])]


def test_the_tokens_of_a_thought_are_counted_from_its_opening_tag() -> None:
    rows = torch.tensor([[1, OPEN, 3, OPEN], [OPEN, 3, CLOSE, 4], [CLOSE, CLOSE, OPEN, CLOSE], [1, 2, CLOSE, OPEN]])
    outside, inside = torch.zeros(4, dtype=torch.bool), torch.ones(4, dtype=torch.bool)
    assert count_inner(rows, outside, OPEN, CLOSE).tolist() == [2, -1, -1, 0]
    assert count_inner(rows[:, :2], inside, OPEN, CLOSE).tolist() == [2, 2, -1, 2]
    assert count_inner(rows[:, :0], torch.tensor([True, False, True, False]), OPEN, CLOSE).tolist() == [0, -1, 0, -1]


def test_thoughts_are_counted_by_ids() -> None:
    found = [
        thoughts_in(ids, (OPEN, CLOSE), is_opened=is_opened)
        for ids, is_opened in (
            ([OPEN, 3, OPEN, 3, CLOSE, 4, CLOSE, OPEN, CLOSE], False),  # one within a thought opens none
            ([5, OPEN, 3, 3], False),  # the text ends in it
            ([3, CLOSE, 4], True),  # the prompt has opened it
            ([], True),
            ([CLOSE, 3], False),
        )
    ]
    assert found == [[Thought(3, True), Thought(0, True)], [Thought(2, False)], [Thought(1, True)],
                     [Thought(0, False)], []]  # fmt: skip
    assert thought_metrics(found) == {
        "thoughts_per_row": 5 / 5,
        "thoughts_opened": 4 / 5,
        "thoughts_closed": 3 / 5,
        "thought_tokens": 6 / 5,
    }
    assert tuple(thought_metrics(found)) == THOUGHTS
    assert thought_metrics([[], []]) == dict.fromkeys(THOUGHTS, 0.0)
    assert not any(has_direction(f"eval/test/{name}") for name in THOUGHTS)
    assert has_direction("eval/test/thought_loss")


@pytest.mark.parametrize("way", WAYS)
def test_without_thoughts_no_tag_is_written(model: Any, runtime: Runtime, way: str) -> None:
    given = asked() * (21 if way == "sample" else 1)
    wanted = {"sequence_bias": [[[OPEN], 9.0], [[CLOSE], 9.0], [[EOS], 3.0]]}
    one = generator(model, runtime, 42, EOS, **WAYS[way], **wanted)
    assert any(OPEN in completion.ids for completion in one.generate(given, seed=5))
    samples = thinking(one, NONE).generate_samples(given, seed=5, count=4 if way == "sample" else 1)
    assert len(samples) == len(given)
    assert not any({OPEN, CLOSE} & set(completion.ids) for row in samples for completion in row)


@pytest.mark.parametrize("way", WAYS)
def test_with_a_limit_no_thought_is_longer_and_each_is_closed(model: Any, runtime: Runtime, way: str) -> None:
    cases = ((FREE, 2, "all"), (FORCED, 0, "several ends"), (FREE, 4, "no repeated token"), (FORCED, 50, "plain"))
    for mode, most, setting in cases:
        settings = WAYS[way] | SETTINGS[setting] | EAGER
        one = thinking(generator(model, runtime, 6, EOS, **settings), mode, most)
        count = settings.get("num_beams", 1)
        samples = one.generate_samples(asked(), seed=5, count=count)
        together = [completion for row in samples for completion in row]
        for completion in together:
            thoughts = thoughts_of(completion.ids)
            assert all(length is not None and length <= most for length in thoughts), completion
            assert completion.ids.count(OPEN) == completion.ids.count(CLOSE) == len(thoughts)
            assert mode is FREE or completion.ids[0] == OPEN
        assert any(OPEN in completion.ids for completion in together)
        alone = replace(one, batch_size=1).generate_samples(asked()[2:4], seed=5, first_row=2, count=count)
        assert alone == samples[2:4]
    rule = one.thoughts
    assert rule is not None
    for prompt, row in zip(asked(), samples, strict=True):
        for completion in row:
            lengths = [None if not one.is_closed else one.num_tokens for one in rule.found(prompt, completion.ids)]
            assert lengths == thoughts_of(completion.ids)
    # the limit is longer than the text: closed where it must end
    assert all(thoughts_of(completion.ids)[0] == len(completion.ids) - 2 == NEW - 2 for completion in together)


@pytest.mark.parametrize("way", WAYS)
def test_a_thought_that_the_prompt_has_opened_is_not_opened_again(model: Any, runtime: Runtime, way: str) -> None:
    one = generator(model, runtime, 6, EOS, **WAYS[way], **EAGER)
    given = [[*prompt, OPEN, *blank] for prompt in asked()[:3] for blank in ([], [BLANK])]
    for completion in thinking(one, FORCED, 3).generate(given, seed=5):
        assert completion.ids[0] != OPEN
        assert thoughts_of(completion.ids, is_inside=True)[0] == 3
    assert all(completion.ids[0] == CLOSE for completion in thinking(one, NONE).generate(given, seed=5))
    in_a_question = [[*prompt, OPEN, 9] for prompt in prompts()[:3]]  # which opens nothing
    assert all(completion.ids[0] == OPEN for completion in thinking(one, FORCED).generate(in_a_question, seed=5))


@pytest.mark.parametrize("way", WAYS)
def test_free_thoughts_change_nothing(model: Any, runtime: Runtime, way: str) -> None:
    one = generator(model, runtime, 6, EOS, **WAYS[way], **EAGER)
    assert thinking(one, FREE).generate(asked(), seed=5) == one.generate(asked(), seed=5)


def test_the_first_sample_is_the_only_one_of_before(model: Any, runtime: Runtime) -> None:
    one = generator(model, runtime, 4, EOS, **WAYS["sample"])
    samples = one.generate_samples(asked(), seed=5, count=5)
    assert [first for first, *_ in samples] == one.generate(asked(), seed=5)
    assert all(len({tuple(each.ids) for each in row}) > 2 for row in samples)
    assert replace(one, batch_size=7).generate_samples(asked()[2:5], seed=5, first_row=2, count=5) == samples[2:5]
    assert [row[:3] for row in samples] == one.generate_samples(asked(), seed=5, count=3)
    streams = row_streams(3, [0, 1, 0, 1, 2], 9, [0, 0, 1, 1, 0])
    assert torch.equal(streams[[0, 1, 4]], row_streams(3, [0, 1, 2], 9))
    assert len({row[0] for row in streams.tolist()}) == 5


def test_the_samples_of_beams_are_the_best_ones(model: Any, runtime: Runtime) -> None:
    one = generator(model, runtime, 6, EOS, num_beams=3)
    samples = one.generate_samples(asked(), seed=5, count=3)
    assert [first for first, *_ in samples] == one.generate(asked(), seed=5)
    for beams, prompt in zip(samples, asked(), strict=True):
        assert [beam.ids for beam in beams] == by_transformers(one, prompt, 3)
