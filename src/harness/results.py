"""The files of a task's result, and what decided it.

`<task>.jsonl` has a line for each document and filter, `<task>.json` the scores and what decided them. It is written
last, so a task that has it is done.
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import NoneType
from typing import Any

from src import records
from src.config.job import Job
from src.config.schema import RunConfig
from src.errors import RunFolderError
from src.evaluation.predictions import SAMPLING, model_key
from src.evaluation.row_log import differences
from src.harness import tasks
from src.harness.settings import generation_settings
from src.records import damaged, file_digest
from src.util import replaced_when_written, write_json

RESULT_KEYS: Mapping[str, records.Types] = {
    **dict.fromkeys(("task", "task_hash", "lm_eval"), str),
    **dict.fromkeys(("metrics", "decided_by", "samples"), dict),
    **dict.fromkeys(("num_samples", "num_truncated"), int),
    "version": (str, *records.NUMBER, NoneType),
}


class TaskResult:
    """The files of one task in a folder that this process holds; `decided_by` decides the result, by name."""

    def __init__(self, folder: Path, name: str, decided_by: Mapping[str, Any]) -> None:
        self.name = name
        base = name.replace("/", "_")  # some groups of the harness name theirs so
        self.file, self.lines = folder / f"{base}.json", folder / f"{base}.jsonl"
        self._decided_by = dict(decided_by)

    def claim(self, *, force: bool) -> str:
        """Return why what is there may not be replaced, '' where nothing is, or it is this very result.

        DamagedFileError where it can't be read, or is not what was written. With `force` it is removed.
        """
        if force:
            self.file.unlink(missing_ok=True)  # the lines are replaced when the new ones are there
        if not self.is_done():
            return ""
        found = differences(self.read()["decided_by"], self._decided_by)
        return "\n  ".join([f"{self.file} holds a result that something else decided:", *found]) if found else ""

    def check_files(self) -> None:
        """Raise DamagedFileError where something else than plain files is in their place."""
        for file in (self.file, self.lines):
            records.check_plain(file, f"Move it away: the same command does {self.name} anew")

    def is_done(self) -> bool:
        """Return whether the result is there."""
        return self.file.exists()

    def read(self) -> dict[str, Any]:
        """Return the result; raises as `claim`."""
        remedy = f"Restore it; or force=true does {self.name} anew."
        result = records.read_json(self.file, RESULT_KEYS, remedy=remedy)
        if not self.lines.is_file() or file_digest(self.lines) != result["samples"]:
            raise damaged(self.lines, f"it is not what {self.file.name} says was written there", remedy)
        return result

    def write(self, results: Mapping[str, Any], texts: Mapping[int | None, list[str]], num_truncated: int) -> None:
        """Write what the harness returned of this task; `texts` are what was generated for each document."""
        samples = results["samples"][self.name]
        with replaced_when_written(self.lines) as part, open(part, "w", encoding="utf-8") as file:
            for sample in samples:
                generated = {"generated": texts[sample["doc_id"]]} if sample["doc_id"] in texts else {}
                file.write(tasks.as_json(sample | generated) + "\n")
        scores = tasks.scores(results["results"][self.name], self.name)
        result = {
            "task": self.name,
            "version": results["versions"][self.name],
            "task_hash": tasks.task_hash(samples),
            "metrics": scores,
            "num_samples": results["n-samples"][self.name]["effective"],
            "num_truncated": num_truncated,
            "lm_eval": tasks.version(),
            "decided_by": self._decided_by,
            "samples": file_digest(self.lines),
        }
        write_json(self.file, result)

    def metrics(self) -> dict[str, float]:
        """Return the scores by their names in summary.json, `benchmark/<task>/…`, and the number of documents."""
        result = self.read()
        return flat_metrics(self.name, result["metrics"]) | {
            f"benchmark/{self.name}/num_samples": result["num_samples"]
        }


def flat_metrics(name: str, scores: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Return scores and their standard errors by their names in summary.json, those that are numbers."""
    by_name = {
        f"benchmark/{name}/{metric}{end}": score[key]
        for metric, score in scores.items()
        for key, end in (("value", ""), ("stderr", "_stderr"))
    }
    return {name: value for name, value in by_name.items() if isinstance(value, int | float)}


def open_results(folder: Path, loaded: tasks.Tasks, job: Job) -> dict[str, TaskResult]:
    """Return the results of tasks, with what the folder has of them.

    RunFolderError names what decided otherwise what is there; DamagedFileError where that can't be read. Both are
    raised before anything is asked or removed.
    """
    config, own = job.config, job.entry_section
    common = {
        "benchmark.limit": own.limit,
        "data.format": config.data.format,
        "data.system_prompt": config.data.system_prompt,
        "lm_eval": tasks.version(),
        **{f"tokens.{key}": job.frozen["tokens"][key] for key in ("thought_open", "thought_close")},
        **model_key(config, job.run_dir / "model"),
    }
    results = {
        name: TaskResult(folder, name, tasks.describe_task(task, own.limit) | _generation_key(task, config) | common)
        for name, task in loaded.single.items()
    }
    for result in results.values():
        result.check_files()
    refused = list(filter(None, (result.claim(force=config.force) for result in results.values())))
    if refused:
        hint = "benchmark.output=DIR puts the new results elsewhere; force=true removes these and does the tasks anew"
        raise RunFolderError("\n".join([*refused, hint]))
    return results


def _generation_key(task: Any, config: RunConfig) -> dict[str, Any]:
    """Return the settings with which a task's answers are generated; the seed decides only where words are drawn."""
    if task.OUTPUT_TYPE != "generate_until":
        return {}
    thinks = config.thought_tags is not None
    settings, _ = generation_settings(task.get_config("generation_kwargs") or {}, config.generation, thinks=thinks)
    draws = settings.do_sample
    key = {
        f"generation.{name}": getattr(value, "value", value)
        for name, value in asdict(settings).items()
        if draws or name not in SAMPLING
    }
    return key | ({"seed": config.seed} if draws else {})


def group_metrics(group: Any, results: Mapping[str, TaskResult]) -> dict[str, float]:
    """Return the scores that the harness makes of a group's tasks, by their names in summary.json."""
    of_tasks = {}
    for name, result in results.items():
        read = result.read()
        of_tasks[name] = {"sample_len": read["num_samples"]}
        for metric, score in read["metrics"].items():
            metric, _, kind = metric.partition(",")
            of_tasks[name] |= {f"{metric},{kind or 'none'}": score["value"]}
            if score["stderr"] is not None:
                of_tasks[name] |= {f"{metric}_stderr,{kind or 'none'}": score["stderr"]}
    return flat_metrics(group.name, tasks.scores(group.aggregate(of_tasks), group.name))
