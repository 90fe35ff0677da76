"""Generation in batches: prompts padded on the left, completions cut at EOS."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from src.config.schema import RunConfig, ThoughtMode
from src.data.batching import similar_batches
from src.data.dataset import Data
from src.data.sets import EncodedSet
from src.errors import DataError, ModelError
from src.evaluation.answers import AnswerReader, Completion, cut_at
from src.evaluation.decoding import Decoding, ids_of, row_streams
from src.evaluation.thoughts import ThoughtRule
from src.progress import NO_PROGRESS, Advance, Progress
from src.runtime.session import Runtime
from src.runtime.signals import StopRequest


@dataclass
class _Stopping(StoppingCriteria):
    """Ends all rows between two tokens when a signal asks the run to stop, and each after a text that ends it.

    Called after each token, it shows by `advance` how many there are.
    """

    stop: StopRequest
    reader: AnswerReader | None
    begin: int  # the index of the first generated id
    advance: Advance

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self.advance(0, f"token {input_ids.shape[1] - self.begin:,}")
        is_over = [bool(self.stop.asked())] * len(input_ids)
        if self.reader is not None and (texts := self.reader.end_texts):
            # a token writes a byte at least; the last may write more
            window = max(len(text.encode()) for text in texts) + 1
            for i, ids in enumerate(input_ids[:, self.begin :].tolist()):
                newest = self.reader.encoder.decode(ids[-window:])
                is_over[i] |= any(text in newest for text in texts) and self.reader.is_over(ids)
        return torch.tensor(is_over, device=input_ids.device)


@dataclass(frozen=True)
class Generator:
    """A model that generates by its own `generation_config`, see model.build."""

    model: Any
    runtime: Runtime
    batch_size: int
    target_prefix: list[int]  # ids that an encoder-decoder's decoder is fed after its start token
    reader: AnswerReader | None = None  # which cuts completions after a text that ends them; None: nothing does
    thoughts: ThoughtRule | None = None  # how thoughts are written; None where the model writes none
    others: Sequence[Any] = ()  # models whose probabilities are averaged with this one's
    progress: Progress = NO_PROGRESS

    def with_thoughts(self, mode: ThoughtMode, max_tokens: int | None = None) -> "Generator":
        """Return a generator that writes thoughts in another way, of at most `max_tokens` between their tags; for a
        model that has tags.
        """
        assert self.thoughts is not None
        return replace(self, thoughts=replace(self.thoughts, mode=mode, max_tokens=max_tokens))

    @property
    def pad_token_id(self) -> int:
        return int(self.model.generation_config.pad_token_id)

    def generate(
        self,
        prompts: Sequence[list[int]],
        seed: int,
        first_row: int = 0,
        *,
        target_prefixes: Sequence[list[int]] | None = None,
        what: str = "",
    ) -> list[Completion]:
        """Generate a completion for each prompt: the first of its samples, see generate_samples."""
        samples = self.generate_samples(prompts, seed, first_row, target_prefixes=target_prefixes, what=what)
        return [first for first, *_ in samples]

    def generate_samples(
        self,
        prompts: Sequence[list[int]],
        seed: int,
        first_row: int = 0,
        count: int = 1,
        *,
        target_prefixes: Sequence[list[int]] | None = None,
        what: str = "",
    ) -> list[list[Completion]]:
        """Generate `count` completions for each prompt (ids), in their order: the best beams, or as many draws.
        Interrupted between two tokens, where a signal asked for it.

        Prompts of similar length are batched, for little padding. Batching changes no completion: each prompt is
        decoded as it would be alone, and draws from its own random stream, by `seed`, the number of the sample, and the
        index of its row, of which `first_row` is the first where the prompts are a part of a set. `target_prefixes` are
        each prompt's own, in place of target_prefix; those of a batch are of one length. `what` names it all
        where progress is shown.
        """
        prefixes = [self.target_prefix] * len(prompts) if target_prefixes is None else target_prefixes
        is_beam_search = (self.model.generation_config.num_beams or 1) > 1
        num_best, num_draws = (count, 1) if is_beam_search else (1, count)
        order = sorted(range(len(prompts)), key=lambda i: (len(prefixes[i]), len(prompts[i])))
        texts = [(i, sample) for i in order for sample in range(num_draws)]
        local: dict[int, Completion] = {}  # by prompt and sample
        training = self.model.training
        self.model.eval()
        is_alone = self._samples_beams or self._stretches(max(map(len, prompts), default=0))
        size = 1 if is_alone else self.batch_size
        alike = [list(group) for _, group in groupby(texts, key=lambda text: len(prefixes[text[0]]))]
        batches = [batch for group in alike for batch in self._batches(group, prompts, is_alone=is_alone)]
        at_once = size * num_best * self.runtime.num_processes
        with self.progress.work("generating", what, len(prompts) * count, "texts", at_once) as advance:
            rounds = self.runtime.rounds(batches)
            for together, (batch, is_real) in zip(rounds, self.runtime.split(batches), strict=True):
                self.runtime.check_stop()
                draws = [(first_row + i, sample) for i, sample in batch]
                global_seed = int(np.random.SeedSequence([seed, draws[0][0]]).generate_state(1)[0])
                with self.runtime.isolated_rng(global_seed), torch.no_grad():
                    generated = self._batch(
                        [prompts[i] for i, _ in batch], [prefixes[i] for i, _ in batch], draws, seed, num_best, advance
                    )
                if is_real:
                    numbers = [i * count + sample + best for i, sample in batch for best in range(num_best)]
                    local |= dict(zip(numbers, generated, strict=True))
                advance(sum(map(len, together)) * num_best)
        self.runtime.check_stop()
        self.model.train(training)
        completions = {number: one for process in self.runtime.gather(local) for number, one in process.items()}
        return [[completions[i * count + sample] for sample in range(count)] for i in range(len(prompts))]

    def _batches(
        self, texts: Sequence[tuple[int, int]], prompts: Sequence[list[int]], *, is_alone: bool
    ) -> list[list[tuple[int, int]]]:
        """Batch texts, each a prompt's number and a sample's, by how many positions they may come to."""
        if is_alone:
            return [[text] for text in texts]
        longest = self.model.generation_config.max_new_tokens
        lengths = np.array([len(prompts[i]) + longest for i, _ in texts])
        return [[texts[i] for i in batch] for batch in similar_batches(lengths, self.batch_size)]

    @property
    def _samples_beams(self) -> bool:
        """Whether transformers samples among the beams, from the global random stream: prompts can't be batched."""
        settings = self.model.generation_config
        return bool(settings.do_sample and (settings.num_beams or 1) > 1)

    def _stretches(self, longest: int) -> bool:
        """Return whether positions depend on the longest row of a batch.

        Some models (longrope as in Phi-3-128k, dynamic) change them beyond a certain length, for all rows at once.
        """
        settings = self.model.config.get_text_config()
        rope = getattr(settings, "rope_parameters", None) or {}
        kinds = [rope, *(kind for kind in rope.values() if isinstance(kind, dict))]
        limits = [
            kind.get("original_max_position_embeddings") or settings.max_position_embeddings
            for kind in kinds
            if kind.get("rope_type") in ("longrope", "dynamic")
        ]
        return bool(limits) and longest + self.model.generation_config.max_new_tokens > min(limits)

    def _batch(
        self,
        prompts: Sequence[list[int]],
        prefixes: Sequence[list[int]],
        draws: Sequence[tuple[int, int]],
        seed: int,
        num_best: int,
        advance: Advance,
    ) -> list[Completion]:
        """Generate `num_best` completions for each prompt; `draws` are its row's index and the number of the sample."""
        settings, is_encoder_decoder = self.model.generation_config, self.model.config.is_encoder_decoder
        begin = max(map(len, prompts))  # the index of the first generated id
        ids = torch.full((len(prompts), begin), self.pad_token_id)
        real = torch.zeros_like(ids)
        for i, prompt in enumerate(prompts):
            # an encoder's positions count from the left, a decoder's completion follows on the right
            here = slice(0, len(prompt)) if is_encoder_decoder else slice(begin - len(prompt), begin)
            ids[i, here], real[i, here] = torch.tensor(prompt), 1
        decoder = {}
        if is_encoder_decoder:
            first_ids = [[settings.decoder_start_token_id, *prefix] for prefix in prefixes]
            decoder["decoder_input_ids"] = torch.tensor(first_ids, device=self.runtime.device)
            begin = len(first_ids[0])
        streams = None
        if settings.do_sample and not self._samples_beams:
            rows, samples = zip(*draws, strict=True)
            streams = row_streams(seed, rows, settings.max_new_tokens, samples)
        synced_gpus = self.runtime.zero_stage == 3  # each process computes as long as another one generates
        with self.runtime.autocast():
            generated = self.model.generate(
                input_ids=ids.to(self.runtime.device),
                attention_mask=real.to(self.runtime.device),
                custom_generate=Decoding(prompts, streams, synced_gpus, self.thoughts, self.others),
                num_return_sequences=num_best,
                stopping_criteria=StoppingCriteriaList([_Stopping(self.runtime.stop, self.reader, begin, advance)]),
                **decoder,
            )
        completions = [cut_at(row, ids_of(settings.eos_token_id)) for row in generated[:, begin:].tolist()]
        return completions if self.reader is None else [self.reader.cut(completion) for completion in completions]


def check_prompts(config: RunConfig, model: Any, data: Data) -> None:
    """Check by a model's configuration that there is room after every prompt, and that none is empty where answers are
    compared; DataError or ModelError names the row.
    """
    prefix, max_new_tokens = data.encoder.target_prefix, config.generation.max_new_tokens
    for rows in [*data.validation.values(), *data.test.values()] if config.metrics else []:
        check_generation(rows, model, prefix, max_new_tokens)
    if config.evaluation.sample_prompts:
        check_room(data.for_samples(), model, prefix, max_new_tokens)


def check_generation(rows: EncodedSet, model: Any, target_prefix: list[int], max_new_tokens: int) -> None:
    """Raise DataError for an empty prompt of a set, ModelError for one that leaves no room for what is generated."""
    lengths = rows.prompt_lengths().tolist()
    if 0 in lengths:
        raise DataError(f"{rows.place(lengths.index(0))}  nothing to generate from: an empty prompt, and no BOS")
    check_room(rows, model, target_prefix, max_new_tokens)


def check_room(rows: EncodedSet, model: Any, target_prefix: list[int], max_new_tokens: int) -> None:
    """Raise ModelError, naming the row, where a set's longest prompt leaves no room for what is generated."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    lengths = rows.prompt_lengths()
    longest = int(lengths.argmax())
    used = 1 + len(target_prefix) if model.config.is_encoder_decoder else int(lengths[longest])
    if positions is not None and used + max_new_tokens > positions:
        raise ModelError(
            f"{rows.place(longest)}: {used} tokens and generation.max_new_tokens = {max_new_tokens} more do not fit "
            f"into the model's {positions} positions; lower one of data.max_seq_length and max_new_tokens"
        )
