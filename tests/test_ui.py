"""The link that shows runs in MLflow's page, and the server behind it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from src import ui
from src.config.frozen import read_status
from src.evaluation.samples import Sample
from src.tracking.mlflow_view import VIEW_TAG, WIDTHS, runs_path
from tests.browser import CHROMIUM, Browser
from tests.conftest import ROOT
from tests.test_tracking import FROZEN, Done, closed_port, mlflow_config, track, tracked

VIEW = "viewStateShareKey=towline"
TRAINING = "workflowType=machine_learning"
HOSTILE = "<script>window.hacked=1</script><img src=x onerror='window.hacked=1'>\"\x00\u202e🤖" + "x" * 300


@pytest.fixture(scope="module")
def made_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the experiment `towline` and a run in it."""
    place = tmp_path_factory.mktemp("store")
    track(mlflow_config(f"sqlite:///{place}/mlflow.db"), place / "run")
    return place / "mlflow.db"


@pytest.fixture
def uri(made_store: Path, tmp_path: Path) -> str:
    shutil.copy(made_store, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path}/mlflow.db"


def test_an_experiment_begins_with_columns_that_users_may_change(uri: str) -> None:
    client = MlflowClient(uri)
    found = client.get_experiment_by_name("towline")
    view = json.loads(found.tags[VIEW_TAG])
    state = json.loads(view["state"])
    assert (view["name"], state["columnOrder"]) == ("Towline", list(WIDTHS))
    assert set(state["selectedColumns"]) < set(WIDTHS)
    client.set_experiment_tag(found.experiment_id, VIEW_TAG, "theirs")
    assert runs_path(uri, "towline", print) == (f"/#/experiments/{found.experiment_id}/runs?{TRAINING}&{VIEW}", True)
    assert client.get_experiment_by_name("towline").tags[VIEW_TAG] == "theirs"


def test_an_experiment_without_the_view_gets_it_and_another_one_is_shown_where_there_is_none(uri: str) -> None:
    client = MlflowClient(uri)
    theirs = client.create_experiment("theirs")
    assert runs_path(uri, "theirs", print) == (f"/#/experiments/{theirs}/runs?{TRAINING}&{VIEW}", True)
    assert VIEW_TAG in client.get_experiment(theirs).tags
    path, is_there = runs_path(uri, "none", print)
    assert re.fullmatch(rf"/#/experiments/\d+/runs\?{TRAINING}&{VIEW}", path)
    assert not is_there


def test_a_refused_view_costs_a_warning(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise PermissionError("not yours")

    theirs = MlflowClient(uri).create_experiment("theirs")
    monkeypatch.setattr(MlflowClient, "set_experiment_tag", refused)
    told: list[str] = []
    assert runs_path(uri, "theirs", told.append) == (f"/#/experiments/{theirs}/runs?{TRAINING}", True)
    assert "not yours" in told[0]


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["port=x"], "1 to 65535"),
        (["port=70000"], "1 to 65535"),
        (["portt=1"], "not read here"),
        (["tracking.uri=/tmp"], "begins with one of"),
        (["--multirun"], "ui"),
        (["port={taken}"], "PORT=5001"),
        (["tracking.uri=http://127.0.0.1:{closed}"], "can't be reached"),
    ],
)
def test_what_can_not_be_shown_is_refused(
    arguments: list[str], told: str, taken_port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    closed = closed_port().rpartition(":")[2]
    assert ui.main([argument.format(taken=taken_port, closed=closed) for argument in arguments]) == 2
    assert told in " ".join(capsys.readouterr().err.split())


def test_a_browser_is_opened_on_a_desktop_only() -> None:
    assert ui.has_desktop({"DISPLAY": ":0"})
    assert not ui.has_desktop({"DISPLAY": ":0", "SSH_CONNECTION": "a"})
    assert not ui.has_desktop({"DISPLAY": ":0", "CI": "true"})


def track_hostile(config: Any, run: Path) -> None:
    """Have a run with hostile texts in its name, its tags, its configuration, its metrics and its samples."""
    with tracked(config, run, frozen=FROZEN | {"name": HOSTILE, "data": {"columns": {"prompt": HOSTILE}}}) as tracking:
        with tracking.line(Done(1, 1.0), due=True) as line:
            line.metrics |= {f"tokens/{HOSTILE}/norm": 1.0, "eval/validation/loss": 1.0}
            line.samples = [Sample(1, HOSTILE, HOSTILE, HOSTILE, HOSTILE, "eos", 1, 1, HOSTILE)]
        tracking.finish({"steps": 1})


def check_shown_as_texts(pages: Mapping[str, str], folder: Path) -> None:
    """Open pages of MLflow by their addresses, each until it shows a text; check that nothing hostile is obeyed."""
    with Browser(folder / "profile") as browser:
        for address, text in pages.items():
            browser.open(address, 1440, is_dark=False)
            until = time.monotonic() + 120
            while not browser.value(f"document.body.innerText.includes('{text}')"):
                assert time.monotonic() < until, browser.value("document.body.innerText")
                time.sleep(0.2)
            assert browser.value("window.hacked === undefined && document.documentElement.scrollWidth <= innerWidth")


def test_the_link_leads_to_a_server_that_ends_with_the_command(uri: str, tmp_path: Path) -> None:
    track_hostile(replace(mlflow_config(uri), run_name=HOSTILE, tags={HOSTILE[:99]: HOSTILE}), tmp_path / "run")
    port = closed_port().rpartition(":")[2]
    command = [sys.executable, "-m", "src.ui", f"port={port}", f"tracking.uri={uri}"]
    shown = tmp_path / "shown"
    with shown.open("wb") as out:
        process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=out, env=os.environ | {"CI": "true"})
    try:
        while "Ctrl-C" not in shown.read_text():
            assert process.poll() is None, shown.read_text()
            time.sleep(0.1)
        link = re.search(r"runs +(http\S+)", shown.read_text())
        assert link
        assert link[1] == f"http://127.0.0.1:{port}/#/experiments/1/runs?{TRAINING}&{VIEW}"
        with urllib.request.urlopen(link[1]) as page:
            assert "MLflow" in page.read().decode()
        if CHROMIUM is not None:
            run = f"{link[1].partition('?')[0]}/{read_status(tmp_path / 'run')['tracker_run_id']}"
            shown = {link[1]: "<script>window.hacked=1", f"{run}/artifacts/samples.json": "stop_reason"}
            check_shown_as_texts(shown, tmp_path)
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", int(port)), timeout=5)
