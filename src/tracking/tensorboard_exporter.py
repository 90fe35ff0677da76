"""A run's folder as TensorBoard's event files, in `tensorboard/` of the folder. The door to tensorboard.

Scalars have 32 bits, as everybody's: of those with 64, TensorBoard's data server (0.7.2) shows nothing. Nothing can be
taken out of an event file: where steps are repeated, or the file is not as it was left, a new one is written whole in
its place.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

from src.config.frozen import CONFIG, read_status
from src.errors import DamagedFileError, visible
from src.markdown import fenced
from src.records import read_bytes
from src.tracking.exporters import EXPORTERS
from src.tracking.line_exporter import LineExporter
from src.tracking.step_logs import SAMPLES, metrics_of, read_step_log
from src.util import replaced_when_written

FOLDER = "tensorboard"
FILE = "events.out.tfevents.{:010}.towline"
_NUMBER = re.compile(r"events\.out\.tfevents\.(\d+)\.towline")


@EXPORTERS.register("tensorboard")
class TensorBoardExporter(LineExporter):
    """Writes scalars, samples as text, and the configuration as text at step 0."""

    can_be_synced = True

    @property
    def where(self) -> str:
        return str(self.folder / FOLDER)

    def rewind_to(self, step: int) -> None:
        if not self._is_as_left(step):
            self._rewrite([line for line in self._metrics() if line["step"] <= step])
            self._save_state()

    def write(self, lines: Sequence[Mapping[str, Any]]) -> None:
        before = self._metrics()[: self._num_delivered]
        if not self._is_as_left(before[-1]["step"] if before else 0):
            self._rewrite([*before, *lines])
            return
        content = BytesIO()
        _write(content, self._events(lines))
        size = self._state["bytes"]
        with open(self._file, "r+b") as file:
            try:
                file.seek(size)
                file.write(content.getbuffer())
                file.flush()
            except OSError:
                file.truncate(size)  # a reader would stop at half an event
                raise
        self._note(self._file, lines)

    @property
    def _file(self) -> Path:
        return self.folder / FOLDER / str(self._state.get("file"))

    def _is_as_left(self, step: int) -> bool:
        """Return whether the event file ends with this step, and has the size that it was left with."""
        try:
            return self._state.get("step") == step and self._file.stat().st_size == self._state.get("bytes")
        except OSError:
            return False

    def _note(self, file: Path, lines: Sequence[Mapping[str, Any]]) -> None:
        """Have the state say what the file holds; it is saved with the number of lines that are delivered."""
        last = lines[-1]["step"] if lines else 0
        self._state |= {"step": last, "file": file.name, "bytes": file.stat().st_size}

    def _rewrite(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Write a new event file with these lines and remove the earlier ones."""
        folder = self.folder / FOLDER
        folder.mkdir(exist_ok=True)
        old = {int(found[1]): one for one in folder.iterdir() if (found := _NUMBER.fullmatch(one.name))}
        file = folder / FILE.format(max(old, default=0) + 1)  # later by name, as TensorBoard reads them
        unread = folder / "rewritten"  # a name that TensorBoard does not read
        with replaced_when_written(unread) as part, open(part, "wb") as opened:
            _write(opened, self._head())
            _write(opened, self._events(lines))
        os.replace(unread, file)
        for one in old.values():
            one.unlink()
        self._state["late"] = None  # what was measured after the end is added again
        self._note(file, lines)

    def _head(self) -> Iterator[Any]:
        """Yield what an event file begins with; a TensorBoard that is open forgets then what it has read before."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        yield Event(wall_time=self._began, file_version="brain.Event:2")
        yield Event(wall_time=self._began, step=0, session_log=SessionLog(status=SessionLog.START))
        try:
            text = read_bytes(self.folder / CONFIG, None).decode()
        except (FileNotFoundError, ValueError):
            return
        yield _event(self._began, 0, [_text("config", fenced(visible(text), "yaml"))])

    def _events(self, lines: Sequence[Mapping[str, Any]]) -> Iterator[Any]:
        """Yield the events of some lines, each dated by its line."""
        samples = self._samples_by_step()
        for line in lines:
            values = [_scalar(name, value) for name, value in metrics_of(line).items()]
            for number, sample in enumerate(samples.get(line["step"], ()), 1):
                values.append(_text(f"samples/{number}", _markdown(sample)))
            yield _event(self._began + line.get("perf/elapsed_seconds", 0.0), line["step"], values)

    @property
    def _began(self) -> float:
        """When the run was begun, in seconds since 1970."""
        began = read_status(self.folder).get("started")
        return datetime.fromisoformat(began).timestamp() if began else 0.0

    def _samples_by_step(self) -> dict[int, list[Mapping[str, Any]]]:
        found: dict[int, list[Mapping[str, Any]]] = {}
        try:
            for sample in self._lines(SAMPLES, read_step_log):
                found.setdefault(sample["step"], []).append(sample)
        except DamagedFileError as error:  # it holds up no metrics
            self.warn_once(str(error))
        return found


def _write(file: BinaryIO, events: Iterable[Any]) -> None:
    from tensorboard.summary.writer.record_writer import RecordWriter

    writer = RecordWriter(file)
    for event in events:
        writer.write(event.SerializeToString())


def _event(at: float, step: int, values: Sequence[Any]) -> Any:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary

    return Event(wall_time=at, step=step, summary=Summary(value=values))


def _scalar(name: str, value: float) -> Any:
    from tensorboard.compat.proto.summary_pb2 import Summary

    return Summary.Value(tag=name, simple_value=value)


def _text(name: str, markdown: str) -> Any:
    from tensorboard.compat.proto.summary_pb2 import DATA_CLASS_TENSOR, Summary, SummaryMetadata
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
    from tensorboard.compat.proto.types_pb2 import DT_STRING

    plugin = SummaryMetadata.PluginData(plugin_name="text")
    return Summary.Value(
        tag=name,
        tensor=TensorProto(dtype=DT_STRING, tensor_shape=TensorShapeProto(), string_val=[markdown.encode()]),
        metadata=SummaryMetadata(plugin_data=plugin, data_class=DATA_CLASS_TENSOR),
    )


def _markdown(sample: Mapping[str, Any]) -> str:
    """Return a sample as Markdown in which its texts are code, so that nothing in them is obeyed."""
    texts = {name: sample.get(name) for name in ("prompt", "text", "answer", "reference")}
    return "\n\n".join(f"**{name}**\n\n{fenced(visible(text), '')}" for name, text in texts.items() if text is not None)
