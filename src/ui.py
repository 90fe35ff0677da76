"""Show all runs in MLflow's own page, on this machine: `make ui`, or `python -m src.ui KEY=VALUE …`.

It prints the link that shows the runs, with columns that say something about them, and opens it where there is a
desktop. Ctrl-C ends it. Keys:
  port=5000                   where the page is served; only this machine can reach it
  tracking.uri=…              the store; an address (http://…) is a server, whose link is printed
  tracking.experiment_name=…  whose runs are shown first

MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME count where the keys are not set, as for a run.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import webbrowser
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from src import secrets
from src.cli.entry import answer, as_command
from src.config.command_line import CommandLine, flags_that_are_not_taken, read_command_line
from src.config.options import PROJECT_ROOT
from src.config.problems import Problem, refuse
from src.config.quoting import in_url
from src.config.rules.within import tracker_can_be_reached_by_some_scheme
from src.config.schema import MlflowConfig
from src.errors import TrackerError
from src.util import in_words

HOST = "127.0.0.1"
KEYS = ("port", "tracking.uri", "tracking.experiment_name")
START_SECONDS = 120.0  # for a server on a slow machine that has a new store to make
SERVER_SWITCHES = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PYTHONWARNINGS": "ignore",  # of what MLflow is built on
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # several processes for what runs don't use
}


@dataclass(frozen=True)
class Page:
    """What is shown, and where."""

    uri: str
    experiment_name: str
    port: int

    @property
    def is_served(self) -> bool:
        """Whether a server has the store already."""
        return self.uri.startswith(("http://", "https://"))


def admit_ui(argv: Sequence[str]) -> Page:
    """Check a command line; ConfigError with all problems together."""
    line = read_command_line(argv)
    problems = [*line.problems, *flags_that_are_not_taken(line, "ui")]
    unread = [override.key_or_group for override in line.overrides if override.key_or_group not in KEYS]
    problems += [Problem(key, f"not read here; there are {in_words(KEYS)}", has_value=False) for key in unread]
    page = Page(
        uri=_text(line, "tracking.uri", "MLFLOW_TRACKING_URI", f"sqlite:///{in_url(PROJECT_ROOT)}/mlflow.db"),
        experiment_name=_text(line, "tracking.experiment_name", "MLFLOW_EXPERIMENT_NAME", "towline"),
        port=5000 if (port := line.value_of("port")) is None else port,
    )
    problems += _unfit(page)
    if problems:
        raise refuse(problems)
    return page


def _text(line: CommandLine, key: str, variable: str, default: str) -> str:
    return str(line.value_of(key) or os.environ.get(variable) or default)


def _unfit(page: Page) -> Iterator[Problem]:
    if not isinstance(page.port, int) or isinstance(page.port, bool) or not 0 < page.port < 65536:
        yield Problem.on_command_line("port", "a whole number from 1 to 65535", page.port)
    config = MlflowConfig(
        type="mlflow", uri=page.uri, experiment_name=page.experiment_name, run_name="", tags={}, log_model=False
    )
    yield from tracker_can_be_reached_by_some_scheme(config)


def _is_taken(port: int) -> bool:
    with socket.socket() as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind((HOST, port))
        except OSError:
            return True
    return False


def show(page: Page) -> int:
    """Serve the store, print and open the link, and wait until the server ends or is ended; return the exit code."""
    if page.is_served:
        _announce(page, page.uri)
        return 0
    if _is_taken(page.port):
        raise refuse([Problem("port", "another program uses it; choose another: make ui PORT=5001", page.port)])
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the server ends with it
    with _server(page) as (server, address):
        _announce(page, address)
        try:
            return server.wait()
        except KeyboardInterrupt:  # the usual end
            return 0


@contextmanager
def _server(page: Page) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """Start MLflow's server on the store, wait until it answers, and end it when the block is left."""
    options = {
        "--backend-store-uri": page.uri,
        "--host": HOST,
        "--port": str(page.port),
        "--workers": "1",
        "--uvicorn-opts": "--log-level warning",  # not a line for each request
    }
    command = [sys.executable, "-m", "mlflow", "server", *(word for option in options.items() for word in option)]
    environment = os.environ | SERVER_SWITCHES
    server = subprocess.Popen(command, cwd=PROJECT_ROOT, env=environment, start_new_session=True)
    address = f"http://{HOST}:{page.port}"
    try:
        _wait_for(server, address)
        yield server, address
    finally:
        with suppress(ProcessLookupError):  # it has ended by itself
            os.killpg(server.pid, signal.SIGTERM)  # with the processes that it started
        server.wait()


def _wait_for(server: subprocess.Popen[bytes], address: str) -> None:
    until = time.monotonic() + START_SECONDS
    while True:
        if (code := server.poll()) is not None:
            raise TrackerError(f"MLflow's server ended with exit code {code}; what it printed above says why.")
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=5):
                return
        except OSError as error:
            if time.monotonic() > until:
                waited = f"in {START_SECONDS:g} seconds ({error})"
                raise TrackerError(f"MLflow's server at {address} does not answer {waited}.") from error
        time.sleep(0.2)


def _announce(page: Page, address: str) -> None:
    from src.tracking.console import Console
    from src.tracking.mlflow_client import explained, reach
    from src.tracking.mlflow_view import runs_path

    console = Console()
    try:
        reach(address)
        path, is_there = runs_path(address, page.experiment_name, console.warn)
    except Exception as error:  # whatever MLflow raises
        raise TrackerError(f"{secrets.without_credentials(page.uri)}: {explained(error)}") from error
    if not is_there:
        console.warn(f"there is no experiment {page.experiment_name} yet: `make train` makes a first run")
    link = secrets.without_credentials(address).rstrip("/") + path
    console.label("runs", link, is_painted=True)  # or its key would be hidden as a secret
    if not page.is_served:
        console.label("end", "Ctrl-C")
    if has_desktop(os.environ):
        webbrowser.open(link)


def has_desktop(environment: Mapping[str, str]) -> bool:
    """Return whether a browser can open a window: not in a terminal of another machine, nor in CI."""
    if environment.get("CI") or environment.get("SSH_CONNECTION"):
        return False
    return sys.platform == "darwin" or bool(environment.get("DISPLAY") or environment.get("WAYLAND_DISPLAY"))


def main(argv: Sequence[str] | None = None) -> int:
    """Check the command line, then serve the page until it is ended; return the exit code."""

    return answer("ui", __doc__, argv, lambda arguments: show(admit_ui(arguments)))


if __name__ == "__main__":
    as_command(main)
