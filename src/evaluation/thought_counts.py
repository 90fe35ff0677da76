"""The thoughts in generated texts, counted by ids. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Thought:
    """A thought in a generated text: the number of its tokens between the tags, and whether it was closed."""

    num_tokens: int
    is_closed: bool


def thoughts_in(ids: Sequence[int], tag_ids: tuple[int, int], *, is_opened: bool = False) -> list[Thought]:
    """Return the thoughts in generated ids, which end before EOS and padding; a thought that is never closed ends with
    them. An opening tag within a thought is a token like any other, and so is a closing tag outside of one.

    Args:
        tag_ids: of the opening and the closing tag.
        is_opened: whether the prompt has opened a thought, which counts as one of the text.
    """
    open_id, close_id = tag_ids
    thoughts, begin = list[Thought](), 0 if is_opened else None  # the place of the first token in the present thought
    for place, token_id in enumerate(ids):
        if begin is None and token_id == open_id:
            begin = place + 1
        elif begin is not None and token_id == close_id:
            thoughts.append(Thought(place - begin, is_closed=True))
            begin = None
    return thoughts if begin is None else [*thoughts, Thought(len(ids) - begin, is_closed=False)]


def thought_metrics(texts: Sequence[Sequence[Thought]]) -> dict[str, float]:
    """Compute src.metrics.THOUGHTS from the thoughts in each of the generated texts, of which a row may have several.

    Without a thought, the share of closed ones and their length are 0.
    """
    thoughts = [thought for text in texts for thought in text]
    count = max(1, len(thoughts))
    return {
        "thoughts_per_row": len(thoughts) / len(texts),
        "thoughts_opened": sum(map(bool, texts)) / len(texts),
        "thoughts_closed": sum(thought.is_closed for thought in thoughts) / count,
        "thought_tokens": sum(thought.num_tokens for thought in thoughts) / count,
    }
