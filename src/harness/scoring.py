"""Log-probabilities of texts after others, as the tasks of a harness compare them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from src.data.batching import similar_batches
from src.data.encoding import EncodedRow
from src.runtime.session import Runtime


@dataclass(frozen=True)
class ContinuationScorer:
    """A model that scores the supervised part of rows."""

    model: Any
    runtime: Runtime
    batch_size: int
    pad_token_id: int

    def score(self, rows: Sequence[EncodedRow]) -> Iterator[list[tuple[int, tuple[float, bool]]]]:
        """Yield batch after batch, the longest rows first: the index of each row, the sum of the log-probabilities of
        its supervised ids in nats, and whether greedy decoding would write just these.

        Interrupted between batches, where a signal asked for it.
        """
        lengths = np.array([len(row.input_ids) + len(row.target_ids or ()) for row in rows], dtype=int)
        self.model.eval()
        for batch in reversed(similar_batches(lengths, self.batch_size)):
            self.runtime.check_stop()
            yield list(zip(batch, self._scores([rows[i] for i in batch]), strict=True))

    @torch.no_grad()
    def _scores(self, rows: Sequence[EncodedRow]) -> list[tuple[float, bool]]:
        is_encoder_decoder = self.model.config.is_encoder_decoder
        with self.runtime.autocast():
            logits = self._targets_logits(rows) if is_encoder_decoder else self._logits([row.input_ids for row in rows])
        scores = []
        for i, row in enumerate(rows):
            ids = row.input_ids if row.target_ids is None else row.target_ids
            at = torch.tensor([place for _, start, stop in row.spans for place in range(start, stop)])
            wanted = torch.tensor(ids)[at].to(logits.device)
            # a causal model's logits at a position are those of the next id; a decoder is fed one id more at its start
            log_probs = logits[i, at if is_encoder_decoder else at - 1].float().log_softmax(-1)
            nats = log_probs.gather(-1, wanted[:, None]).double().sum()
            scores.append((float(nats), bool((log_probs.argmax(-1) == wanted).all())))
        return scores

    def _logits(self, rows: Sequence[Sequence[int]], **more: Any) -> Tensor:
        """Return the logits of padded rows, [rows, longest, vocab]."""
        ids, real = self._padded(rows)
        return self.model(input_ids=ids, attention_mask=real, use_cache=False, **more).logits

    def _targets_logits(self, rows: Sequence[EncodedRow]) -> Tensor:
        """Return the logits of what a decoder writes, [rows, longest target, vocab]."""
        start = self.model.generation_config.decoder_start_token_id
        fed, _ = self._padded([[start, *(row.target_ids or ())[:-1]] for row in rows])
        return self._logits([row.input_ids for row in rows], decoder_input_ids=fed)

    def _padded(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Return ids padded on the right and the mask of the real ones, [rows, longest] both."""
        ids = torch.full((len(rows), max(map(len, rows))), self.pad_token_id)
        real = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row)], real[i, : len(row)] = torch.tensor(row), 1
        return ids.to(self.runtime.device), real.to(self.runtime.device)
