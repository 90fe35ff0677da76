"""A run's model as the harness asks it: prompts encoded as in training, thoughts taken off by the rule of the run.

The harness has its own (`think_end_token`), which cuts a text up to the last closing tag, so of an answer with thoughts
between its words it would leave only the end. Here they are gone before a task's stop texts and filters see a text.
"""

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from src.config.schema import Overflow, RunConfig
from src.data.answers import AnswerFrame
from src.data.dataset import Prompts
from src.data.encoding import ANSWER, EncodedRow, Lengths
from src.data.examples import Example
from src.data.formats import BadRow
from src.data.text_encoder import Segment
from src.errors import DataError, ModelError
from src.evaluation.answers import AnswerReader
from src.evaluation.generate import Generator
from src.evaluation.predictions import BLOCK_BATCHES
from src.evaluation.thoughts import thought_rule
from src.harness.scoring import ContinuationScorer
from src.harness.settings import generation_settings
from src.model.build import set_generation
from src.progress import Progress
from src.runtime.session import Runtime

NO_LIMIT = 1 << 40


@dataclass(frozen=True)
class LoadedRun:
    """The model that a run exported, and what encodes for it; `is_chat`: prompts are written by its chat template."""

    model: Any
    tokenizer: Any
    prompts: Prompts
    config: RunConfig
    runtime: Runtime
    batch_size: int
    is_chat: bool


class RunModel(LM):
    """Answers the requests of one task.

    `texts` are what was generated for each document, with thoughts, in the order of the requests; `num_truncated`
    counts the requests whose prompt lost its beginning, as the model has no room for it. A prompt keeps its BOS.

    Args:
        begins_turn: whether a continuation that is scored begins the assistant's turn of a chat.
        name: of the task, where progress is shown.
    """

    def __init__(self, run: LoadedRun, *, begins_turn: bool, name: str, progress: Progress) -> None:
        super().__init__()
        self._run, self._name, self._progress = run, name, progress
        self._encoder = run.prompts.encoder
        self._frame = run.prompts.frame if run.is_chat else AnswerFrame()
        self._before_answer = self._frame.before if begins_turn else ""
        self._is_causal = not run.model.config.is_encoder_decoder
        text_config = run.model.config.get_text_config()
        self._positions = getattr(text_config, "max_position_embeddings", None) or NO_LIMIT
        self.texts: dict[int | None, list[str]] = defaultdict(list)
        self.num_truncated = 0

    @property
    def tokenizer_name(self) -> str:
        """The name by which the harness would cache requests, which it is not asked to."""
        return str(self._run.tokenizer.name_or_path)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return what generation is fed after a chat; without a generation prompt its last message is continued."""
        template = self._run.prompts.template
        assert template is not None
        *before, last = chat_history
        try:
            return template.prompt(chat_history) if add_generation_prompt else template.prompt(before) + last["content"]
        except BadRow as error:
            raise DataError(str(error)) from error

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the answers to prompts: without thoughts, and up to the first of the texts that end them."""
        answers = [""] * len(requests)
        by_settings = defaultdict[str, list[int]](list)
        for i, request in enumerate(requests):
            by_settings[json.dumps(request.args[1], sort_keys=True)].append(i)
        for settings, chosen in by_settings.items():
            for i, text, answer in self._generated([requests[i].args[0] for i in chosen], json.loads(settings)):
                answers[chosen[i]] = answer
                self.texts[requests[chosen[i]].doc_id].append(text)
        return answers

    def _generated(self, prompts: Sequence[str], given: Mapping[str, Any]) -> Iterator[tuple[int, str, str]]:
        """Yield the index of each prompt, the text that the model wrote, and the answer in it."""
        run, tags = self._run, self._run.config.thought_tags
        settings, stops = generation_settings(given, run.config.generation, thinks=tags is not None)
        set_generation(run.model, settings, run.tokenizer, run.prompts.stop_ids)
        reader = AnswerReader(self._encoder, tags, self._frame, stops)
        rule = thought_rule(self._encoder, settings)
        prefix, shown = self._encoder.target_prefix, self._progress
        generator = Generator(run.model, run.runtime, run.batch_size, prefix, reader, rule, progress=shown)
        room = self._positions - settings.max_new_tokens - len(self._encoder.target_prefix)
        if room < 1:
            raise ModelError(
                f"{settings.max_new_tokens:,} tokens of an answer do not fit into the model's {self._positions:,} "
                "positions; lower the task's max_gen_toks, in a copy of its YAML in benchmark.task_dir, or "
                "generation.max_new_tokens"
            )
        most = room + 1 if self._is_causal else self._positions  # EOS, which is not fed, takes no room
        rows = [self._encoded(prompt, "", most, needs_eos=True) for prompt in prompts]
        fed = [row.input_ids[: row.prompt_length] or [self._encoder.eos_token_id] for row in rows]
        size = run.batch_size * BLOCK_BATCHES
        with self._progress.work("asking", self._name, len(fed), "requests") as advance:
            for block in (range(len(fed))[start : start + size] for start in range(0, len(fed), size)):
                made = generator.generate([fed[i] for i in block], run.config.seed, first_row=block.start)
                for i, completion in zip(block, made, strict=True):
                    text = self._encoder.decode(completion.ids)
                    yield i, text, reader.answer_text(text)
                advance(len(block))

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return the log-probability of each continuation after its context, in nats, and whether it is the greedy one.

        Both are encoded apart, as a prompt and its completion are in training.
        """
        return self._scored([self._pair(*request.args[:2]) for request in requests])

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-probability of each whole text, in nats; one that is too long is scored in windows."""
        windows = [(i, row) for i, request in enumerate(requests) for row in self._windows(request.args[0])]
        sums = [0.0] * len(requests)
        for (i, _), (nats, _) in zip(windows, self._scored([row for _, row in windows]), strict=True):
            sums[i] += nats
        return sums

    def _scored(self, rows: Sequence[EncodedRow]) -> list[tuple[float, bool]]:
        run = self._run
        pad = int(run.model.generation_config.pad_token_id)
        scores = dict[int, tuple[float, bool]]()
        with self._progress.work("scoring", self._name, len(rows), "requests") as advance:
            for batch in ContinuationScorer(run.model, run.runtime, run.batch_size, pad).score(rows):
                scores |= dict(batch)
                advance(len(batch))
        return [scores[i] for i in range(len(rows))]

    def _pair(self, context: str, continuation: str) -> EncodedRow:
        row = self._encoded(context, continuation, self._positions)
        is_cut = self._is_causal and row.is_truncated and row.prompt_length <= 1
        is_cut = is_cut or len(row.target_ids or ()) > self._positions
        if is_cut or not row.spans:
            why = "is longer than the model has positions for" if is_cut else "is empty"
            raise ModelError(f"a text that is to be scored {why}: {continuation[:60]!r}")
        return row

    def _windows(self, text: str) -> Iterator[EncodedRow]:
        """Yield a text in rows that the model has room for, each token supervised once."""
        (ids,) = self._encoder.encode_texts([text], is_rendered=False)
        alone = self._encoded("", "", self._positions, needs_eos=True)
        prefix = alone.input_ids[: alone.prompt_length] if self._is_causal else []
        room = max(1, min(self._positions - len(self._encoder.target_prefix) - 1, len(ids)))
        for before, window in map(
            make_disjoint_window,
            get_rolling_token_windows(ids, (prefix or [self._encoder.eos_token_id])[0], room, context_len=1),
        ):
            if self._is_causal:
                span = (ANSWER, len(before), len(before) + len(window))
                yield EncodedRow([*before, *window], None, [span], len(before), False, 0)
            else:
                first = len(self._encoder.target_prefix)
                target = [*self._encoder.target_prefix, *window]
                yield replace(alone, target_ids=target, spans=[(ANSWER, first, len(target))])

    def _encoded(self, context: str, continuation: str, most: int, *, needs_eos: bool = False) -> EncodedRow:
        """Return a prompt and what follows it as ids; of a prompt that is too long the beginning is cut.

        What nothing is before, not even BOS, is scored after EOS, as texts follow one another.
        """
        is_rendered = self._run.is_chat and context != ""
        text = context + (self._before_answer if is_rendered and not needs_eos else "")
        segments = (Segment(text, is_supervised=False, is_rendered=is_rendered), Segment(continuation, True))
        lengths = Lengths(most, None if self._is_causal else NO_LIMIT, Overflow.truncate_prompt)
        (row,) = self._encoder.encode([Example(segments, "", "", "", needs_eos=needs_eos)], lengths)
        assert row is not None
        self.num_truncated += row.is_truncated
        if self._is_causal and row.prompt_length == 0 and not needs_eos:
            ids = [self._encoder.eos_token_id, *row.input_ids]
            return EncodedRow(ids, None, [(ANSWER, 1, len(ids))], 1, row.is_truncated, row.num_control_tokens)
        return row
