"""The tasks of lm-evaluation-harness: found by name, loaded with their documents, asked of a model, scored.

The harness prints much, and its progress in lines of its own: it is kept quiet. See also `model`, which answers.
"""

import importlib.util
import inspect
import io
import json
import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import partialmethod
from hashlib import sha256
from itertools import chain, islice
from pathlib import Path
from traceback import walk_tb
from typing import Any
from unittest.mock import patch

import numpy as np

from src.config.problems import Problem, refuse
from src.errors import DataError, TowlineError, one_line
from src.util import did_you_mean, finite, in_words

KEY = "benchmark.tasks"
BOOTSTRAP_SAMPLES = 1000  # for the standard error of a metric that is no mean: within 3 % of its own value
"""Of the harness's 100,000, which take minutes for a task of some thousand documents."""
OF_A_HUB = (
    "A task of the harness takes its documents from a hub: where it can't be reached, they must be in its cache "
    "(HF_HOME). Or write a task of your own into benchmark.task_dir, whose dataset_path: json and "
    "dataset_kwargs: {data_files: …} name local files; docs/benchmark.md has one"
)


@dataclass(frozen=True)
class Tasks:
    """Tasks by name, in the order in which they were asked for, and the groups whose scores are made of theirs."""

    single: dict[str, Any]
    groups: dict[str, Any]


def check_installed() -> None:
    """Raise ConfigError where lm-evaluation-harness is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        what = "needs lm-evaluation-harness, which is not installed: pip install -c constraints.txt -e '.[benchmark]'"
        raise refuse([Problem("python -m src.benchmark", what, has_value=False)])


def version() -> str:
    """Return the version of the harness."""
    import lm_eval

    return lm_eval.__version__


def load_tasks(
    names: Sequence[str], task_dir: str | None, num_fewshot: int | None, warn: Callable[[str], None]
) -> Tasks:
    """Load tasks, with those of groups and tags, and their documents; set how many examples come before one.

    ConfigError names one that is not known, DataError one that can't be loaded, or that this command does not do.
    """
    if task_dir is not None and not Path(task_dir).is_dir():
        raise refuse([Problem.on_command_line("benchmark.task_dir", "no folder there", task_dir)])
    with quiet():
        from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
        from lm_eval.tasks import TaskManager

        random.seed(DEFAULT_RANDOM_SEED)  # some tasks draw what they ask; with the seeds of the harness always the same
        np.random.seed(DEFAULT_OTHER_SEED)
        own = TaskManager(include_path=task_dir, include_defaults=False)
        manager = own if set(names) <= {*own.all_subtasks} else TaskManager(include_path=task_dir)
        if unknown := [name for name in names if name not in manager.task_index]:
            raise refuse(list(_unknown(unknown, manager.all_tasks, task_dir)))
        single, groups = dict[str, Any](), dict[str, Any]()
        for name in names:
            loaded = _load(manager, name)
            single |= loaded["tasks"]
            groups |= {key: group for key, group in loaded["groups"].items() if group.has_aggregation}
    for name, task in single.items():
        if remark := set_fewshot(task, num_fewshot):
            warn(f"{name}: {remark}")
        if getattr(task, "UNSAFE_CODE", False):
            raise DataError(f"{KEY}: {name} runs code that the model writes, which this command does not")
        if missing := [metric for metric, function in _metrics(task).items() if function is None]:
            raise DataError(f"{KEY}: {name} has metrics that the harness does not know: {in_words(missing)}")
        if getattr(task, "MULTIMODAL", False):
            raise DataError(f"{KEY}: {name} asks about pictures or sound; this model reads text only")
    return Tasks(single, groups)


def _unknown(names: Sequence[str], known: Sequence[str], task_dir: str | None) -> Iterator[Problem]:
    """Yield a problem for each name that is no task's, and for each file of the folder that the harness passed over."""
    from lm_eval.tasks._yaml_loader import load_yaml

    for name in names:
        yield Problem.on_command_line(KEY, f"no such task{did_you_mean(name, known)}", name)
    for file in sorted(Path(task_dir).rglob("*.yaml")) if task_dir is not None else ():
        try:
            load_yaml(file, resolve_func=False)
        except Exception as error:  # as many kinds as there are mistakes in a file
            reason = f"{file.relative_to(str(task_dir))} in it can't be read: {one_line(error)}"
            yield Problem.on_command_line("benchmark.task_dir", reason, task_dir)


def _load(manager: Any, name: str) -> Any:
    try:
        return manager.load([name])
    except (OSError, ImportError) as error:
        hint = OF_A_HUB if isinstance(error, OSError) else "Install what it needs"
        raise DataError(f"{KEY}: {name} can't be loaded: {one_line(error)}.\n{hint}") from error
    except Exception as error:  # a task is YAML, templates and code of anybody's: it may raise anything
        kind = "" if isinstance(error, TowlineError) else f" ({type(error).__name__})"
        raise DataError(f"{KEY}: {name} can't be loaded: {one_line(error)}{kind}") from error


def _metrics(task: Any) -> dict[str, Any]:
    """Return the functions of a task's metrics by name; none of a task that computes its metrics itself."""
    return {} if task.get_config("process_results") is not None else getattr(task, "_metric_fn_list", {})


def set_fewshot(task: Any, num_fewshot: int | None) -> str:
    """Set how many examples come before a document, and how they are drawn, as the harness does; return a remark.

    A task that says 0 keeps it: its documents would not make examples.
    """
    from lm_eval.defaults import DEFAULT_OTHER_SEED

    own = task.get_config("num_fewshot")
    is_kept = own == 0 and num_fewshot not in (None, 0)
    if own is None or (num_fewshot is not None and not is_kept):
        task.set_config("num_fewshot", num_fewshot or 0)
    task.set_fewshot_seed(DEFAULT_OTHER_SEED)  # examples as in published scores, whatever the run's seed is
    return "the task itself says num_fewshot: 0, which stays" if is_kept else ""


def describe_task(task: Any, limit: int | None) -> dict[str, Any]:
    """Return what decides the questions of a task, as plain values: its settings, and a hash of its documents."""
    settings = {f"task.{name}": value for name, value in task.dump_config().items() if name not in ("task", "metadata")}
    examples = getattr(task, "sampler", None)
    docs = chain(islice(task.eval_docs, limit), examples.df if examples and task.get_config("num_fewshot") else ())
    digest = sha256()
    for doc in docs:
        digest.update(as_json(doc).encode() + b"\n")
    plain = {"task.version": task.VERSION, **settings, "task.documents": digest.hexdigest()[:32]}
    return json.loads(as_json(plain))


def as_json(value: Any) -> str:
    """Return values of a task as JSON: functions as their code, what JSON has not as text."""
    return json.dumps(finite(value), default=_plain, ensure_ascii=False)


def _plain(value: Any) -> Any:
    from lm_eval.utils import handle_non_serializable

    if not callable(value):
        return handle_non_serializable(value)
    try:
        return inspect.getsource(value)
    except (OSError, TypeError):
        return f"{value.__module__}.{value.__qualname__}"


def ask(task: Any, model: Any, limit: int | None, system_prompt: str | None, *, is_chat: bool) -> dict[str, Any]:
    """Ask a model all questions of a task; return the harness's own results, samples included.

    Interrupted wherever the model is.
    """
    from lm_eval.evaluator import evaluate

    with quiet(), patch.dict("os.environ", {"DISABLE_MULTIPROC": "1"}):
        try:
            return evaluate(
                model,
                {"tasks": {task.task_name: task}},
                limit=limit,
                bootstrap_iters=BOOTSTRAP_SAMPLES,
                system_instruction=system_prompt,
                apply_chat_template=is_chat,
                fewshot_as_multiturn=is_chat,
            )
        except (TowlineError, OSError, MemoryError):
            raise
        except Exception as error:  # templates, filters and metrics are anybody's: they may raise anything
            if any(
                frame.f_code.co_filename == inspect.getfile(type(model)) for frame, _ in walk_tb(error.__traceback__)
            ):
                raise
            problem = f"{one_line(error)} ({type(error).__name__})"
            raise DataError(f"{KEY}: {task.task_name} can't be asked or scored: {problem}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Keep what the harness and its libraries print from the terminal: bars, remarks, and what they log."""
    from tqdm import tqdm

    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with redirect_stdout(io.StringIO()), patch.object(tqdm, "__init__", partialmethod(tqdm.__init__, disable=True)):
            yield
    finally:
        logging.disable(before)


def scores(results: Mapping[str, Any], name: str) -> dict[str, dict[str, Any]]:
    """Return the metrics of a task or group by name, each with its standard error, or null where it has none.

    The name of a filter follows after a comma, as in the harness, but of the one that does nothing.
    """
    found = {}
    for key, value in results.items():
        metric, comma, kind = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        error = results.get(f"{metric}_stderr,{kind}")
        found[metric if kind == "none" else key] = {
            "value": value,
            "stderr": error if isinstance(error, int | float) else None,
        }
    if not found:
        raise DataError(f"{KEY}: {name} has no metric")
    return found


def task_hash(samples: Sequence[Mapping[str, Any]]) -> str:
    """Return the harness's hash of a task: of all its documents, prompts and targets, as its own reports have it."""
    from lm_eval.utils import hash_string

    return hash_string("".join(one["doc_hash"] + one["prompt_hash"] + one["target_hash"] for one in samples))
