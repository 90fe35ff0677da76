"""Scores of generated text, as pure functions of texts, and in which direction each is better.

A metric is a function that takes by name what it needs, registered with what its values mean; nothing else lists it.
Libraries that score are imported by the functions themselves: the names are read while a command line is checked.
"""

import inspect
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from types import SimpleNamespace

import regex

from src.patterns import Pattern, at
from src.registry import Registry

CAN_NEED = ("predictions", "references", "answer_pattern", "place", "samples")
"""What a metric's function may take by name: the texts [row], `data.answer_pattern`, a function from a row's number to
the words that say where it comes from, and the texts [row][sample] of which `predictions` are the first of each row."""
PART_LOSSES = ("thought_inner_loss", "thought_open_loss", "thought_close_loss", "after_thought_loss")
THOUGHT_LOSSES = ("thought_loss", "answer_loss", *PART_LOSSES)
"""Losses of thoughts (tags included) and of all else, and of parts of these: where there are thoughts."""
LOSSES = ("loss", "perplexity", *THOUGHT_LOSSES)
"""Values of every evaluation that need no generated text; the lower, the better."""
THOUGHTS = ("thoughts_per_row", "thoughts_opened", "thoughts_closed", "thought_tokens")
"""Values of generated texts of a run with thought tags, see evaluation.thought_counts; neither direction is better."""

Function = Callable[..., float]


@dataclass(frozen=True)
class Metric:
    """A score of generated texts."""

    compute: Function
    needs: tuple[str, ...]  # what `compute` takes, of CAN_NEED
    greater_is_better: bool
    full_marks: float | None  # its value where predictions are their references; None where that is not known
    can_score: Callable[[str, str | None], bool]  # whether full marks are possible, by reference and answer pattern
    min_samples: int = 1  # how many texts of each row it takes at least

    @property
    def takes_samples(self) -> bool:
        """Whether it looks at all samples of a row, not only at the first."""
        return "samples" in self.needs


PASS_AT = re.compile("pass_at_([1-9][0-9]{0,4})")


class MetricRegistry(Registry[Metric]):
    """Metrics by name; `pass_at_<k>` is one for every k."""

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or (isinstance(name, str) and PASS_AT.fullmatch(name) is not None)

    def __missing__(self, name: str) -> Metric:
        if found := PASS_AT.fullmatch(name):
            return _pass_at(int(found[1]))
        return super().__missing__(name)

    def names(self) -> list[str]:
        return [*self, "pass_at_<k>"]


METRICS = MetricRegistry("metric")
"""The metrics that `data.metrics` and `evaluation.metrics` may name."""


def metric(
    name: str,
    *,
    greater_is_better: bool = True,
    full_marks: float | None = None,
    can_score: Callable[[str, str | None], bool] = lambda reference, answer_pattern: True,
    min_samples: int = 1,
) -> Callable[[Function], Function]:
    """Return a decorator that registers a function as a metric, see Metric; ValueError where the function takes what no
    metric gets, or the name is taken.
    """

    def register(compute: Function) -> Function:
        needs = tuple(inspect.signature(compute).parameters)
        if unknown := [need for need in needs if need not in CAN_NEED]:
            raise ValueError(f"the metric {name} takes {', '.join(unknown)}; it can take {', '.join(CAN_NEED)}")
        if name in (*LOSSES, *THOUGHTS):
            raise ValueError(f"every evaluation has a {name} of its own")
        METRICS[name] = Metric(compute, needs, greater_is_better, full_marks, can_score, min_samples)
        return compute

    return register


def has_direction(name: str) -> bool:
    """Return whether a value of metrics.jsonl is better when it is higher, or when it is lower."""
    return name.rpartition("/")[2] not in THOUGHTS


def greater_is_better(name: str) -> bool:
    """Return in which direction a value of metrics.jsonl improves: losses fall, metrics say themselves."""
    score = name.rpartition("/")[2]
    return METRICS[score].greater_is_better if score in METRICS else score not in LOSSES


def is_detail(name: str) -> bool:
    """Return whether a value of metrics.jsonl is for files and figures, and would fill a terminal."""
    return name.rpartition("/")[2] in (*PART_LOSSES, *THOUGHTS)


def compute_metrics(
    names: Sequence[str],
    predictions: Sequence[str],
    references: Sequence[str],
    answer_pattern: str | None,
    place: Callable[[int], str] = "text {}".format,
    samples: Sequence[Sequence[str]] | None = None,
) -> dict[str, float]:
    """Compute the metrics asked for, by name, in that order; DataError names the row on which the pattern does not
    terminate, by its `place`. Without `samples` each row has one, its prediction.
    """
    texts = [[prediction] for prediction in predictions] if samples is None else samples
    given = dict(zip(CAN_NEED, (predictions, references, answer_pattern, place, texts), strict=True))
    metrics = {name: METRICS[name] for name in names}
    return {name: float(one.compute(**{need: given[need] for need in one.needs})) for name, one in metrics.items()}


def is_full_marks(name: str, prediction: str, reference: str, answer_pattern: str | None = None) -> bool:
    """Return whether one prediction gets full marks; never against a reference that the metric can't score.

    Equal texts are answered at once, without the libraries that score; so are metrics whose full marks are not known.
    """
    chosen = METRICS[name]
    if not chosen.can_score(reference, answer_pattern):
        return False
    if prediction == reference or chosen.full_marks is None:
        return True
    samples = [[prediction] * chosen.min_samples]
    value = compute_metrics([name], [prediction], [reference], answer_pattern, samples=samples)[name]
    return math.isclose(value, chosen.full_marks, rel_tol=1e-9)


BLEU_ORDER = 4
"""BLEU compares runs of one to four words."""

INVISIBLE = regex.compile(r"[\p{Cf}\p{Default_Ignorable_Code_Point}\p{Joining_Type=Join_Causing}]+")
"""Format characters: joiners, marks of direction, soft hyphens, selectors of variants, and the strokes that only make
a word longer, as the Arabic tatweel."""
UNSPACED = (
    r"[[\p{LB=SA}\p{LB=AK}\p{LB=AP}\p{LB=AS}\p{LB=VF}\p{LB=VI}\p{Script=Tibetan}\p{LB=ID}\p{LB=CJ}"
    "\u3005-\u3007\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
    r"]&&[\p{L}\p{M}\u3007]]"
)
"""A letter or sign of a script that puts no spaces between words.

They are those between which a line may be broken all the same: classes SA (Thai, Lao, Khmer, Burmese, Tai …), AK to VI
(Balinese, Javanese, Cham …), ID and CJ (Chinese characters, kana, Yi …), and Tibetan.

Source: Unicode Standard Annex 14, "Unicode Line Breaking Algorithm".
"""
RUN = regex.compile(r"[\p{L}\p{N}][\p{L}\p{M}\p{N}]*")
"""A run between spaces, punctuation and symbols; a mark at its start belongs to a symbol, as an emoji."""
WORD = regex.compile(rf"(?={UNSPACED})\X|(?:\p{{M}}|(?!{UNSPACED})[\p{{L}}\p{{N}}])+", regex.VERSION1)
"""A word within a run: one grapheme cluster of a script without spaces, or everything up to the next one."""


def answer(text: str, pattern: str | None) -> str | None:
    """Return what a text answers: all of it, or the last match of the pattern's first group; None without a match.

    Text and pattern are taken in NFC: "é" is the same letter, written as one character or as two. LimitError where the
    pattern does not terminate.
    """
    text = nfc(text)
    if pattern is None:
        return text.strip()
    matches = Pattern("data.answer_pattern", nfc(pattern)).matches(text)
    return matches[-1][1].strip() if matches and matches[-1][1] is not None else None


def _has_answer(reference: str, answer_pattern: str | None) -> bool:
    return answer(reference, answer_pattern) is not None


@metric("exact_match", full_marks=1.0, can_score=_has_answer)
def exact_match(
    predictions: Sequence[str],
    references: Sequence[str],
    answer_pattern: str | None,
    place: Callable[[int], str] = "text {}".format,
) -> float:
    """Compute the share of predictions whose answer is the reference's, from 0 to 1; no answer is no match."""
    hits = 0
    for number, (prediction, reference) in enumerate(zip(predictions, references, strict=True)):
        with at(place, number):
            found = answer(prediction, answer_pattern)
            hits += found is not None and found == answer(reference, answer_pattern)
    return hits / len(predictions)


@metric("majority", full_marks=1.0, can_score=_has_answer, min_samples=2)
def majority(
    samples: Sequence[Sequence[str]],
    references: Sequence[str],
    answer_pattern: str | None,
    place: Callable[[int], str] = "text {}".format,
) -> float:
    """Compute the share of rows whose most frequent answer is the reference's, from 0 to 1.

    Of answers that are as frequent the earliest counts; a sample without an answer has no vote.

    Source: Wang et al. 2022, "Self-Consistency Improves Chain of Thought Reasoning in Language Models".
    """
    hits = 0
    for wanted, found in _answers(samples, references, answer_pattern, place):
        votes = Counter(one for one in found if one is not None).most_common(1)  # ties are in their order
        hits += wanted is not None and [one for one, _ in votes] == [wanted]
    return hits / len(samples)


def pass_at(
    k: int,
    samples: Sequence[Sequence[str]],
    references: Sequence[str],
    answer_pattern: str | None,
    place: Callable[[int], str] = "text {}".format,
) -> float:
    """Compute the chance that one of k samples has the reference's answer, from 0 to 1: the mean over the rows of
    1 - C(n - c, k) / C(n, k), of n samples of which c are right. It is unbiased; k is at most n.

    Source: Chen et al. 2021, "Evaluating Large Language Models Trained on Code", equation 1.
    """
    total = 0.0
    for wanted, found in _answers(samples, references, answer_pattern, place):
        num_wrong = sum(wanted is None or one != wanted for one in found)
        total += 1 - math.comb(num_wrong, k) / math.comb(len(found), k)
    return total / len(samples)


def _pass_at(k: int) -> Metric:
    needs = tuple(inspect.signature(pass_at).parameters)[1:]
    return Metric(partial(pass_at, k), needs, True, full_marks=1.0, can_score=_has_answer, min_samples=k)


def _answers(
    samples: Sequence[Sequence[str]], references: Sequence[str], answer_pattern: str | None, place: Callable[[int], str]
) -> Iterator[tuple[str | None, list[str | None]]]:
    """Yield for each row the answer of its reference and those of its samples."""
    for number, (texts, reference) in enumerate(zip(samples, references, strict=True)):
        with at(place, number):
            yield answer(reference, answer_pattern), [answer(text, answer_pattern) for text in texts]


def words(text: str) -> list[str]:
    """Cut a text of any script into what ROUGE counts: runs of letters, marks and digits, in lower case.

    Of an English text these are rouge-score's own tokens. That keeps a to z and 0 to 9 only: nothing of a Korean text,
    and of a "café" a "caf". Korean is cut at spaces, so a noun with its particle is one word. Where a script puts no
    spaces between words, each grapheme cluster is a word: a character of Chinese and Japanese, a Thai consonant with
    its signs. Characters that are not seen cut no word and make no difference.

    Source of the clusters: Unicode Standard Annex 29, "Unicode Text Segmentation".
    """
    if text.isascii():
        return re.findall("[a-z0-9]+", text.lower())
    return [word for run in RUN.findall(folded(text)) for word in WORD.findall(run)]


TAKEN_APART = {"\u0e4d\u0e32": "\u0e33", "\u0ecd\u0eb2": "\u0eb3", "\u0eab\u0e99": "\u0edc", "\u0eab\u0ea1": "\u0edd"}
"""What NFKC makes of the vowel am of Thai and Lao and of Lao's ho no and ho mo, and these."""


def folded(text: str) -> str:
    """Write a text as ROUGE compares it: NFKC, lower case, and without format characters.

    NFKC joins Hangul that is written letter by letter, makes wide letters plain ones, and takes some letters of Thai
    and Lao apart, which are put together again: each is one cluster with its signs.
    """
    seen = INVISIBLE.sub("", unicodedata.normalize("NFKC", text))
    lower = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", seen).lower())
    for apart, together in TAKEN_APART.items():
        lower = lower.replace(apart, together)
    return lower


def nfc(text: str) -> str:
    """Compose letters and their marks to one character where Unicode has one."""
    return unicodedata.normalize("NFC", text)


def rouge(name: str, predictions: Sequence[str], references: Sequence[str]) -> float:
    """Compute a kind of ROUGE: the F-measure's mean over the rows, from 0 to 1; without stemming. The kinds are rouge1,
    rouge2 (shared words and pairs of words) and rougeL (longest common subsequence of the whole text).

    Source: Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries".
    """
    from rouge_score.rouge_scorer import RougeScorer  # takes a second to import

    scorer = RougeScorer([name], tokenizer=SimpleNamespace(tokenize=words))
    rows = [scorer.score(target=r, prediction=p) for p, r in zip(predictions, references, strict=True)]
    return float(sum(row[name].fmeasure for row in rows) / len(rows))


def _has_words(least: int, reference: str, answer_pattern: str | None) -> bool:
    """Return whether a reference has so many words as ROUGE cuts them."""
    # the last word of a text's beginning may be cut, those in front of it are whole
    return len(words(reference[:100])) > least or len(words(reference)) >= least


for _name, _least in (("rouge1", 1), ("rouge2", 2), ("rougeL", 1)):
    metric(_name, full_marks=1.0, can_score=partial(_has_words, _least))(partial(rouge, _name))


@metric("chrf", full_marks=100.0, can_score=lambda reference, answer_pattern: bool(reference.strip()))
def chrf(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Compute chrF2 of all rows together, from 0 to 100: shared runs of 1 to 6 characters of NFC, spaces left out.

    Of these metrics the one for languages whose words change their form or stand without spaces.

    Source: Popović 2015, "chrF: character n-gram F-score for automatic MT evaluation".
    """
    from sacrebleu import corpus_chrf

    return corpus_chrf([nfc(p) for p in predictions], [[nfc(r) for r in references]]).score


def _has_bleu_words(reference: str, answer_pattern: str | None) -> bool:
    """Return whether a reference has the four words that BLEU needs, as it cuts them."""
    # what stands between spaces is one word or more, unless mteval-13a joins or removes it
    is_plain = "-\n" not in reference and "<skipped>" not in reference
    has_four = is_plain and len(reference.split(maxsplit=BLEU_ORDER)) >= BLEU_ORDER
    return has_four or len(_bleu_tokenizer()(nfc(reference).rstrip()).split()) >= BLEU_ORDER


@metric("bleu", full_marks=100.0, can_score=_has_bleu_words)
def bleu(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Compute BLEU of all rows together, from 0 to 100; 0 also for equal texts where none has four words.

    Words are cut in NFC as mteval-v13a does, at spaces and ASCII punctuation: fit for English and Korean, not for
    Chinese and Japanese, and without the packages that sacrebleu's own cutters for these languages need.

    Source: Papineni et al. 2002, "BLEU: a Method for Automatic Evaluation of Machine Translation".
    """
    from sacrebleu import corpus_bleu

    score = corpus_bleu([nfc(p) for p in predictions], [[nfc(r) for r in references]], tokenize="13a").score
    return min(score, 100.0)  # of equal texts it is rounded to a little more


@cache
def _bleu_tokenizer() -> Callable[[str], str]:
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    return Tokenizer13a()


def perplexity(loss: float) -> float:
    """Compute e to the mean nats per token; infinite where that is too large for a float."""
    return math.exp(loss) if loss < 700 else math.inf
