"""Samples: completions of a few fixed prompts, to read."""

from collections.abc import Sequence
from dataclasses import dataclass

from src.data.sets import EncodedSet
from src.evaluation.evaluate import Evaluator
from src.runtime.profiling import region


@dataclass(frozen=True)
class Sample:
    """One line of samples.jsonl.

    `text` includes thoughts, `answer` doesn't; `num_opened` and `num_closed` count its thought tags,
    `num_thought_tokens` the tokens within thoughts; `untrained` is the model's text before its first step.
    """

    step: int
    prompt: str
    text: str
    answer: str
    reference: str
    stop_reason: str
    num_opened: int
    num_closed: int
    untrained: str
    num_thought_tokens: int = 0


@region("evaluation")
def sample(
    evaluator: Evaluator, rows: EncodedSet, count: int, step: int, untrained: Sequence[str] = ()
) -> list[Sample]:
    """Generate for the first `count` rows of a set; the same prompts and the same random stream every time. `untrained`
    are the texts that were sampled before training.
    """
    reader, rule = evaluator.reader, evaluator.generator.thoughts
    opened, closed = reader.tags or ("", "")
    chosen = range(min(count, len(rows)))
    prompts = [rows.first_ids(i) for i in chosen]
    completions = evaluator.generator.generate(prompts, evaluator.runtime.seed, what="samples")
    samples = []
    for i, completion in zip(chosen, completions, strict=True):
        text = reader.encoder.decode(completion.ids)
        thoughts = [] if rule is None else rule.found(prompts[i], completion.ids)
        samples.append(
            Sample(
                step,
                prompt=rows.prompt(i),
                text=text,
                answer=reader.answer(rows, i, text),
                reference=reader.reference(rows, i),
                stop_reason=completion.stop_reason,
                num_opened=text.count(opened) if opened else 0,
                num_closed=text.count(closed) if closed else 0,
                untrained=untrained[i] if untrained else text,
                num_thought_tokens=sum(thought.num_tokens for thought in thoughts),
            )
        )
    return samples
