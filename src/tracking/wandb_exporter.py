"""A run's folder as a run of Weights & Biases, online or in `wandb/` of the folder. The door to wandb.

Whenever the run is opened, all lines so far are logged. Online, W&B takes none that is not later than its last step, so
it keeps the first values of a step that is repeated. Offline, nothing is there to decide that: the files are written
anew, in place of earlier ones. So it does not matter what wandb had in memory when a process died.
"""

import hashlib
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from src import secrets
from src.config.frozen import CONFIG, SWEEP, read_starts
from src.config.places import remove_tree
from src.errors import visible
from src.records import read_json, read_yaml
from src.tracking.exporters import EXPORTERS, DeliveryError
from src.tracking.line_exporter import LineExporter
from src.tracking.run_folder import SUMMARY
from src.tracking.step_logs import metrics_of

FOLDER = "wandb"
LONGEST_NAME, LONGEST_TAG = 128, 64  # characters, by W&B's own limits
SECONDS = 25  # that wandb may take to open or end a run; less than the end of a run waits for a call
FLUSH_SECONDS = 2.0  # that wandb's process may take to write what it has, once a run has ended
EXIT_CODES = {"FINISHED": 0, "PRUNED": 0, "PREEMPTED": 75}
BLOCK_BYTES, HEADER_BYTES, WHOLE, LAST = 32768, 7, 1, 4  # of LevelDB's log format, which offline files have


@EXPORTERS.register("wandb")
class WandbExporter(LineExporter):
    """Logs metrics, the configuration and the summary."""

    can_be_synced = True

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self._run: Any = None
        self._last_step = 0  # that W&B has
        self.mode = self.config.mode or os.environ.get("WANDB_MODE") or "online"
        self.is_local = self.mode == "offline"

    @property
    def run_id(self) -> str | None:
        return self._state.get("run_id")

    @property
    def where(self) -> str:
        if self.is_local:
            return str(self.folder / FOLDER)
        return secrets.without_credentials(os.environ.get("WANDB_BASE_URL") or "its cloud")

    def deliver(self) -> Iterator[None]:
        try:
            yield from super().deliver()
        except Exception:
            self._run = None  # opened anew, with all lines
            if "wandb" in sys.modules:  # its process would hold the run
                self.activity.call(sys.modules["wandb"].teardown)
            raise

    def rewind_to(self, step: int) -> None:
        is_elsewhere = self._state.get("mode") != self.mode
        if is_elsewhere or (self.is_local and self._state.get("ended") and self._steps_offline() != self._steps()):
            self._save_state(ended=None, late=None)

    def write(self, lines: Sequence[Mapping[str, Any]]) -> None:
        # what is measured after the end is no later step; it is in the summary, which `close` brings
        self._log(self._opened(), lines)

    def close(self, state: str) -> None:
        run = self._opened()
        if state == "FINISHED" and (self.folder / SUMMARY).is_file():
            run.summary.update(metrics_of(read_json(self.folder / SUMMARY)))
        self._run = None
        run.finish(exit_code=EXIT_CODES.get(state, 1))
        until = time.monotonic() + FLUSH_SECONDS
        while self.is_local and self._steps_offline() != self._steps():
            if time.monotonic() > until:
                reason = f"not all steps are in the files in {self.where}; is the disk full?"
                raise DeliveryError(reason, is_lasting=False)
            time.sleep(0.02)

    def _log(self, run: Any, lines: Sequence[Mapping[str, Any]]) -> None:
        for line in lines:
            if line["step"] > self._last_step:
                run.log(metrics_of(line), step=line["step"])
                self._last_step = line["step"]

    def _opened(self) -> Any:
        """Return the run, opened and with all lines that were delivered before."""
        if self._run is None:
            self._save_state(run_id=self.run_id or self._new_id(), mode=self.mode, ended=None, late=None)
            if self.is_local:
                for old in self._offline_folders():
                    remove_tree(old)
            self._run = self._begin()
            self._last_step = self._run.step - 1 if self._run.resumed else 0
            self._log(self._run, self._metrics()[: self._num_delivered])
        return self._run

    def _begin(self) -> Any:
        try:
            import wandb
        except ModuleNotFoundError as error:
            raise DeliveryError("wandb is not installed: pip install -c constraints.txt -e '.[wandb]'") from error
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        wandb.setup(wandb.Settings(silent=True))  # it would ask for an account in the terminal
        config = self.config
        in_sweep = (self.folder.parent / SWEEP).is_file()
        settings = wandb.Settings(
            **dict.fromkeys(
                ("silent", "disable_git", "x_disable_meta", "x_disable_stats", "disable_job_creation"), True
            ),
            console="off",
            save_code=False,
            reinit="create_new",
            init_timeout=SECONDS,
            finish_timeout=SECONDS,
            finish_timeout_raises=True,
        )
        return wandb.init(
            dir=str(self.folder),
            mode=self.mode,
            id=self.run_id,
            resume="allow",
            project=re.sub(r"[/\\#?%:]", "-", _shown(config.experiment_name, LONGEST_NAME)),
            name=_shown(config.run_name, LONGEST_NAME),
            group=_shown(self.folder.resolve().parent.name, LONGEST_NAME) if in_sweep else None,
            tags=[_shown(f"{name}: {text}", LONGEST_TAG) for name, text in config.tags.items()],
            config=read_yaml(self.folder / CONFIG),
            settings=settings,
        )

    def _new_id(self) -> str:
        """Return an id that a run has alone, and has again if what is remembered of it is lost."""
        began = [start["time"] for start in read_starts(self.folder)[:1]]
        return hashlib.sha256(f"{self.folder.resolve()} {began}".encode()).hexdigest()[:12]

    def _steps(self) -> list[int]:
        return [line["step"] for line in self._metrics()]

    def _offline_folders(self) -> list[Path]:
        return sorted((self.folder / FOLDER).glob(f"offline-run-*-{self.run_id}"))

    def _steps_offline(self) -> list[int]:
        """Return the steps in the files of an offline run, as often as they are in there."""
        from wandb.proto.wandb_internal_pb2 import Record

        files = [folder / f"run-{self.run_id}.wandb" for folder in self._offline_folders()]
        contents = [file.read_bytes() for file in files if file.is_file()]
        found = [Record.FromString(raw) for content in contents for raw in _records(content)]
        return [one.history.step.num for one in found if one.WhichOneof("record_type") == "history"]


def _records(content: bytes) -> Iterator[bytes]:
    """Yield the whole records of a file in LevelDB's log format, of which each block holds parts."""
    at, record = HEADER_BYTES, b""
    while at + HEADER_BYTES <= len(content):
        if (left := BLOCK_BYTES - at % BLOCK_BYTES) < HEADER_BYTES:
            at += left
            continue
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        at += HEADER_BYTES + length
        record += content[at - length : at]
        if kind in (WHOLE, LAST):
            yield record
            record = b""


def _shown(text: str, most: int) -> str:
    """Return a name without secrets and control characters, as long as W&B takes it."""
    return visible(text, is_line=True)[:most]
