"""The report of each set: rows read, kept, truncated and dropped, tokens, and how often each new token occurs."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self

import numpy as np

from src.config.schema import DataConfig
from src.data.chat_render import squeezed
from src.data.encoding import THOUGHT, Encoder
from src.data.sets import EncodedSet
from src.data.store import DroppedRow
from src.data.stream import StreamAccount
from src.util import plural

CHECK_ROWS = 200  # of a set are decoded again, to check that the tokenizer preserves their text


@dataclass
class SplitReport:
    """The report of one set: rows_kept = rows_read - all of rows_dropped + rows_repeated.

    `sources` are the rows of each source of a mixture; `fold` describes a validation set that is a fold of train. Of a
    streamed set it covers the first block.
    """

    rows_read: int = 0
    rows_kept: int = 0
    rows_truncated: int = 0
    rows_repeated: int = 0
    rows_cleaned: int = 0
    rows_of_weight_0: int = 0
    rows_dropped: Counter[str] = field(default_factory=Counter)
    dropped_places: dict[str, list[str]] = field(default_factory=dict)
    tokens: int = 0
    supervised_tokens: int = 0
    thought_tokens: int = 0
    thoughts: int = 0
    about_thoughts: dict[str, int] = field(default_factory=dict)
    about_thoughts_places: dict[str, list[str]] = field(default_factory=dict)
    lengths: dict[str, int] = field(default_factory=dict)
    control_tokens_as_text: int = 0
    rows_changed_by_tokenizer: int = 0
    template_changes: dict[str, int] = field(default_factory=dict)
    template_change_places: dict[str, list[str]] = field(default_factory=dict)
    unread_keys: dict[str, int] = field(default_factory=dict)
    new_tokens: dict[str, dict[str, int]] = field(default_factory=dict)
    sources: dict[str, int] = field(default_factory=dict)
    fold: str = ""
    is_streamed: bool = False
    digest: str = ""

    def drop(self, rows: Sequence[DroppedRow]) -> None:
        """Count rows that were dropped, by reason, with the first ten places of each."""
        for row in rows:
            self.rows_dropped[row.reason] += 1
            places = self.dropped_places.setdefault(row.reason, [])
            if len(places) < 10:
                places.append(row.place)

    def count(self, rows: EncodedSet, encoder: Encoder, new_tokens: Mapping[str, int]) -> None:
        """Count the rows of a set, their tokens and what happened to them."""
        self.rows_kept = len(rows)
        self.rows_truncated = rows.total("is_truncated")
        self.rows_cleaned = rows.total("was_cleaned")
        self.control_tokens_as_text = rows.total("num_control_tokens")
        self.template_changes, self.template_change_places = rows.count_lines("changes")
        self.unread_keys, _ = rows.count_lines("unread")
        self.thoughts = rows.total("num_thoughts")
        self.about_thoughts, self.about_thoughts_places = rows.count_lines("about_thoughts")
        self.tokens = rows.num_tokens
        if len(rows):
            percentiles = np.percentile(rows.lengths + rows.target_lengths, [0, 50, 95, 100], method="nearest").tolist()
            self.lengths = dict(zip(("min", "median", "p95", "max"), percentiles, strict=True))
        self.new_tokens = {token: {"fed": 0, "supervised": 0} for token in new_tokens}
        for batch, times in rows.multiplicities():
            spans = batch.spans.reshape(-1, 3)
            are_supervised = rows.are_supervised(batch)
            self.rows_of_weight_0 += int(times[~are_supervised].sum())
            span_times = np.repeat(times * are_supervised, np.diff(batch.span_offsets) // 3)
            sizes = (spans[:, 2] - spans[:, 1]) * span_times
            self.supervised_tokens += int(sizes.sum())
            self.thought_tokens += int(sizes[spans[:, 0] == THOUGHT].sum())
            fed = np.repeat(times, np.diff(batch.input_offsets))
            supervised = batch.supervised() * np.repeat(times * are_supervised, np.diff(batch.label_offsets))
            for token, token_id in new_tokens.items():
                self.new_tokens[token]["fed"] += int(fed[batch.input_ids == token_id].sum())
                self.new_tokens[token]["supervised"] += int(supervised[batch.label_ids == token_id].sum())
        self.rows_changed_by_tokenizer = len(changed_rows(rows, range(min(CHECK_ROWS, len(rows))), encoder))
        self.digest = rows.digest()

    @property
    def unused_tokens(self) -> list[str]:
        """The new tokens that are in no row: they would keep their initial embeddings."""
        return [token for token, counts in self.new_tokens.items() if not any(counts.values())]

    def with_account(self, account: StreamAccount) -> Self:
        """Return the report of a streamed set with the rows that were read so far."""
        places: dict[str, list[str]] = {}
        for row in account.first_dropped:
            places.setdefault(row.reason, []).append(row.place)
        return replace(
            self,
            rows_read=account.num_records,
            rows_kept=account.num_kept,
            rows_dropped=Counter(account.dropped),
            dropped_places=places,
        )

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return asdict(self) | {"rows_dropped": dict(self.rows_dropped)}

    @property
    def summary(self) -> str:
        """The report in one line, with more where there is something to see."""
        dropped = self.rows_dropped.total()
        why = ", ".join(f"{count:,} {reason.replace('_', ' ')}" for reason, count in self.rows_dropped.items())
        text = "streamed; of the first " if self.is_streamed else f"{self.fold}; " if self.fold else ""
        text += f"{self.rows_kept:,} of {self.rows_read:,} rows"
        text += f" ({self.rows_truncated:,} truncated, {dropped:,} dropped{': ' + why if why else ''}"
        text += f", {self.rows_repeated:,} repeated)" if self.rows_repeated else ")"
        text += f", {self.supervised_tokens:,} of {self.tokens:,} tokens supervised"
        if self.rows_of_weight_0:
            text += f"\n  {plural(self.rows_of_weight_0, 'row')} of weight 0: fed and counted, not learned"
        if len(self.sources) > 1:
            text += f"\n  mixed of {', '.join(f'{name} {count:,}' for name, count in self.sources.items())}"
        if self.unread_keys:
            keys = ", ".join(f"{key} ({plural(count, 'row')})" for key, count in self.unread_keys.items())
            text += f"\n  keys that nothing reads: {keys}"
        if self.rows_changed_by_tokenizer:
            text += f"\n  of the first {CHECK_ROWS} rows {self.rows_changed_by_tokenizer} do not come back as they were"
            text += " from the tokenizer"
        return text


def changed_rows(rows: EncodedSet, indices: Sequence[int], encoder: Encoder) -> list[int]:
    """Return those of some rows whose ids do not decode to their text; truncated rows are skipped.

    In a rendered chat control tokens count as text, and white space is not compared: some tokens include it, and others
    write a space that is not in the text.
    """
    texts = [text for i in indices if not rows.is_truncated(i) for text in _texts_of(rows, i)]
    decoded = encoder.decode_batch([ids for _, ids, _ in texts])
    changed = [
        i
        for (i, ids, text), again in zip(texts, decoded, strict=True)
        if again != text and not (rows.is_rendered(i) and squeezed(text) in squeezed(encoder.decode_all(ids)))
    ]
    return list(dict.fromkeys(changed))


def _texts_of(rows: EncodedSet, index: int) -> Iterator[tuple[int, list[int], str]]:
    """Yield a row's index with ids and their text: all of a causal model's row, prompt and completion of another."""
    row, prompt, completion = rows[index], rows.prompt(index), rows.completion(index)
    if row.target_ids is None:
        yield index, row.input_ids.tolist(), prompt + completion
    else:
        yield index, row.input_ids.tolist(), prompt
        yield index, row.labels[row.labels >= 0].tolist(), completion


def describe_fold(data: DataConfig) -> str:
    """Return which fold the validation set is, and what is not read because of it; '' without folds."""
    if data.num_folds is None:
        return ""
    by = f" by {data.group_column}" if data.group_column is not None else ""
    without = replace(data, num_folds=None)
    others = {  # one of them at most is there
        "the validation files are": without.validation_sets(),
        "the hub's validation split is": without.has_hub_validation,
        "data.validation_fraction is": without.held_out_fraction,
    }
    unread = next((f", {other} not read" for other, is_there in others.items() if is_there), "")
    return f"fold {data.fold} of {data.num_folds}{by}{unread}"
