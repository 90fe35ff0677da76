"""Whatever becomes of a tracker, training goes on, and once its store is well it has what metrics.jsonl says, once."""

from __future__ import annotations

import http.client
import http.server
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from sqlalchemy import event
from sqlalchemy.engine import Engine

from src import sync
from src.config.frozen import read_status
from src.config.schema import MlflowConfig
from src.records import Digest
from src.tracking import export_thread, mlflow_client, sqlite_store, tracker
from src.tracking.console import Console
from src.tracking.export_thread import ExportThread, WaitLimits
from src.tracking.exporters import DeliveryError
from src.tracking.late_metrics import add_to_summary
from src.tracking.lock import hold
from src.tracking.mlflow_client import explained
from src.tracking.mlflow_run import MlflowRunExporter
from src.tracking.mlflow_state import read_tracking
from src.tracking.run_folder import Start
from src.tracking.sqlite_store import SqliteStore
from src.tracking.tracker import start_exporters
from tests.conftest import FORKS, ROOT, admitted, read_lines
from tests.test_tracking import (
    closed_port,
    do_step,
    exporter_of,
    killed,
    start_server,
    stop_server,
    stopped,
    track,
    tracked,
)

SOON = WaitLimits(call_seconds=1.5, total_seconds=4.0)
PATIENT = WaitLimits(call_seconds=10.0, total_seconds=40.0)


def config_of(uri: str, experiment: str = "towline") -> MlflowConfig:
    return MlflowConfig("mlflow", uri, experiment, "run", {}, False)


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Wait shortly for servers that fail, and as long as a busy machine may take for stores that are well."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    monkeypatch.setattr(tracker, "END_OF_RUN", SOON if "proxy" in request.fixturenames else PATIENT)
    for module in (tracker, export_thread):
        monkeypatch.setattr(module, "UNTIL_DELIVERED", PATIENT)
    monkeypatch.setattr(export_thread, "RETRY_SECONDS", 0.2)
    monkeypatch.setattr(mlflow_client, "AGAIN_SECONDS", 0.05)
    monkeypatch.setattr(sqlite_store, "LOCKED_SECONDS", 0.3)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a store once; copies of it are at hand in no time."""
    file = tmp_path_factory.mktemp("template") / "mlflow.db"
    SqliteStore(f"sqlite:///{file}", print).open()
    return file


@pytest.fixture
def database(tmp_path: Path, template: Path) -> Path:
    shutil.copy(template, tmp_path / "mlflow.db")
    return tmp_path / "mlflow.db"


def runs_in(uri: str, experiment: str = "towline") -> list[Any]:
    client = MlflowClient(uri)
    found = client.get_experiment_by_name(experiment)
    return [] if found is None else list(client.search_runs([found.experiment_id]))


def check(uri: str, run_dir: Path, experiment: str = "towline", status: str = "FINISHED") -> None:
    """Check that a store has what metrics.jsonl says, once, in one run, and how it ended."""
    (run,) = runs_in(uri, experiment)
    client = MlflowClient(uri)
    lines = read_lines(run_dir / "metrics.jsonl")
    for name in {name for line in lines for name in line} - {"step"}:
        has = sorted((point.step, point.value) for point in client.get_metric_history(run.info.run_id, name))
        assert has == sorted((line["step"], line[name]) for line in lines if line.get(name) is not None), name
    assert run.info.status == status
    if status == "FINISHED":
        assert "summary.json" in {file.path for file in client.list_artifacts(run.info.run_id)}


def synced(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Give `python -m src.sync`; return its exit code and what it printed."""
    capsys.readouterr()
    code = sync.main(list(arguments))
    told = capsys.readouterr()
    return code, told.out + told.err


def deliver(config: MlflowConfig, run_dir: Path) -> str:
    """Give the run's command once more, on its finished folder."""
    told: list[str] = []
    with hold(run_dir):
        exporter = MlflowRunExporter(config, run_dir, is_over=True, warn=told.append)
        exports = start_exporters([exporter], run_dir, warn=told.append)
        return "".join([*map(str, exports.close(PATIENT)), *told])


def exported(config: MlflowConfig, run_dir: Path, *, is_over: bool = True) -> ExportThread:
    """Begin to deliver a folder."""
    return start_exporters([exporter_of(config, run_dir, is_over=is_over)], run_dir, warn=print)


def closed(exports: ExportThread, limits: WaitLimits) -> str:
    """Deliver the rest; return what is left in words."""
    return "".join(map(str, exports.close(limits)))


@event.listens_for(Engine, "connect")
def be_quick(connection: Any, _: Any) -> None:
    """No test here loses power."""
    if isinstance(connection, sqlite3.Connection):
        connection.execute("PRAGMA synchronous=OFF")


def die_in_migrations(file: str, statements: Sequence[int]) -> None:
    """Have processes begin a store, each killed before one of these statements of its migration."""
    for statement in statements:
        child = os.fork()
        if child == 0:
            die_in_migration(file, statement)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        assert not os.path.exists(file)


def die_in_migration(file: str, statement: int) -> None:
    left = iter(range(statement))

    @event.listens_for(Engine, "before_cursor_execute")
    def count(*_: Any) -> None:
        if next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)

    SqliteStore(f"sqlite:///{file}", print).open()


def test_a_kill_at_any_point_of_the_first_migration_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracker, "END_OF_RUN", PATIENT)  # a busy machine makes a store in more than SOON
    file = tmp_path / "mlflow.db"
    child = FORKS.Process(target=die_in_migrations, args=(str(file), range(1, 1600, 500)))  # of 1,683
    child.start()
    child.join(100)
    assert child.exitcode == 0
    track(config_of(f"sqlite:///{file}"), tmp_path / "run")
    check(f"sqlite:///{file}", tmp_path / "run")
    assert not list(tmp_path.glob(".mlflow.db.part*"))


def change(database: Path, *statements: str) -> None:
    with closing(sqlite3.connect(database)) as opened:
        for statement in statements:
            opened.execute(statement)
        opened.commit()


HALF_MADE = (
    "CREATE TABLE _alembic_tmp_runs (run_uuid TEXT)",
    "DELETE FROM alembic_version",
    "DROP TABLE alembic_version",
    "UPDATE alembic_version SET version_num = '451aebb31d03'",
)


@pytest.mark.parametrize("statement", HALF_MADE)
def test_a_store_that_was_never_made_whole_is_made_anew_where_it_holds_no_runs(
    tmp_path: Path, database: Path, template: Path, statement: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    change(database, statement)
    os.utime(database, (1, 1))
    monkeypatch.setattr(SqliteStore, "_make", lambda self: shutil.copy(template, self.file))
    (tmp_path / "mlflow.db-shm").write_bytes(b"")
    os.utime(tmp_path / "mlflow.db-shm", (1, 1))
    told: list[str] = []
    SqliteStore(f"sqlite:///{database}", told.append).open()
    assert "mlflow.db.half-made" in told[0]
    assert "made anew" in told[0]
    assert {file.name for file in tmp_path.glob("mlflow.db*")} >= {"mlflow.db", "mlflow.db.half-made"}
    SqliteStore(f"sqlite:///{database}", told.append).open()
    assert len(told) == 1


@pytest.mark.parametrize("statement", HALF_MADE)
def test_a_store_that_holds_runs_is_left_as_it_is_and_told_with_what_to_do(
    tmp_path: Path, database: Path, template: Path, capsys: pytest.CaptureFixture[str], statement: str
) -> None:
    change(database, "INSERT INTO runs (run_uuid) VALUES ('a')", statement)
    os.utime(database, (1, 1))
    before = database.read_bytes()
    track(config_of(f"sqlite:///{database}"), tmp_path / "run")
    told = capsys.readouterr().err
    assert str(database) in told
    assert "move it away" in told
    assert ("mlflow db upgrade" in told) == statement.startswith("UPDATE")
    assert database.read_bytes() == before
    database.rename(tmp_path / "away.db")
    shutil.copy(template, database)
    assert deliver(config_of(f"sqlite:///{database}"), tmp_path / "run") == ""
    check(f"sqlite:///{database}", tmp_path / "run")


def test_leftovers_of_another_database_do_not_spoil_a_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracker, "END_OF_RUN", PATIENT)
    for ending in ("-journal", "-wal", "-shm"):
        (tmp_path / f"mlflow.db{ending}").write_bytes(b"another's" * 100)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    track(config_of(uri), tmp_path / "run")
    check(uri, tmp_path / "run")
    assert (tmp_path / "mlflow.db.leftover-wal").exists()


@pytest.mark.parametrize("kind", ["dangling", "of an unmounted disk", "in a circle"])
def test_a_link_to_what_is_not_there_is_told_and_stays(
    tmp_path: Path, template: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    link, run = tmp_path / "mlflow.db", tmp_path / "run"
    target = {"dangling": tmp_path / "there.db", "in a circle": link}.get(kind, tmp_path / "disk" / "there.db")
    link.symlink_to(target)
    uri = f"sqlite:///{link}"
    track(config_of(uri), run)
    told = capsys.readouterr().err
    assert str(link) in told
    assert ("leads in a circle" if kind == "in a circle" else f"a link to {target}, which is not there") in told
    assert link.readlink() == target
    assert {file.name for file in tmp_path.iterdir()} == {"mlflow.db", "run"}
    as_stored(run, uri=uri)
    assert synced(capsys, f"run={run}")[0] == 2
    if kind == "in a circle":
        link.unlink()
    else:
        target.parent.mkdir(exist_ok=True)
        shutil.copy(template, target)
    assert deliver(config_of(uri), run) == ""
    check(uri, run)
    assert link.is_symlink() == (kind != "in a circle")


def test_an_empty_file_behind_a_link_becomes_the_store_and_the_link_stays(
    tmp_path: Path, template: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SqliteStore, "_make", lambda self: shutil.copy(template, self.file))
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "there.db").touch()
    (tmp_path / "mlflow.db").symlink_to(tmp_path / "disk" / "there.db")
    uri, run = f"sqlite:///{tmp_path}/mlflow.db", tmp_path / "run"
    track(config_of(uri), run)
    check(uri, run)
    assert (tmp_path / "mlflow.db").is_symlink()
    assert (tmp_path / "disk" / "there.db").stat().st_size > 0


@pytest.mark.parametrize("ending", ["-journal", "-wal", "-shm"])
@pytest.mark.parametrize("place", ["pipe", "folder", "dangling"])
def test_what_stands_in_the_place_of_a_companion_is_told(
    tmp_path: Path, database: Path, capsys: pytest.CaptureFixture[str], ending: str, place: str
) -> None:
    companion = Path(f"{database}{ending}")
    companion.touch()
    in_place(place)(companion)
    track(config_of(f"sqlite:///{database}"), tmp_path / "run")
    assert f"{companion} is no plain file" in capsys.readouterr().err


def test_the_file_of_a_uri_is_the_one_that_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for uri, file in (
        ("sqlite:///a%41 b.db?timeout=7", "aA b.db"),
        ("sqlite:///c.db", "c.db"),
        (f"sqlite:///file:{tmp_path}/d.db?uri=true", "d.db"),
    ):
        assert SqliteStore(uri, print).file == tmp_path / file
    assert not SqliteStore("sqlite:///:memory:", print).is_file


def test_tables_of_something_else_are_left_alone(tmp_path: Path) -> None:
    change(tmp_path / "mlflow.db", "CREATE TABLE studies (id INTEGER)")
    with pytest.raises(DeliveryError, match="something else"):
        SqliteStore(f"sqlite:///{tmp_path}/mlflow.db", print).open()


class Proxy(http.server.ThreadingHTTPServer):
    """Stands in front of a server and does what `mode` says to each call whose method and path `only` matches."""

    daemon_threads = True

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", 0), _Through)
        self.port, self.mode, self.num_calls, self.delay = port, "well", 0, 0.15
        self.only, self.asked = "", []  # type: tuple[str, list[str]]
        self.uri = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print what went wrong here; a client that did not wait, or a server that is gone, did not."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Through(http.server.BaseHTTPRequestHandler):
    server: Proxy

    def handle_one_call(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.num_calls += 1
        asked = f"{self.command} {self.path.partition('?')[0]}"
        self.server.asked.append(asked)
        mode = self.server.mode if re.search(self.server.only, asked) else "well"
        if mode.isdigit():
            return self.answer(int(mode), b"no", {"Location": f"{self.server.uri}/login"} if mode == "302" else {})
        if mode == "moved":
            there = f"http://127.0.0.1:{self.server.port}{self.path}"
            return self.answer(308, b"", {"Location": there})
        if mode == "html":
            return self.answer(200, b"<html><body>Log in</body></html>")
        if mode.startswith("says "):
            return self.answer(200, mode.removeprefix("says ").encode())
        if mode.startswith("flaky") and self.server.num_calls % 2:
            if mode == "flaky":
                return self.answer(503, b"busy")
            self.close_connection = True
            return None
        if mode == "hang":
            time.sleep(4)
            return None
        if mode == "half-closed":
            self.wfile.write(b'HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"run"')
            self.close_connection = True
            return None
        if mode == "drip":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
            for _ in range(20):
                self.wfile.write(b" ")
                time.sleep(0.2)
            self.close_connection = True
            return None
        if mode == "slow":
            time.sleep(self.server.delay)
        there = http.client.HTTPConnection("127.0.0.1", self.server.port)
        given = {name: value for name, value in self.headers.items() if name.lower() not in ("host", "connection")}
        there.request(self.command, self.path, body, given)
        answer = there.getresponse()
        content = answer.read()
        there.close()
        if mode == "lost":
            self.close_connection = True
            return None
        if mode.startswith("does it and says "):
            content = mode.removeprefix("does it and says ").encode()
        return self.answer(answer.status, content, {"Content-Type": answer.getheader("Content-Type", "text/plain")})

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = handle_one_call  # noqa: N815

    def answer(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, template: Path) -> Iterator[int]:
    folder, port = tmp_path_factory.mktemp("server"), int(closed_port().rpartition(":")[2])
    shutil.copy(template, folder / "mlflow.db")
    process = start_server(folder, port)
    yield port
    stop_server(process)


@pytest.fixture
def proxy(server: int) -> Iterator[Proxy]:
    made = Proxy(server)
    yield made
    made.shutdown()
    made.server_close()


WORDS = {
    "500": "fault|fails",
    "401": "MLFLOW_TRACKING_USERNAME",
    "403": "permission",
    "404": "tracking.uri",
    "429": "too often",
    "302": "redirects",
    "html": "tracking.uri",
    "hang": "no answer",
    "drip": "no answer",
    "half-closed": "not delivered",
    "lost": "not delivered",
    "gone": "refused",
}


@pytest.mark.parametrize("mode", WORDS)
def test_a_server_that_fails_costs_a_warning_and_has_everything_once_it_is_well(
    tmp_path: Path, proxy: Proxy, mode: str, capsys: pytest.CaptureFixture[str]
) -> None:
    experiment, run = f"mode {mode}", tmp_path / "run"
    uri = closed_port() if mode == "gone" else proxy.uri
    proxy.mode = mode
    started = time.monotonic()
    track(config_of(uri, experiment), run)
    assert time.monotonic() - started < 15  # and what a busy machine adds
    told = capsys.readouterr().err
    assert re.search(WORDS[mode], told), told
    assert f"make sync run={run}" in told
    assert told.count("warning: ") <= 2  # when it was met, and what is left
    assert "Traceback" not in told
    proxy.mode = "well"
    if mode == "gone":
        assert deliver(config_of(proxy.uri, experiment), run) == ""
    else:
        assert deliver(config_of(uri, experiment), run) == ""
    check(proxy.uri, run, experiment)


CALLS = ("log-inputs", "set-tag", "mlflow-artifacts", "runs/log-batch", "runs/update")


@pytest.mark.parametrize("only", CALLS)
def test_waiting_ends_where_one_call_fails_for_ever_behind_others_that_succeed(
    tmp_path: Path, proxy: Proxy, only: str
) -> None:
    experiment, run = f"always {only}", tmp_path / "run"
    track(admitted().config.tracking, run)
    proxy.mode, proxy.only = "500", only
    waiting = exported(config_of(proxy.uri, experiment), run)
    assert "fails (500)" in closed(waiting, WaitLimits(call_seconds=10.0, total_seconds=60.0))
    assert len({*proxy.asked}) < len(proxy.asked) < 100
    proxy.mode = "well"
    assert deliver(config_of(proxy.uri, experiment), run) == ""
    check(proxy.uri, run, experiment)


ASKED = ("runs/get", "runs/log-batch", "runs/update", "experiments/create", "experiments/get-by-name", "")
SAID = [("runs/create", ""), ("runs/create", '{"run": {"info": {"run_id": ""}}}'), ("runs/create", '{"run": 3}')]
SAID += [("runs/create", "[]"), ("runs/get", '{"run": {"info": {"run_id": "a", "artifact_uri": "b"}}}')]


@pytest.mark.parametrize(("only", "said"), [*SAID, *((only, "{}") for only in (*ASKED, "runs/create"))])
def test_an_answer_that_is_none_is_not_taken_for_one(tmp_path: Path, proxy: Proxy, only: str, said: str) -> None:
    experiment, run = f"{only} says {said}", tmp_path / "run"
    config = config_of(proxy.uri, experiment)
    track(admitted().config.tracking, run)
    proxy.mode, proxy.only = f"says {said}", only
    waiting = exported(config, run)
    assert "not delivered" in closed(waiting, WaitLimits(call_seconds=10.0, total_seconds=60.0, attempts=1))
    assert read_tracking(run)["run_id"] != ""
    proxy.mode = "well"
    assert deliver(config, run) == ""
    check(proxy.uri, run, experiment)


@pytest.mark.parametrize("mode", ["html", "says {}", "does it and says {}"])
def test_a_page_in_the_place_of_an_artifact_is_no_delivery(tmp_path: Path, proxy: Proxy, mode: str) -> None:
    experiment, run = f"artifacts {mode}", tmp_path / "run"
    config = config_of(proxy.uri, experiment)
    proxy.mode, proxy.only = mode, "PUT .*mlflow-artifacts"
    track(config, run)
    left = deliver(config, run)
    assert ("not delivered" in left) == (not mode.startswith("does it")), left
    (run / "summary.json").write_text((run / "summary.json").read_text().replace("3", "4"))  # of the same size
    left = deliver(config, run)
    assert ("not delivered" in left) == (not mode.startswith("does it")), left
    proxy.mode = "well"
    assert deliver(config, run) == ""
    check(proxy.uri, run, experiment)
    (found,) = runs_in(proxy.uri, experiment)
    there = MlflowClient(proxy.uri).download_artifacts(found.info.run_id, "summary.json", str(tmp_path))
    assert Path(there).read_bytes() == (run / "summary.json").read_bytes()


@pytest.mark.parametrize("mode", ["slow", "flaky", "flaky line", "moved"])
def test_a_server_that_takes_its_time_or_many_attempts_has_everything_in_the_end(
    tmp_path: Path, proxy: Proxy, mode: str
) -> None:
    experiment, run, config = f"mode {mode}", tmp_path / "run", config_of(proxy.uri, f"mode {mode}")
    proxy.mode = mode
    track(config, run)
    for _ in range(10):
        if not deliver(config, run):
            break
    proxy.mode = "well"
    check(proxy.uri, run, experiment)


def test_a_last_step_that_is_done_again_with_other_times_is_delivered(
    tmp_path: Path, proxy: Proxy, capsys: pytest.CaptureFixture[str]
) -> None:
    config, run = config_of(proxy.uri, "last step"), tmp_path / "run"
    stopped(config, run, steps=3)
    with tracked(config, run, Start(step=3)) as tracking:
        tracking.rewind_to(3, is_end=True)
        time.sleep(0.01)
        do_step(tracking, 3, 1 / 3)
        tracking.finish({"steps": 3})
    assert capsys.readouterr().err == ""
    assert deliver(config, run) == ""
    (found,) = runs_in(proxy.uri, "last step")
    history = MlflowClient(proxy.uri).get_metric_history(found.info.run_id, "train/loss")
    assert sorted((point.step, point.value) for point in history) == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    assert found.info.status == "FINISHED"


def test_what_a_slow_server_has_taken_is_not_brought_again(tmp_path: Path, proxy: Proxy) -> None:
    config, run = config_of(proxy.uri, "bit by bit"), tmp_path / "run"
    proxy.mode = "500"
    track(config, run, steps=150)
    proxy.mode, proxy.delay = "slow", 0.1
    seen = []
    for _ in range(40):  # each has time for a few calls
        with hold(run):
            left = closed(exported(config, run), WaitLimits(call_seconds=1.5, total_seconds=0.8))
        seen.append(read_tracking(run).get("lines", 0))
        if not left:
            break
    assert seen == sorted(seen)
    assert not left
    check(proxy.uri, run, "bit by bit")


def test_ctrl_c_ends_the_waiting(tmp_path: Path, proxy: Proxy) -> None:
    config, run = config_of(proxy.uri, "Ctrl-C"), tmp_path / "run"
    proxy.mode = "500"
    track(config, run)
    proxy.mode, proxy.delay = "slow", 30.0
    with hold(run):
        waiting = exported(config, run, is_over=False)
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        started = time.monotonic()
        assert "ended by Ctrl-C" in closed(waiting, WaitLimits(call_seconds=60))
    assert waiting.ended_by == "Ctrl-C"
    assert time.monotonic() - started < 10


def test_a_file_that_is_locked_costs_seconds(
    tmp_path: Path, database: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uri, run = f"sqlite:///{database}", tmp_path / "run"
    with closing(sqlite3.connect(database)) as other:
        other.execute("BEGIN EXCLUSIVE")
        started = time.monotonic()
        track(config_of(uri), run)
        assert time.monotonic() - started < 15
        assert "locked" in capsys.readouterr().err
        other.execute("ROLLBACK")
    assert deliver(config_of(uri), run) == ""
    check(uri, run)


def test_what_is_measured_after_the_end_is_delivered_and_what_replaces_it_too(
    tmp_path: Path, database: Path, template: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uri, run = f"sqlite:///{database}", tmp_path / "run"
    track(config_of(uri), run)
    step = read_status(run)["step"]
    for value in (0.75, 0.5):
        add_to_summary(run, {"benchmark/a/exact_match,strict": value})
        tracker.deliver_pending(config_of(uri), run, Console())
        tracker.deliver_pending(config_of(uri), run, Console())
        (found,) = runs_in(uri)
        assert found.data.metrics["benchmark/a/exact_match_strict"] == value
    points = MlflowClient(uri).get_metric_history(found.info.run_id, "benchmark/a/exact_match_strict")
    assert [(point.step, point.value) for point in points] == [(step, 0.75), (step, 0.5)]
    assert capsys.readouterr().err == ""
    shutil.copy(template, database)
    assert deliver(config_of(uri), run) == ""
    check(uri, run)
    assert runs_in(uri)[0].data.metrics["benchmark/a/exact_match_strict"] == 0.5


def make_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def make_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


@pytest.mark.parametrize(
    ("spoil", "word"),
    [
        (lambda file: file.write_bytes(b"no database, but a text that is long enough" * 100), "damaged"),
        (lambda file: file.write_bytes(file.read_bytes()[:5000]), "damaged"),
        (make_folder, "a folder"),
        (make_pipe, "no plain file"),
    ],
)
@pytest.mark.parametrize("is_restored", [True, False])
def test_a_file_that_is_no_store_is_told_and_what_is_restored_or_empty_has_everything(
    tmp_path: Path,
    database: Path,
    template: Path,
    capsys: pytest.CaptureFixture[str],
    spoil: Callable[[Path], Any],
    word: str,
    is_restored: bool,
) -> None:
    uri, run = f"sqlite:///{database}", tmp_path / "run"
    with tracked(config_of(uri), run) as tracking:
        tracking.log(1, {"train/loss": 1.0})
        while exporter_of(config_of(uri), run).num_pending:
            time.sleep(0.02)
        copy = shutil.copy(database if is_restored else template, tmp_path / "copy.db")
        spoil(database)
        tracking.log(2, {"train/loss": 0.5})
        tracking.finish({"steps": 2})
    told = capsys.readouterr().err
    assert str(database) in told
    assert word in told
    database.rename(tmp_path / "spoiled")
    shutil.move(copy, database)
    assert deliver(config_of(uri), run) == ""
    check(uri, run)


@pytest.mark.parametrize("is_restored", [True, False])
def test_a_database_that_was_deleted_is_made_anew_or_restored(
    tmp_path: Path, database: Path, template: Path, is_restored: bool
) -> None:
    uri, run = f"sqlite:///{database}", tmp_path / "run"
    with tracked(config_of(uri), run) as tracking:
        tracking.log(1, {"train/loss": 1.0})
        while exporter_of(config_of(uri), run).num_pending:
            time.sleep(0.02)
        copy = shutil.copy(database if is_restored else template, tmp_path / "copy.db")
        tracking.log(2, {"train/loss": 0.5})
        tracking.finish({"steps": 2})
    shutil.move(copy, database)  # of the run's beginning, or of before it
    assert deliver(config_of(uri), run) == ""
    check(uri, run)


def test_a_database_that_is_replaced_while_a_run_goes_on_has_everything(
    tmp_path: Path, database: Path, template: Path
) -> None:
    uri, run = f"sqlite:///{database}", tmp_path / "run"
    with tracked(config_of(uri), run) as tracking:
        tracking.log(1, {"train/loss": 1.0})
        while exporter_of(config_of(uri), run).num_pending:
            time.sleep(0.02)
        shutil.move(shutil.copy(template, tmp_path / "copy.db"), database)
        tracking.log(2, {"train/loss": 0.5})
        tracking.finish({"steps": 2})
    with closing(sqlite3.connect(database)) as opened:  # by itself: MLflow keeps files open
        points = opened.execute("SELECT step, value FROM metrics WHERE key = 'train/loss' ORDER BY step").fetchall()
        states = opened.execute("SELECT status FROM runs").fetchall()
    assert points == [(1, 1.0), (2, 0.5)]
    assert states == [("FINISHED",)]


def test_a_deleted_experiment_is_told_and_has_everything_once_it_is_restored(
    tmp_path: Path, database: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uri, run = f"sqlite:///{database}", tmp_path / "run"
    client = MlflowClient(uri)
    with tracked(config_of(uri), run) as tracking:
        tracking.log(1, {"train/loss": 1.0})
        while exporter_of(config_of(uri), run).num_pending:
            time.sleep(0.02)
        experiment = client.get_experiment_by_name("towline").experiment_id
        client.delete_experiment(experiment)
        tracking.log(2, {"train/loss": 0.5})
        tracking.finish({"steps": 2})
    told = capsys.readouterr().err
    assert "experiment towline is deleted" in told
    assert "tracking.experiment_name" in told
    assert deliver(config_of(uri, "another"), run) == ""
    check(uri, run, "another")
    client.restore_experiment(experiment)
    (old,) = runs_in(uri)
    assert old.info.status == "RUNNING"  # it was deleted; what was in it when it was is back


def test_a_run_that_was_deleted_is_begun_anew(tmp_path: Path, database: Path) -> None:
    uri, run = f"sqlite:///{database}", tmp_path / "run"
    track(config_of(uri), run)
    MlflowClient(uri).delete_run(runs_in(uri)[0].info.run_id)
    assert deliver(config_of(uri), run) == ""
    check(uri, run)


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "no JSON": lambda file: file.write_text("{"),
    "another's": lambda file: file.write_text('{"a": 1}'),
    "of other types": lambda file: file.write_text(json.dumps(json.loads(file.read_text()) | {"lines": "3"})),
    "too many lines": lambda file: file.write_text(json.dumps(json.loads(file.read_text()) | {"lines": 5})),
    "too few lines": lambda file: file.write_text(json.dumps(json.loads(file.read_text()) | {"lines": 1})),
    "no run of that id": lambda file: file.write_text(json.dumps(json.loads(file.read_text()) | {"run_id": "0" * 32})),
    "no id": lambda file: file.write_text(json.dumps(json.loads(file.read_text()) | {"run_id": "../x"})),
    "bytes": lambda file: file.write_bytes(os.urandom(100)),
    "gone": lambda file: file.unlink(),
    "a folder": make_folder,
    "a pipe": make_pipe,
    "points": lambda file: file.write_text(json.dumps(json.loads(file.read_text()) | {"points": {"x": 1}})),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_to_tracking_json_doubles_and_costs_nothing(tmp_path: Path, database: Path, damage: str) -> None:
    uri, run = f"sqlite:///{database}", tmp_path / "run"
    track(config_of(uri), run)
    DAMAGE[damage](run / "tracking.json")
    told = deliver(config_of(uri), run)
    assert told.count("damaged") <= 3
    check(uri, run)
    assert read_tracking(run)["lines"] == 3
    DAMAGE[damage](run / "tracking.json")
    status = json.loads((run / "status.json").read_text()) | {"tracker_run_id": None}
    (run / "status.json").write_text(json.dumps(status))
    deliver(config_of(uri), run)
    check(uri, run)


def test_damage_to_tracking_json_of_a_run_that_goes_on_doubles_nothing(tmp_path: Path, database: Path) -> None:
    uri, run = f"sqlite:///{database}", tmp_path / "run"
    stopped(config_of(uri), run, steps=5)
    (run / "tracking.json").write_text("{")
    with tracked(config_of(uri), run, Start(step=3)) as tracking:
        tracking.rewind_to(3, is_end=False)
        for step, loss in ((4, 1 / 4), (5, 0.9), (6, 1 / 6)):
            tracking.log(step, {"train/loss": loss})
        tracking.finish({"steps": 6})
    (found,) = runs_in(uri)
    points = MlflowClient(uri).get_metric_history(found.info.run_id, "train/loss")
    expected = [(1, 1.0), (2, 1 / 2), (3, 1 / 3), (4, 1 / 4), (5, 1 / 5), (5, 0.9), (6, 1 / 6)]
    assert sorted((point.step, point.value) for point in points) == expected


def test_a_run_that_was_killed_does_not_stay_running(
    tmp_path: Path, database: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uri, run = f"sqlite:///{database}", tmp_path / "run"
    killed(config_of(uri), run, steps=2)
    assert [one.info.status for one in runs_in(uri)] == ["RUNNING"]
    assert deliver(config_of(uri), run) == ""
    assert [one.info.status for one in runs_in(uri)] == ["KILLED"]
    killed(config_of(uri), tmp_path / "forced", steps=2)
    with tracked(config_of(uri), tmp_path / "forced", Start(force=True)) as tracking:
        tracking.log(1, {"train/loss": 1.0})
        tracking.finish({})
    assert sorted(one.info.status for one in runs_in(uri)) == ["FINISHED", "KILLED", "KILLED"]


def statuses(uri: str) -> list[str]:
    return sorted(one.info.status for one in runs_in(uri))


def go_on(config: Any, run: Path, start: Start = Start(step=2)) -> None:  # noqa: B008
    """Have the run go on behind step 2, or begin anew, with such a tracker, and finish."""
    with tracked(config, run, start) as tracking:
        tracking.rewind_to(0 if start.force else 2, is_end=False)
        for step in range(1 if start.force else 3, 5):
            tracking.log(step, {"train/loss": 1 / step})
        tracking.finish({"steps": 4})


@pytest.fixture
def stores(tmp_path: Path, template: Path) -> list[str]:
    """Two stores."""
    return [f"sqlite:///{shutil.copy(template, tmp_path / f'{name}.db')}" for name in "ab"]


@pytest.mark.parametrize("start", [Start(step=2), Start(force=True)], ids=["goes on", "force"])
@pytest.mark.parametrize("has_other", [True, False], ids=["another store", "none"])
def test_a_run_that_goes_on_elsewhere_does_not_stay_running_where_it_was(
    tmp_path: Path, stores: list[str], start: Start, has_other: bool
) -> None:
    first, second = stores
    run = tmp_path / "run"
    killed(config_of(first), run, steps=2)
    assert statuses(first) == ["RUNNING"]
    time.sleep(1.1 if start.force else 0)  # runs of a folder are told apart by the second in which they began
    go_on(config_of(second) if has_other else admitted().config.tracking, run, start)
    assert statuses(first) == ["KILLED"]
    if has_other:
        check(second, run)
        assert read_tracking(run)["elsewhere"] == []
    assert deliver(config_of(first), run) == ""  # back again: the same run, unless it is another
    assert statuses(first) == (["FINISHED", "KILLED"] if start.force else ["FINISHED"])
    if not start.force:
        check(first, run)
    if has_other:
        check(second, run)


def test_a_killed_run_that_is_brought_elsewhere_does_not_stay_running_where_it_was(
    tmp_path: Path, stores: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = stores
    run = tmp_path / "run"
    killed(config_of(first), run, steps=2)
    as_stored(run, uri=first)
    assert synced(capsys, f"run={run}", f"tracking.uri={second}")[0] == 0
    assert (statuses(first), statuses(second)) == (["KILLED"], ["KILLED"])
    Path(first.removeprefix("sqlite:///")).unlink()
    assert synced(capsys, f"run={run}")[0] == 0
    assert statuses(first) == ["KILLED"]


def test_a_former_store_that_is_gone_costs_a_warning_and_is_asked_again(
    tmp_path: Path, proxy: Proxy, database: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, uri, experiment = tmp_path / "run", f"sqlite:///{database}", "former"
    killed(config_of(proxy.uri, experiment), run, steps=2)
    proxy.mode = "500"
    capsys.readouterr()
    go_on(config_of(uri), run)
    assert "can't be ended" in capsys.readouterr().err
    check(uri, run)
    proxy.mode = "well"
    assert [one.info.status for one in runs_in(proxy.uri, experiment)] == ["RUNNING"]
    assert deliver(config_of(uri), run) == ""
    assert [one.info.status for one in runs_in(proxy.uri, experiment)] == ["KILLED"]


def test_a_copy_of_a_folder_does_not_end_the_run_of_the_original(tmp_path: Path, stores: list[str]) -> None:
    run, copy = tmp_path / "run", tmp_path / "copy"
    killed(config_of(stores[0]), run, steps=2)
    shutil.copytree(run, copy)
    go_on(admitted().config.tracking, copy)
    assert statuses(stores[0]) == ["RUNNING"]
    run.rename(tmp_path / "moved")
    go_on(admitted().config.tracking, tmp_path / "moved")
    assert statuses(stores[0]) == ["KILLED"]


def test_a_damaged_journal_is_told_and_its_repair_delivered(
    tmp_path: Path, database: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uri, run = f"sqlite:///{database}", tmp_path / "run"
    track(config_of(closed_port()), run)
    whole = (run / "metrics.jsonl").read_bytes()
    (run / "metrics.jsonl").write_bytes(whole.replace(b'"step": 2', b'"step": "2'))
    assert "metrics.jsonl is damaged" in deliver(config_of(uri), run)
    (run / "metrics.jsonl").write_bytes(whole)
    assert deliver(config_of(uri), run) == ""
    check(uri, run)


def as_stored(run: Path, **tracking: Any) -> None:
    """Write the config.yaml that a run with such a tracker has."""
    stored = {"type": "mlflow", "uri": "", "experiment_name": "towline", "run_name": "run", "tags": {}}
    sections = {"name": "run", "seed": 1, "long": "x" * 600, "tracking": stored | {"log_model": False} | tracking}
    (run / "config.yaml").write_text(json.dumps(sections))


def test_sync_delivers_what_is_left_of_several_folders(
    tmp_path: Path, database: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = f"sqlite:///{database}"
    for name in ("a b", "c"):
        track(config_of(closed_port(), name), tmp_path / name)
        as_stored(tmp_path / name, uri=uri, experiment_name=name)
    given = [f"run=['{tmp_path}/a b','{tmp_path}/c']"]
    for _ in range(2):
        code, told = synced(capsys, *given)
        assert code == 0, told
        assert told.count("3 of 3 lines of metrics") == 2
    for name in ("a b", "c"):
        check(uri, tmp_path / name, name)


def test_sync_says_what_is_left_and_what_it_can_not_work_with(
    tmp_path: Path, database: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    track(config_of(closed_port()), run)
    as_stored(run, uri=closed_port())
    code, told = synced(capsys, f"run={run}")
    assert (code, "3 lines of metrics are not delivered" in told, "refused" in told) == (1, True, True)
    assert synced(capsys, f"run={run}", f"tracking.uri=sqlite:///{database}")[0] == 0
    check(f"sqlite:///{database}", run)
    with hold(run):
        assert synced(capsys, f"run={run}")[0] == 2
    for arguments, word in (
        ([], "needs a value"),
        ([f"run={tmp_path}"], "no folder of a run"),
        ([f"run={run}", "seed=1"], "not read here"),
        ([f"run={run}", "tracking.uri=nowhere"], "not an address"),
    ):
        code, told = synced(capsys, *arguments)
        assert code == 2, told
        assert word in told
    as_stored(run, uri="${oc.env:TOWLINE_TEST_URI}")
    code, told = synced(capsys, f"run={run}")
    assert (code, "TOWLINE_TEST_URI is not set" in told) == (2, True)
    monkeypatch.setenv("TOWLINE_TEST_URI", f"sqlite:///{database}")
    assert synced(capsys, f"run={run}")[0] == 0
    as_stored(run, type="none", uri="")
    code, told = synced(capsys, f"run={run}")
    assert (code, "has no tracker" in told) == (2, True)


def test_credentials_of_a_server_are_written_and_printed_nowhere(
    tmp_path: Path, proxy: Proxy, capsys: pytest.CaptureFixture[str]
) -> None:
    proxy.mode = "500"
    uri = proxy.uri.replace("//", "//someone:a+k%40ettle@")
    track(config_of(uri, "secret"), tmp_path / "run")
    told = capsys.readouterr()
    written = "".join(file.read_text() for file in (tmp_path / "run").glob("*") if file.is_file())
    for text in (told.out, told.err, written):
        assert "ettle" not in text
    proxy.mode = "well"
    assert deliver(config_of(uri, "secret"), tmp_path / "run") == ""
    check(proxy.uri, tmp_path / "run", "secret")


def test_errors_are_told_in_words() -> None:
    assert not explained(ValueError("API request failed with exception: timed out")).is_lasting
    assert "a page" in str(explained(ValueError("not in a valid JSON format. Response body: '<html>secret</html>'")))
    assert len(str(explained(ValueError("x" * 5000)))) <= 400


def in_place(place: str) -> Callable[[Path], Any]:
    def spoil(file: Path) -> None:
        file.unlink()
        if place == "pipe":
            os.mkfifo(file)
        elif place == "folder":
            file.mkdir()
        else:
            file.symlink_to(file.with_name("nowhere"))

    return spoil


def changed(**values: Any) -> Callable[[Path], Any]:
    return lambda file: file.write_text(json.dumps(json.loads(file.read_text()) | values))


KINDS = {place: in_place(place) for place in ("pipe", "folder", "dangling")} | {
    "deep": lambda file: file.write_text("[" * 100_000),
    "no text": lambda file: file.write_bytes(b"\xff\xfe\n"),
}
ANYWHERE = ("status.json", "metrics.jsonl", "samples.jsonl", "provenance.json", "data_report.json", "config.yaml")
SPOILT = [  # all kinds of two files, and a third of them, in turn, of the others
    (name, kind, KINDS[kind])
    for i, name in enumerate(ANYWHERE)
    for j, kind in enumerate(KINDS)
    if i < 2 or (i + j) % 3 == 0
]
SPOILT += [(name, kind, KINDS[kind]) for name in ("summary.json", "lock") for kind in ("pipe", "folder", "dangling")]
SPOILT += [
    (name, kind, spoil)
    for name in ("metrics.jsonl", "samples.jsonl")
    for kind, spoil in {
        "gone": Path.unlink,
        "empty": lambda file: file.write_bytes(b""),
        "without its last line": lambda file: file.write_bytes(b"".join(file.read_bytes().splitlines(True)[:-1])),
        "of another run": lambda file: file.write_bytes(file.read_bytes().replace(b'"step": 2', b'"step": 3', 1)),
    }.items()
]
SPOILT += [
    ("status.json", f"{key} {value}", changed(**{key: value}))
    for key, values in {
        "started": ("x", 5, [], "0001-01-01T00:00:00"),
        "ended": ("2026-99-99", 5),
        "updated": ("x",),
    }.items()
    for value in values
]
SPOILT += [
    ("metrics.jsonl", text, lambda file, text=text: file.write_text(text + "\n"))
    for text in ('{"step": 1, "a": 1e999}', f'{{"step": 1, "a": 1{"0" * 400}}}', f'{{"step": 1{"0" * 30}, "a": 1}}',
                 '{"step": 1, "a": 1, "perf/elapsed_seconds": 1e300}', '{"step": 1, "a": "b"}', "[]")
]  # fmt: skip
NOT_HELD_UP = {"status.json", "samples.jsonl", "provenance.json", "data_report.json", "summary.json"}


@pytest.mark.parametrize(("name", "kind", "spoil"), SPOILT, ids=[f"{name} {kind[:30]}" for name, kind, _ in SPOILT])
def test_sync_tells_a_file_that_it_can_not_use_and_brings_the_rest(
    tmp_path: Path, database: Path, capsys: pytest.CaptureFixture[str], name: str, kind: str,
    spoil: Callable[[Path], Any],
) -> None:  # fmt: skip
    run, uri = tmp_path / "run", f"sqlite:///{database}"
    track(admitted().config.tracking, run)
    as_stored(run, uri=uri)
    written = {one: Digest((run / one).read_bytes()).as_dict() for one in ("metrics.jsonl", "samples.jsonl")}
    changed(journal=written)(run / "status.json")
    spoil(run / name)
    if (name, kind) == ("lock", "dangling"):
        return  # it becomes a file where it leads to
    signal.alarm(60)
    code, told = synced(capsys, f"run={run}")
    signal.alarm(0)
    assert code == 2, told
    assert str(run / name) in told
    assert "Traceback" not in told
    if name in NOT_HELD_UP:
        (found,) = runs_in(uri)
        history = MlflowClient(uri).get_metric_history(found.info.run_id, "train/loss")
        assert sorted((point.step, point.value) for point in history) == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
        assert found.info.status == ("RUNNING" if name == "status.json" else "FINISHED")
        assert ("summary.json" in {file.path for file in MlflowClient(uri).list_artifacts(found.info.run_id)}) == (
            name != "summary.json"
        )


def test_what_is_told_to_do_with_a_damaged_status_has_the_rest_delivered(
    tmp_path: Path, database: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, uri = tmp_path / "run", f"sqlite:///{database}"
    track(admitted().config.tracking, run)
    as_stored(run, uri=uri)
    whole = (run / "status.json").read_text()
    changed(started="x")(run / "status.json")
    code, told = synced(capsys, f"run={run}")
    assert (code, "Move it away" in told, "is damaged: started can't be" in told) == (2, True, True)
    (run / "status.json").rename(run / "away")
    assert synced(capsys, f"run={run}")[0] == 0
    check(uri, run, status="KILLED")  # nothing says how it ended
    (run / "status.json").write_text(whole)  # as the run's own command writes it
    assert synced(capsys, f"run={run}")[0] == 0
    check(uri, run)


def test_a_folder_whose_lock_can_not_be_written_is_told(tmp_path: Path, database: Path) -> None:
    run = tmp_path / "run"
    track(admitted().config.tracking, run)
    as_stored(run, uri=f"sqlite:///{database}")
    limited = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0)); from src.sync import main; "
    done = subprocess.run(
        [sys.executable, "-c", f"{limited} sys.exit(main())", f"run={run}"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert f"{run / 'lock'} can't be written: File too large" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["provenance.json", "data_report.json"])
@pytest.mark.parametrize("text", ["", "[]", '{"git": 3, "train": 3}'])
def test_a_damaged_description_holds_up_no_metrics(
    tmp_path: Path, database: Path, capsys: pytest.CaptureFixture[str], name: str, text: str
) -> None:
    uri, run = f"sqlite:///{database}", tmp_path / "run"
    with tracked(config_of(uri), run) as tracking:
        (run / name).write_text(text)
        tracking.log(1, {"train/loss": 1.0})
        tracking.finish({"steps": 1})
    assert f"{name} is damaged" in capsys.readouterr().err
    check(uri, run)
