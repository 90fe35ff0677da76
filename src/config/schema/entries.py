"""Sections that one entry reads alone; their defaults and texts stand here, not in conf/."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from src.config.schema.checks import AT_LEAST_ONE, COUNT, PATH
from src.config.schema.fields import key


@dataclass
class PreflightConfig:
    """What `python -m src.preflight` shows and writes in addition."""

    rows: int = key(COUNT, default=4, text="rows of train that are shown, with the tokens in the loss in colour")
    dump: str | None = key(PATH, default=None, text="a file that gets every encoded row of train as JSON lines")
    measure: bool = key(
        default=False,
        text="true: a batch of each kind is computed, so that memory and time are measured; loads the weights",
    )


_key = partial(key, default=None, read_by_predict=True)


@dataclass
class PredictConfig:
    """In which batches `python -m src.predict` generates, and where it writes."""

    batch_size: int | None = _key(AT_LEAST_ONE, text="prompts at a time; null: training.per_device_eval_batch_size")
    output: str | None = _key(PATH, text="the folder of the predictions; null: predictions/ in the run's folder")

    def folder(self, run_dir: Path) -> Path:
        """Return the folder of the predictions: predict.output, or predictions/ in the run's folder."""
        return run_dir / "predictions" if self.output is None else Path(self.output)


ENTRY_SECTIONS: dict[str, type] = {"preflight": PreflightConfig, "predict": PredictConfig}
"""Sections that one entry reads, `python -m src.<name>`, and no other takes; they have their defaults here."""
