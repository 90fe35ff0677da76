"""Secrets: what is one, how it is stored, and how it comes back. No torch here.

Secrets are the credentials of a URL, what the environment gives to a key under `tracking` or to `sweep.storage`, and
the value of a variable whose name ends in TOKEN, KEY, PASSWORD or SECRET. They are resolved in memory only. What is
stored has the interpolation in their place (`${oc.env:NAME}`), or, of what was written out in a URL, `***`; that comes
back from the process that started this one, from the environment, or from `.netrc`, which the tracker reads by itself.
Nothing that is printed or written has them: it goes through `clean`.
"""

from __future__ import annotations

import json
import netrc
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from typing import Any
from urllib.parse import unquote, urlsplit

MASK = "***"
HANDED_DOWN = "TOWLINE_SECRETS"
"""The environment variable by which processes that this one starts get the URLs that are masked in what they read."""
OWN_VARIABLE = "TOWLINE_URL_"
MLFLOW_LOGINS = (("MLFLOW_TRACKING_TOKEN",), ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"))
"""Variables, each group enough by itself, that MLflow takes a server's credentials from."""
SHORTEST_KNOWN = 4
"""Characters of a secret that is looked for in other texts; shorter ones stand in too many that have nothing to do."""

_SECRET_NAME = re.compile(r"(TOKEN|KEY|PASSWORD|PASSWD|SECRET|CREDENTIALS?)S?$", re.I)
_LOGIN = r"(?:[^/\s?#'\"<>]*|[^/\s:@'\"<>]*:(?!\d+/)[^\s@'\"<>]*)@"
_AUTHORITY = re.compile(rf"(?<=://){_LOGIN}")
_URL_WITH_LOGIN = re.compile(rf"[A-Za-z][\w+.-]*://{_LOGIN}[^\s,'\"\]}}]*")
_QUERY = re.compile(
    r"([?&;][\w.-]*(?:token|key|password|passwd|pwd|secret|sig|signature)=)[^&#\s'\"<>]+", re.IGNORECASE
)
_ENVIRONMENT = re.compile(r"\$\{oc\.env:\s*([A-Za-z_]\w*)\s*(?:,([^{}]*))?\}")
_ASSIGNMENT = re.compile(
    r"(\b[A-Z0-9_]*(?:TOKEN|KEY|PASSWORD|SECRET)[\"']?\s*[:=]\s*)(\"[^\"\n]{4,}\"|'[^'\n]{4,}'|[^\s\"',;()\[\]{}]{8,})"
)

_known: set[str] = set()


def is_secret_variable(name: str) -> bool:
    """Return whether an environment variable holds a secret, by its name."""
    return bool(_SECRET_NAME.search(name))


def know(value: str) -> None:
    """Have a secret be masked in all that is printed or written from now on."""
    if len(value) >= SHORTEST_KNOWN and value != MASK:
        _known.add(value)


def know_environment() -> None:
    """Have the values of all variables with a secret's name be masked."""
    for name, value in os.environ.items():
        if is_secret_variable(name) and name != HANDED_DOWN and len(value) >= 2 * SHORTEST_KNOWN:
            know(value)


def without_credentials(text: str) -> str:
    """Return a text with the credentials of every URL in it masked; these are known from then on."""
    if "://" not in text:
        return text
    for found in _AUTHORITY.finditer(text):
        user, _, password = found[0][:-1].partition(":")
        for part in (password or user, unquote(password or user)):
            know(part)
    for found in _QUERY.finditer(text):
        know(found[0].partition("=")[2])
    return _QUERY.sub(rf"\g<1>{MASK}", _AUTHORITY.sub(f"{MASK}@", text))


def clean(text: str) -> str:
    """Return a text without secrets: those of URLs in it, and every one that is known."""
    text = without_credentials(text)
    for value in sorted(_known, key=len, reverse=True):
        if value in text:
            text = text.replace(value, MASK)
    return text


def clean_code(text: str) -> str:
    """Return code, such as a difference, without secrets; also without what is assigned to a secret's name in it."""
    return _ASSIGNMENT.sub(rf"\g<1>{MASK}", clean(text))


def cleaned(node: Any) -> Any:
    """Return plain containers with every text in them cleaned."""
    if isinstance(node, Mapping):
        return {key: cleaned(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [cleaned(value) for value in node]
    return clean(node) if isinstance(node, str) else node


def masked(node: Any) -> Any:
    """Return plain containers with the credentials of URLs masked in every text."""
    if isinstance(node, Mapping):
        return {key: masked(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [masked(value) for value in node]
    return without_credentials(node) if isinstance(node, str) else node


def hand_down(node: Any) -> None:
    """Have processes that this one starts find what is masked in plain containers: by their environment."""
    given = _handed_down()
    given |= {f"{key} {stored}": text for key, text in _texts(node) if (stored := without_credentials(text)) != text}
    if given:
        os.environ[HANDED_DOWN] = json.dumps(given)


def as_variables(texts: Sequence[str]) -> list[str]:
    """Return overrides in which variables of the environment, set here, stand for every URL that has credentials.

    So that what Hydra writes and prints of a command line has none.
    """

    def variable(url: re.Match[str]) -> str:
        without_credentials(url[0])
        name = next(n for i in count(1) if os.environ.get(n := f"{OWN_VARIABLE}{i}", url[0]) == url[0])
        os.environ[name] = url[0]
        return f"${{oc.env:{name}}}"

    return [_URL_WITH_LOGIN.sub(variable, text) for text in texts]


def reveal(node: Any, missing: list[tuple[str, str]], key: str = "") -> Any:
    """Return stored containers with their secrets in place, from what was handed down and the environment.

    Args:
        missing: gets the key and what it lacks, of each secret that is not to be had; the text stays as it is.
        key: of the containers.
    """
    if isinstance(node, Mapping):
        return {name: reveal(value, missing, f"{key}.{name}" if key else str(name)) for name, value in node.items()}
    if isinstance(node, list | tuple):
        return [reveal(value, missing, key) for value in node]
    return _revealed(node, missing, key) if isinstance(node, str) else node


def is_stored_interpolation(key: str, variable: str) -> bool:
    """Return whether a variable that the environment gives to a key is stored as an interpolation."""
    if variable.startswith(OWN_VARIABLE):  # it is of this process alone
        return False
    return key.partition(".")[0] == "tracking" or key == "sweep.storage" or is_secret_variable(variable)


def _revealed(text: str, missing: list[tuple[str, str]], key: str) -> str:
    for found in _ENVIRONMENT.finditer(text):
        variable, default = found[1], found[2]
        if not is_stored_interpolation(key, variable):
            continue
        value = os.environ.get(variable, None if default is None else default.strip().strip("'\""))
        if value is None:
            missing.append((key, f"the environment variable {variable} is not set, and its value was not stored"))
            continue
        if is_secret_variable(variable):
            know(value)
        text = text.replace(found[0], value)
    if f"{MASK}@" in text or f"={MASK}" in text:
        if (handed := _handed_down().get(f"{key} {text}")) is not None:
            return handed
        if "://" in text:
            return _with_login(text, missing, key)
    return text


def _with_login(url: str, missing: list[tuple[str, str]], key: str) -> str:
    """Return a masked URL without its mask, where the tracker finds the credentials by itself."""
    plain = url.replace(f"{MASK}@", "")
    if key == "tracking.uri" and plain.startswith(("http://", "https://")) and MASK not in plain:
        if any(all(os.environ.get(name) for name in names) for names in MLFLOW_LOGINS):
            return plain
        if _is_in_netrc(urlsplit(plain).hostname or ""):
            return plain
        how = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, have them in ~/.netrc, or give it"
        missing.append((key, f"its credentials were not stored: {how} again, {key}=…"))
    else:
        missing.append((key, f"its credentials were not stored: give it again, {key}=…"))
    return url


def _is_in_netrc(host: str) -> bool:
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _handed_down() -> dict[str, str]:
    return dict(json.loads(os.environ.get(HANDED_DOWN) or "{}"))


def _texts(node: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield each text of plain containers with its key, as `reveal` names it."""
    if isinstance(node, Mapping):
        for name, value in node.items():
            yield from _texts(value, f"{key}.{name}" if key else str(name))
    elif isinstance(node, list | tuple):
        for value in node:
            yield from _texts(value, key)
    elif isinstance(node, str):
        yield key, node
