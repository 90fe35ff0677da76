"""The door to MLflow: its client, quiet and watched, what a server answers, and what its errors mean.

A server, or a proxy before one, may answer anything: nothing, a page, an object of another shape. MLflow makes entities
of it with empty fields, so each answer that is relied on is checked here. Errors are put in words, with the remedy and
whether trying again can help, and without secrets.
"""

import json
import logging
import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from src import secrets
from src.errors import TowlineError, one_line
from src.tracking.export_thread import OPENING_SECONDS
from src.tracking.exporters import MOST_CHARACTERS, Activity, Cancelled, DeliveryError
from src.tracking.mlflow_state import RUN_ID

_STATUS = re.compile(r"error code (\d{3})\b|too many (\d{3}) error")
_GONE = re.compile(r"must be in (the )?'?active'? state|already deleted|is deleted", re.IGNORECASE)
_TAKEN = re.compile(r"UNIQUE constraint failed|duplicate key value|Duplicate entry")
"""What SQLite, PostgreSQL and MySQL say of a row that two add at once, such as a data set that runs share."""
_LASTING_CODES = (
    *("INVALID_PARAMETER_VALUE", "BAD_REQUEST"),
    *("PERMISSION_DENIED", "UNAUTHENTICATED", "ENDPOINT_NOT_FOUND"),
)
_CREDENTIALS = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
_WORDS = {
    401: f"the server wants credentials, or other ones (401): {_CREDENTIALS}",
    403: "the server does not allow it (403): get the permission to write to this experiment, or choose another with "
    "tracking.experiment_name=…",
    404: "there is no MLflow at this address (404): is tracking.uri right?",
    405: "there is no MLflow at this address (405): is tracking.uri right?",
    407: "the proxy in between wants credentials (407)",
    413: "the server, or a proxy in between, takes nothing as large as this (413)",
    429: "the server is asked too often (429)",
}
_PASSING = {
    **dict.fromkeys(("timed out", "timeout exception"), "no answer in time"),
    **{sign: f"can't be reached: {sign}" for sign in ("Connection refused", "Name or service not known")},
    **{sign: f"can't be reached: {sign}" for sign in ("No route to host", "Network is unreachable")},
    "database is locked": "the database is locked by another process",
}
_LASTING_STATUS = frozenset(range(300, 500)) - {408, 409, 425, 429}


def explained(error: Exception) -> DeliveryError:
    """Return an error of MLflow, or of what it is built on, in words and without secrets."""
    text = secrets.clean(one_line(error, 10_000))
    if isinstance(error, DeliveryError | TowlineError):
        return DeliveryError(text, is_lasting=getattr(error, "is_lasting", True))
    if "valid JSON" in text:
        return DeliveryError(
            "what answers there is no MLflow but a page, of a login or a proxy for example: is tracking.uri right? "
            f"{_body(text)}"
        )
    if _TAKEN.search(text):
        return DeliveryError("another run wrote the same at the same moment", is_lasting=False)
    status = status_of(error)
    if status is not None:
        reason = _WORDS.get(status, f"the server {'redirects' if status < 400 else 'fails'} ({status})")
        return DeliveryError(f"{reason}{_body(text)}", is_lasting=status in _LASTING_STATUS)
    if reason := next((words for sign, words in _PASSING.items() if sign in text), ""):
        return DeliveryError(reason, is_lasting=False)
    short = text[: 120 if "<html" in text.lower() else MOST_CHARACTERS]
    return DeliveryError(short, is_lasting=getattr(error, "error_code", "") in _LASTING_CODES)


def status_of(error: Exception) -> int | None:
    """Return the HTTP status that an error names; None where it names none."""
    found = _STATUS.search(str(error))
    return int(found[1] or found[2]) if found else None


def is_missing(error: Exception) -> bool:
    """Return whether what was asked for is not there; not, whether the server has no such address."""
    return getattr(error, "error_code", "") == "RESOURCE_DOES_NOT_EXIST" and status_of(error) is None


def is_gone(error: Exception) -> bool:
    """Return whether a run, or its experiment, is not there any more, or was deleted."""
    is_refused = getattr(error, "error_code", "") in ("INVALID_PARAMETER_VALUE", "INVALID_STATE")
    return is_missing(error) or (is_refused and bool(_GONE.search(str(error))))


def _body(text: str) -> str:
    """Return the beginning of what a server said, where it said something that is no page."""
    _, _, body = text.partition("Response body: ")
    body = body.strip("'\" ")
    return "" if not body or body.startswith("<") else f" It says: {body[:120]}"


CALLS_AGAIN = 2  # how often a call that a server failed at once is repeated, before the whole delivery is
AGAIN_SECONDS = 0.5
AT_ONCE_SECONDS = 5.0
UNCOUNTED = ("get_", "search_", "list_", "download_", "log_artifact")
"""How the names of calls begin that deliver nothing, or that are counted by their caller."""


@dataclass
class WatchedClient:
    """MLflow's client, or its store of artifacts, each of its calls watched and each answer checked.

    Args:
        folder: the folder that is delivered.
        calls_again: how often a call is repeated that failed at once, in a way that does not last. All calls here can
            be repeated but create_run.
        is_server: whether a server answers, which may be another thing than MLflow.
    """

    client: Any
    activity: Activity
    folder: object
    calls_again: int = 0
    is_server: bool = False

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self.client, name)

        def call(*given: Any, **named: Any) -> Any:
            for left in range(0 if name == "create_run" else self.calls_again, -1, -1):
                began = time.monotonic()
                try:
                    answer = self._call(name, method, *given, **named)
                    if not name.startswith(UNCOUNTED):
                        self.activity.note_delivered(str(self.folder), name, given, sorted(named.items()))
                    return answer
                except Exception as error:
                    is_late = time.monotonic() - began > AT_ONCE_SECONDS
                    if left == 0 or is_late or is_missing(error) or explained(error).is_lasting:
                        raise
                time.sleep(AGAIN_SECONDS)
            raise AssertionError("a last call returns or raises")

        return call

    def _call(self, name: str, method: Callable[..., Any], *given: Any, **named: Any) -> Any:
        """Return an answer; DeliveryError where it is not MLflow's."""
        try:
            answer = self.activity.call(method, *given, **named)
        except json.JSONDecodeError as error:
            raise _none_of_mlflow(name, "no JSON") from error
        except Exception as error:
            if self.is_server and not _is_from_server(error):  # MLflow stumbled over what it was answered
                raise _none_of_mlflow(name, one_line(error, 120)) from error
            raise
        if problem := next(_problems(name, given, answer), ""):
            raise _none_of_mlflow(name, problem)
        return answer


def _is_from_server(error: Exception) -> bool:
    """Return whether an error says what a server answered, or that it did not."""
    from mlflow.exceptions import MlflowException

    return isinstance(error, MlflowException | OSError | DeliveryError | TowlineError | Cancelled)


def _none_of_mlflow(name: str, problem: str) -> DeliveryError:
    return DeliveryError(
        f"what answers to {name} is no MLflow ({problem}), but a page or a proxy for example: is tracking.uri right?",
        is_lasting=False,
    )


def _problems(name: str, given: tuple[Any, ...], answer: Any) -> Iterator[str]:
    """Yield what is wrong with the answer to a call, as far as anything here relies on it."""
    if name == "create_experiment" and not (isinstance(answer, str) and answer):
        yield "an experiment without an id"
    elif name == "get_experiment_by_name" and answer is not None:
        if not answer.experiment_id or not answer.name:
            yield "an experiment without id or name"
    elif name in ("create_run", "get_run", "search_runs"):
        experiments = given[0] if name == "search_runs" else given[:1]
        for run in answer if name == "search_runs" else [answer]:
            if not RUN_ID.fullmatch(run.info.run_id or ""):
                yield "a run without an id"
            if not run.info.artifact_uri:
                yield "a run without a place for artifacts"
            if name == "get_run" and run.info.run_id != given[0]:
                yield "another run than the one that was asked for"
            if name != "get_run" and run.info.experiment_id not in experiments:
                yield "a run of another experiment"
    elif name == "get_metric_history" and any(point.key != given[1] for point in answer):
        yield "another metric than the one that was asked for"


REQUEST_SECONDS = 60  # that a server may take for an answer; only the export thread waits for it
KILLED = "KILLED"  # MLflow's state of a run that no process is training
MLFLOW_STATES = {"FINISHED": "FINISHED", "FAILED": "FAILED", "PREEMPTED": KILLED, "PRUNED": KILLED}
"""How a run or a sweep ended, in MLflow's words."""


def quiet_client() -> Any:
    """Import MLflow with its retries cut short (by default an unreachable server blocks a call for minutes)."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(REQUEST_SECONDS))
    os.environ.setdefault("MLFLOW_ALLOW_HTTP_REDIRECTS", "false")  # a POST would come back as a GET
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "CRITICAL")  # it would print tracebacks of what is reported in words
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic", "urllib3"):
        logging.getLogger(name).setLevel(logging.CRITICAL)

    return MlflowClient


def reach(uri: str) -> None:
    """Raise a DeliveryError where a server can't be connected to in a few seconds; none behind a proxy is tried."""
    from requests.utils import get_environ_proxies, select_proxy

    address = urlsplit(uri)
    if address.hostname is None or select_proxy(uri, get_environ_proxies(uri, None)):
        return
    try:
        port = address.port or (443 if address.scheme == "https" else 80)
        socket.create_connection((address.hostname, port), timeout=OPENING_SECONDS).close()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DeliveryError(f"can't be reached: {reason}", is_lasting=False) from error


def redirected(error: Exception, address: str) -> str | None:
    """Return the address that a server redirects to, by the error of a call; None where it does not redirect.

    It is followed on the same host only, as the credentials go with it; DeliveryError names another one.
    """
    status = status_of(error)
    if status is None or not 300 <= status < 400:
        return None
    target = _redirect_target(address)
    if target is None or (urlsplit(target).scheme, "https") == ("http", urlsplit(address).scheme):
        raise DeliveryError(f"the server redirects ({status}): is tracking.uri right?") from error
    here, there = urlsplit(address), urlsplit(target)
    if there.hostname != here.hostname:
        raise DeliveryError(f"the server redirects ({status}) to {target}: if that is right, set tracking.uri to it")
    login, at, _ = here.netloc.rpartition("@")
    return there._replace(netloc=f"{login}{at}{there.netloc}").geturl()


def _redirect_target(uri: str) -> str | None:
    """Return the address that a server's API is redirected to; None where that is unknown."""
    import requests

    path = "/api/2.0/mlflow/experiments/get-by-name"
    try:
        answer = requests.get(f"{uri.rstrip('/')}{path}", allow_redirects=False, timeout=REQUEST_SECONDS)
    except requests.RequestException:
        return None
    target = answer.headers.get("Location", "").partition("?")[0]
    is_api = target.startswith(("http://", "https://")) and target.endswith(path)
    return target.removesuffix(path) if is_api else None


def run_of(client: Any, run_id: str) -> Any:
    """Return a run; None where there is none, or it was deleted."""
    try:
        run = client.get_run(run_id)
    except Exception as error:
        if is_missing(error):
            return None
        raise
    return None if run.info.lifecycle_stage == "deleted" else run
