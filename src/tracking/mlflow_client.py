"""The door to mlflow: its client without what would block or print, and whether a server is there or redirects."""

import logging
import os
import socket
from typing import Any
from urllib.parse import urlsplit

from src.tracking.export_thread import OPENING_SECONDS
from src.tracking.exporters import DeliveryError
from src.tracking.mlflow_errors import is_missing, status_of

REQUEST_SECONDS = 60
"""How long a server may take for an answer; only the export thread waits for it."""
KILLED = "KILLED"
"""MLflow's state of a run that no process is training."""
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

    It is followed on the same host only, as the credentials go with it.

    Raises:
        DeliveryError: naming where else it redirects.
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
    if not target.startswith(("http://", "https://")) or not target.endswith(path):
        return None
    return target.removesuffix(path)


def run_of(client: Any, run_id: str) -> Any:
    """Return a run; None where there is none, or it was deleted."""
    try:
        run = client.get_run(run_id)
    except Exception as error:
        if is_missing(error):
            return None
        raise
    return None if run.info.lifecycle_stage == "deleted" else run
