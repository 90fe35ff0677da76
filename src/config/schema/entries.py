"""Sections that one entry reads alone; their defaults and texts stand here, not in conf/."""

import re
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from src.config.schema.checks import AT_LEAST_ONE, COUNT, PATH, STRINGS, Check
from src.config.schema.fields import GENERATING, key
from src.config.schema.model import Dtype
from src.metrics import METRICS

USING_RUNS = (*GENERATING, "export")
"""The entries that use finished runs."""
TASKS = Check("a list of one or more names of tasks", lambda v: bool(v) and all(v))
OPTIONAL_STRINGS = Check(STRINGS.allowed, lambda v: v is None or STRINGS.holds(v))
CHECKPOINT = Check("best, last or step-N", lambda v: v is None or re.fullmatch(r"best|last|step-\d+", v) is not None)


@dataclass
class PreflightConfig:
    """What `python -m src.preflight` shows and writes in addition."""

    rows: int = key(COUNT, default=4, text="rows of train that are shown, with the tokens in the loss in colour")
    dump: str | None = key(PATH, default=None, text="a file that gets every encoded row of train as JSON lines")
    measure: bool = key(
        default=False,
        text="true: a batch of each kind is computed, so that memory and time are measured; loads the weights",
    )


@dataclass
class PredictConfig:
    """In which batches `python -m src.predict` generates, and where it writes."""

    batch_size: int | None = key(
        AT_LEAST_ONE, default=None, text="prompts at a time; null: training.per_device_eval_batch_size"
    )
    output: str | None = key(
        PATH, default=None, text="the folder of the predictions; null: predictions/ in the run's folder"
    )

    def folder(self, run_dir: Path) -> Path:
        """Return the folder of the predictions: predict.output, or predictions/ in the run's folder."""
        return run_dir / "predictions" if self.output is None else Path(self.output)


VIEWS = ("gold", "none", "shuffled", "own")
"""The views of src.evaluate: thoughts as they are given, left out, another row's, the model's own."""
VIEW_NAMES = Check(
    f"a list of views, each one of {', '.join(VIEWS)}, and once",
    lambda v: v is None or (isinstance(v, list) and 0 < len(v) == len(set(map(str, v))) and set(v) <= set(VIEWS)),
)
SET_NAMES = Check("a list of sets' names, or null", lambda v: v is None or (STRINGS.holds(v) and bool(v)))


@dataclass
class EvaluateConfig:
    """On which rows, with which thoughts and against what `python -m src.evaluate` scores a model."""

    views: Any = key(
        VIEW_NAMES,
        default=None,
        text="thoughts before the answers: gold (as given), none, shuffled (another row's), own (the model's); "
        "null: all of them where the rows have thoughts, else gold",
    )
    sets: Any = key(SET_NAMES, default=None, text="which validation and test sets, by their names; null: all")
    against: str | None = key(
        PATH, default=None, text="the folder of another run, or of its evaluation, to compare with on the same rows"
    )
    output: str | None = key(
        PATH,
        default=None,
        text="the folder of the evaluation; null: evaluations/ in the run's folder, or where a model without a run is "
        "scored, outputs/<name>/evaluations-HASH",
    )

    def folder(self, run_dir: Path) -> Path:
        """Return the folder of the evaluation: evaluate.output, or evaluations/ in the run's folder."""
        return run_dir / "evaluations" if self.output is None else Path(self.output)


@dataclass
class ExportEntryConfig:
    """What `python -m src.export` writes, and where."""

    merge: bool = key(default=True, text="true: whole weights, an adapter merged into them; false: the adapter alone")
    dtype: Dtype = key(default=Dtype.auto, text="type of the weights that are written; auto: as they are")
    padding: bool = key(
        default=True, text="false: matrices of tokens have one row for each token, none of tokens.pad_to_multiple_of"
    )
    checkpoint: str | None = key(
        CHECKPOINT,
        default=None,
        text="weights of a checkpoint, best, last or step-N, also of a run that is not finished; null: those in model/",
    )
    output: str | None = key(PATH, default=None, text="the folder to write; null: export/ in the run's folder")

    def folder(self, run_dir: Path) -> Path:
        """Return where exports are written: export.output, or export/ in the run's folder, which has several."""
        return run_dir / "export" if self.output is None else Path(self.output)


@dataclass
class BenchmarkConfig:
    """Which tasks `python -m src.benchmark` asks a run's model, how, and where it writes."""

    tasks: list[str] | None = key(
        TASKS, default=None, text="tasks, groups and tags of lm-evaluation-harness, or of benchmark.task_dir"
    )
    task_dir: str | None = key(PATH, default=None, text="a folder with YAML files of tasks of your own")
    limit: int | None = key(
        AT_LEAST_ONE, default=None, text="the first so many documents of each task, to try something; null: all"
    )
    num_fewshot: int | None = key(COUNT, default=None, text="examples before each document; null: as the task says")
    batch_size: int | None = key(
        AT_LEAST_ONE, default=None, text="prompts at a time; null: training.per_device_eval_batch_size"
    )
    output: str | None = key(
        PATH, default=None, text="the folder of the results; null: benchmarks/ in the run's folder"
    )

    def folder(self, run_dir: Path) -> Path:
        """Return the folder of the results: benchmark.output, or benchmarks/ in the run's folder."""
        return run_dir / "benchmarks" if self.output is None else Path(self.output)


class EnsembleMethod(Enum):
    """How several finished runs become one."""

    soup = "soup"
    greedy_soup = "greedy_soup"
    logits = "logits"
    consensus = "consensus"


def _compares_texts(name: Any) -> bool:
    """Return whether a metric says how alike two texts are, and what of equal ones."""
    return name in METRICS and METRICS[name].full_marks is not None and METRICS[name].min_samples == 1


SIMILARITY = Check(f"a metric that compares two texts: {', '.join(filter(_compares_texts, METRICS))}", _compares_texts)


@dataclass
class EnsembleConfig:
    """How `python -m src.ensemble` makes one of several finished runs, and where it writes."""

    method: EnsembleMethod = key(
        default=EnsembleMethod.soup,
        text="soup: the mean of the weights; greedy_soup: of those that make validation better; logits: the mean of "
        "the probabilities of each token; consensus: of the members' texts the one most like the others",
    )
    similarity: str = key(SIMILARITY, default="rougeL", text="of consensus: the metric by which texts are alike")
    metric: str | None = key(
        default=None,
        text="of greedy_soup: what has to get better, eval/validation/…; null: checkpoint.metric_for_best_model",
    )
    top: int | None = key(AT_LEAST_ONE, default=None, text="of a sweep: so many settings, the best ones; null: all")
    output: str | None = key(
        PATH, default=None, text="the folder to write; null: ensembles/… in the sweep's folder, or in outputs/"
    )


@dataclass
class ReportConfig:
    """What `python -m src.report` shows of which runs, and where it writes."""

    where: str | None = key(
        default=None, text="the runs of the table: KEY OP VALUE, joined by and, or, not and parentheses; null: all"
    )
    columns: list[str] | None = key(
        OPTIONAL_STRINGS,
        default=None,
        text="columns of the table: keys of the configuration, metrics, or what is known of a run; null: a choice",
    )
    csv: str | None = key(PATH, default=None, text="a file that gets the table with one column for each value")
    output: str | None = key(
        PATH,
        default=None,
        text="the HTML page of dir or dirs; null: report.html in that folder, comparison.html in this one of several",
    )


ENTRY_SECTIONS: dict[str, type] = {
    "preflight": PreflightConfig,
    "predict": PredictConfig,
    "evaluate": EvaluateConfig,
    "export": ExportEntryConfig,
    "benchmark": BenchmarkConfig,
    "ensemble": EnsembleConfig,
    "report": ReportConfig,
}
"""Sections that one entry reads, `python -m src.<name>`, and no other takes; they have their defaults here."""
