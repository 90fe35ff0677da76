"""What MLflow's errors mean: in words, with the remedy, and whether trying again can help. Without secrets."""

import re

from src import secrets
from src.errors import TowlineError, one_line
from src.tracking.exporters import DeliveryError
from src.tracking.folder_exporter import MOST_CHARACTERS

_STATUS = re.compile(r"error code (\d{3})\b|too many (\d{3}) error")
_GONE = re.compile(r"must be in (the )?'?active'? state|already deleted|is deleted", re.IGNORECASE)
_TAKEN = re.compile(r"UNIQUE constraint failed|duplicate key value|Duplicate entry")
"""What SQLite, PostgreSQL and MySQL say of a row that two add at once, such as a data set that runs share."""
_LASTING_CODES = (
    "INVALID_PARAMETER_VALUE",
    "BAD_REQUEST",
    "PERMISSION_DENIED",
    "UNAUTHENTICATED",
    "ENDPOINT_NOT_FOUND",
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
_LASTING_STATUS = frozenset(range(300, 500)) - {408, 409, 425, 429}


def explained(error: Exception) -> DeliveryError:
    """Return an error of MLflow, or of what it is built on, in words and without secrets."""
    text = secrets.clean(one_line(error, 10_000))
    if isinstance(error, DeliveryError):
        return DeliveryError(text, is_lasting=error.is_lasting)
    if isinstance(error, TowlineError):
        return DeliveryError(text)
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
    code = getattr(error, "error_code", "")
    if "timed out" in text or "timeout exception" in text:
        return DeliveryError("no answer in time", is_lasting=False)
    for sign in ("Connection refused", "Name or service not known", "No route to host", "Network is unreachable"):
        if sign in text:
            return DeliveryError(f"can't be reached: {sign}", is_lasting=False)
    if "database is locked" in text:
        return DeliveryError("the database is locked by another process", is_lasting=False)
    is_page = "<html" in text.lower()
    short = text[:120] if is_page else text
    return DeliveryError(short[:MOST_CHARACTERS], is_lasting=code in _LASTING_CODES)


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
