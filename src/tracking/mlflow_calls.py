"""Calls of MLflow's client, each watched: what is waited for, what was delivered, and whether an answer is one.

A server, or a proxy before one, may answer anything: nothing, a page, an object of another shape. MLflow makes entities
of it with empty fields, so each answer that is relied on is checked here.
"""

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

from src.errors import TowlineError, one_line
from src.tracking.exporters import Activity, Cancelled, DeliveryError
from src.tracking.mlflow_errors import explained, is_missing
from src.tracking.mlflow_state import RUN_ID

CALLS_AGAIN = 2
"""How often a call that a server failed at once is repeated, before the whole delivery is."""
AGAIN_SECONDS = 0.5
AT_ONCE_SECONDS = 5.0
UNCOUNTED = ("get_", "search_", "list_", "download_", "log_artifact")
"""How the names of calls begin that deliver nothing, or that are counted by their caller."""


class WatchedClient:
    """MLflow's client, or its store of artifacts, each of its calls watched and each answer checked.

    Args:
        folder: the folder that is delivered.
        calls_again: how often a call is repeated that failed at once, in a way that does not last. All calls here can
            be repeated but create_run.
        is_server: whether a server answers, which may be another thing than MLflow.
    """

    def __init__(
        self, client: Any, activity: Activity, folder: object, *, calls_again: int = 0, is_server: bool = False
    ) -> None:
        self._client = client
        self._activity = activity
        self._folder = str(folder)
        self._calls_again = calls_again
        self._is_server = is_server

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method, delivers = getattr(self._client, name), not name.startswith(UNCOUNTED)
        calls_again = 0 if name == "create_run" else self._calls_again

        def call(*given: Any, **named: Any) -> Any:
            for left in reversed(range(calls_again + 1)):
                began = time.monotonic()
                try:
                    answer = self._call(name, method, *given, **named)
                    if delivers:
                        self._activity.note_delivered(self._folder, name, given, sorted(named.items()))
                    return answer
                except Exception as error:
                    is_late = time.monotonic() - began > AT_ONCE_SECONDS
                    if left == 0 or is_late or is_missing(error) or explained(error).is_lasting:
                        raise
                time.sleep(AGAIN_SECONDS)
            raise AssertionError("a last call returns or raises")

        return call

    def _call(self, name: str, method: Callable[..., Any], *given: Any, **named: Any) -> Any:
        """Return an answer that is MLflow's.

        Raises:
            DeliveryError: where it is not.
        """
        try:
            answer = self._activity.call(method, *given, **named)
        except json.JSONDecodeError as error:
            raise _none_of_mlflow(name, "no JSON") from error
        except Exception as error:
            if self._is_server and not _is_from_server(error):  # MLflow stumbled over what it was answered
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
    elif name in ("create_run", "get_run"):
        yield from _problems_of_run(answer)
        if name == "create_run" and answer.info.experiment_id != given[0]:
            yield "a run of another experiment"
        if name == "get_run" and answer.info.run_id != given[0]:
            yield "another run than the one that was asked for"
    elif name == "search_runs":
        for run in answer:
            yield from _problems_of_run(run)
            if run.info.experiment_id not in given[0]:
                yield "a run of another experiment"
    elif name == "get_metric_history" and any(point.key != given[1] for point in answer):
        yield "another metric than the one that was asked for"


def _problems_of_run(run: Any) -> Iterator[str]:
    if not RUN_ID.fullmatch(run.info.run_id or ""):
        yield "a run without an id"
    if not run.info.artifact_uri:
        yield "a run without a place for artifacts"
