"""Names, texts and times as MLflow accepts them."""

import getpass
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from itertools import chain, count
from typing import Any

MAX_NAME_CHARACTERS = 250
_BRACKETED = re.compile(r"<(/?)([\w\-. ]+)>")


def milliseconds(time_of: str, later_seconds: float = 0.0) -> int:
    """Return a time of ISO 8601, plus some seconds, in milliseconds since 1970, as MLflow counts."""
    return int(1000 * (datetime.fromisoformat(time_of).timestamp() + later_seconds))


def plain_name(name: str) -> str:
    """Return a metric's name as MLflow accepts it, and as it is where it does.

    A token `<ToW>` becomes `ToW`, `</ToW>` becomes `ToW end`, and `perf/system/…` MLflow's own `system/…`. In other
    names each character that MLflow refuses becomes '_', and a digest sets them apart. A returned
    name is returned as it is.
    """
    readable = _BRACKETED.sub(lambda found: f"{found[2]} end" if found[1] else found[2], name)
    readable = readable.removeprefix("perf/") if name.startswith("perf/system/") else readable
    readable = readable.replace(",", "_")  # as lm-evaluation-harness has in its names: exact_match,strict
    parts = re.sub(r"[^\w\-. :/]", "_", readable).split("/")
    plain = "/".join("_" if part in ("", ".", "..") else part for part in parts)  # no path with a shorter form
    if plain == readable and len(plain) <= MAX_NAME_CHARACTERS:
        return plain
    digest = hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()[:8]
    return f"{plain[: MAX_NAME_CHARACTERS - 9]}_{digest}"


def distinct_names(names: Iterable[str]) -> dict[str, str]:
    """Return for each param a distinct name that MLflow accepts: other characters become '_', repeats get a number."""
    given: dict[str, str] = {}
    taken: set[str] = set()
    for name in names:
        plain = re.sub(r"[^\w\-. ]", "_", name)[: MAX_NAME_CHARACTERS - 9]
        given[name] = next(one for one in chain([plain], (f"{plain}_{n}" for n in count(2))) if one not in taken)
        taken.add(given[name])
    return given


def user_name() -> str:
    """Return the user's name, or '' in a container that has none."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return ""


def flat(node: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield a nested configuration as dotted keys and texts."""
    if isinstance(node, Mapping) and node:
        for key, value in node.items():
            yield from flat(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, node if isinstance(node, str) else json.dumps(node, ensure_ascii=False, default=str)
