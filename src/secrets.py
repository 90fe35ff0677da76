"""Secrets: what counts as one, how it is stored, and how it is restored.

Secrets are the credentials of a URL, what the environment sets for a key under `tracking` or to `sweep.storage`, and
the value of a variable whose name ends in TOKEN, KEY, PASSWORD or SECRET. They are resolved in memory only. What is
stored has the interpolation in their place (`${oc.env:NAME}`), or, of what was written out in a URL, `***`; that comes
back from the process that started this one, from the environment, or from `.netrc`, which the tracker reads by itself.
Nothing that is printed or written has them: it goes through `clean`.
"""

import json
import netrc
import os
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from itertools import count
from typing import Any
from urllib.parse import unquote, unquote_plus, urlsplit

MASK = "***"
HANDED_DOWN = "TOWLINE_SECRETS"  # the variable by which processes that this one starts get the URLs that are masked
OWN_VARIABLE = "TOWLINE_URL_"
MLFLOW_LOGINS = (("MLFLOW_TRACKING_TOKEN",), ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"))
"""Variables, each group enough by itself, that MLflow takes a server's credentials from."""
SHORTEST_KNOWN = 4  # characters of a secret that is looked for in other texts; shorter ones occur by chance
SHORTEST_INSIDE = 8  # characters of one that is masked inside words as well; shorter ones only as a whole word
SHORTEST_TOKEN = 16  # characters of a word that is taken for a token where it has both letters and digits

_SECRET_NAME = re.compile(r"(TOKEN|KEY|PASSWORD|PASSWD|SECRET|CREDENTIALS?)S?$", re.I)


def _of_url(without: str = "") -> str:
    """Return a pattern of one character of a URL (RFC 3986), but for some; no apostrophe that ends a quotation."""
    return rf"(?:[^\s\"<>'{without}]|'(?![\s,:;}}\])]|\Z))"


_LOGIN = rf"(?:{_of_url('/?#')}*|{_of_url('/:@')}*:(?!\d+/){_of_url('@')}*)@"
_AUTHORITY = re.compile(rf"(?<=://){_LOGIN}")
_URL = re.compile(rf"[A-Za-z][\w+.-]*://{_of_url()}*")
_GIVEN_URL = re.compile(rf"[A-Za-z][\w+.-]*://(?:{_LOGIN})?[^\s,'\"\]}}]*")
_PARAMETER = re.compile(
    rf"([?&;#])([\w.%+\[\]-]+)=(\$\{{oc\.env:[^{{}}]*\}}|{_of_url('&#')}+?)(?=[)\]}},.:]*(?:[&#]|\Z))"
)
_SECRET_PARAMETER = re.compile(
    r"(?:token|key|password|passwd|passphrase|pwd|secret|sig|signature|credentials?|jwt|odbc_connect)$"
    r"|(?:^|[^a-z])(?:pass|pw|auth|authorization|oauth)$",
    re.IGNORECASE,
)
_ODBC_PASSWORD = re.compile(r"(?:PWD|PASSWORD)\s*=\s*(\{[^}]*\}|[^;]*)", re.IGNORECASE)
_ENVIRONMENT = re.compile(r"\$\{oc\.env:\s*([A-Za-z_]\w*)\s*(?:,([^{}]*))?\}")
_ONLY_ENVIRONMENT = re.compile(rf"(?:{_ENVIRONMENT.pattern})+")
_PLACE = re.compile("\ue000([A-Za-z_]\\w*)\ue001")  # of a variable's value whose key is not known yet: `placeholder`
_MASKED_URL = re.compile(r"://[^\s\"<>]*?(?:\*\*\*@|[=/#]\*\*\*(?![\w*]))")
_PLAIN_SEGMENT = re.compile(r"[A-Za-z_.~-]*|v?\d+(?:\.\d+)*")  # of a path: words and versions, which grant no access

_known: dict[str, str] = {}  # secrets, and what is shown in place of each
_came_by: dict[str, str] = {}  # what the environment gave to secret keys, and the interpolation that it was given by


def is_secret_variable(name: str) -> bool:
    """Return whether an environment variable holds a secret, by its name."""
    return bool(_SECRET_NAME.search(name))


def is_secret_key(key: str) -> bool:
    """Return whether what the environment sets for a key is stored as the interpolation that it comes by."""
    return key.partition(".")[0] == "tracking" or key == "sweep.storage"


def looks_like_token(word: str) -> bool:
    """Return whether a word is a token by its looks: long, of letters and digits, and of more than short words."""
    if len(word) < SHORTEST_TOKEN or re.search(r"[\s/\\]", word) or not re.search(r"[A-Za-z]", word):
        return False
    return any(re.search(r"\d", run) for run in re.findall(r"[A-Za-z0-9]{12,}", word))


def know(value: str, shown: str = MASK) -> None:
    """Mask a secret in all that is printed or written from now on."""
    if len(value) >= SHORTEST_KNOWN and value != shown and value != MASK:
        _known[value] = shown


def know_environment() -> None:
    """Mask the values of all variables with a secret's name."""
    for name, value in os.environ.items():
        if is_secret_variable(name) and name != HANDED_DOWN and len(value) >= 2 * SHORTEST_KNOWN:
            know(value)


def know_given(key: str, variable: str, value: str) -> None:
    """Mask what is secret in the value that a variable has for a key."""
    if is_secret_variable(variable):
        know(value)
    if is_secret_key(key) and not variable.startswith(OWN_VARIABLE):
        if len(value) >= SHORTEST_KNOWN:
            _came_by[value] = f"${{oc.env:{variable}}}"
        _know_address(value)


def as_stored(text: str) -> str:
    """Return a text of a secret key as a file or message may have it: interpolated where the environment gave it."""
    for value in sorted(_came_by, key=len, reverse=True):
        text = text.replace(value, _came_by[value])
    return without_credentials(text)


def _know_address(value: str) -> None:
    """Mask what grants access in a value of the environment, and keep the rest of it readable."""
    without_credentials(value)
    if looks_like_token(value):
        know(value)
    for found in _URL.finditer(value):
        url = found[0]
        shown = _shown_address(url)
        know(url, shown)
        know(url.rstrip("/"), shown.rstrip("/"))
        for _, name, given in _PARAMETER.findall(url):
            is_secret = _SECRET_PARAMETER.search(unquote_plus(name)) or re.search(r"\d.*[A-Za-z]|[A-Za-z].*\d", given)
            for one in dict.fromkeys((given, unquote_plus(given))):
                know(one if is_secret else f"{name}={one}", MASK if is_secret else f"{name}={MASK}")
        know(url.partition("#")[2])
        path = _AUTHORITY.sub("", url).partition("://")[2]
        for segment in re.split(r"[?#]", path, maxsplit=1)[0].split("/")[1:]:
            if looks_like_token(segment):
                know(segment)
            elif url.startswith("http") and not _PLAIN_SEGMENT.fullmatch(segment):
                know(f"/{segment}", f"/{MASK}")


def _shown_address(url: str) -> str:
    """Return a URL as it may be shown: host, port, and of its path the plain words; a file's path is shown whole."""
    scheme, _, rest = without_credentials(url).partition("://")
    place, mark, fragment = rest.partition("#")
    place, asked, query = place.partition("?")
    host, *segments = place.split("/")
    is_network = scheme.startswith("http")

    def may_be_shown(segment: str) -> bool:
        is_plain = _PLAIN_SEGMENT.fullmatch(segment) is not None and len(segment) < 2 * SHORTEST_TOKEN
        return is_plain if is_network else not looks_like_token(segment)

    path = "/".join([host, *(one if may_be_shown(one) else MASK for one in segments)])
    query = re.sub(r"=[^&]+", f"={MASK}", query) if "=" in query else MASK if query else ""
    return f"{scheme}://{path}{asked}{query}{mark}{MASK if fragment else ''}"


def without_credentials(text: str) -> str:
    """Return a text with the credentials of every URL in it masked; these are known from then on."""
    if "://" not in text:
        return text
    return _URL.sub(lambda url: _PARAMETER.sub(_without_value, _AUTHORITY.sub(_without_login, url[0])), text)


def _without_login(found: re.Match[str]) -> str:
    user, _, password = found[0][:-1].partition(":")
    if _ONLY_ENVIRONMENT.fullmatch(password or user) or _ONLY_ENVIRONMENT.fullmatch(found[0][:-1]):
        return found[0]  # as it is stored
    for part in dict.fromkeys((password or user, unquote(password or user))):
        if password or looks_like_token(part):  # a user's name is a word that occurs elsewhere too
            know(part)
    return f"{MASK}@"


def _without_value(found: re.Match[str]) -> str:
    mark, name, value = found.groups()
    if not _SECRET_PARAMETER.search(unquote_plus(name)) or _ONLY_ENVIRONMENT.fullmatch(value):
        return found[0]
    for one in dict.fromkeys((value, unquote_plus(value))):
        know(one)
        for password in _ODBC_PASSWORD.findall(one):
            know(password.strip("{}"))
    return f"{mark}{name}={MASK}"


def clean(text: str) -> str:
    """Return a text without secrets: those of URLs in it, and every one that is known."""
    without_credentials(text)  # what is in it is known from here on
    if _known:
        text = _any_of(tuple(_known)).sub(lambda found: _known[found[0]], text)
    return without_credentials(text)


@lru_cache(maxsize=4)
def _any_of(values: tuple[str, ...]) -> re.Pattern[str]:
    def alone(value: str) -> str:
        inside = re.escape(value)
        return inside if len(value) >= SHORTEST_INSIDE else rf"(?<![^\W_]){inside}(?![^\W_])"

    return re.compile("|".join(alone(value) for value in sorted(values, key=len, reverse=True)))


def map_texts(node: Any, change: Callable[[str, str], str], key: str = "") -> Any:
    """Return plain containers, which have a key, with every text in them changed: `change` takes a text and its key."""
    if isinstance(node, Mapping):
        return {name: map_texts(value, change, f"{key}.{name}" if key else str(name)) for name, value in node.items()}
    if isinstance(node, list | tuple):
        return [map_texts(value, change, key) for value in node]
    return change(node, key) if isinstance(node, str) else node


def cleaned(node: Any) -> Any:
    """Return plain containers with every text in them cleaned."""
    return map_texts(node, lambda text, _: clean(text))


def masked(node: Any, key: str = "") -> Any:
    """Return plain containers, which have a key, to be stored: credentials masked, texts of secret keys `as_stored`."""
    return map_texts(node, lambda text, at: as_stored(text) if is_secret_key(at) else without_credentials(text), key)


def hand_down(node: Any, stored: Any, *, is_new: bool = True) -> None:
    """Pass what `stored` masks of the same containers with secrets to processes that this one starts.

    `is_new`: they come from what somebody wrote, in which a mask is a text, and not from a frozen file.
    """
    given = _handed_down()
    for (key, text), (_, kept) in zip(_texts(node), _texts(stored), strict=False):
        without_credentials(text)
        if MASK in kept and (kept != text or (is_new and _MASKED_URL.search(text))):
            given[f"{key} {kept}"] = text
    if given:
        os.environ[HANDED_DOWN] = json.dumps(given)


def as_variables(node: Any) -> Any:
    """Return overrides, or what a file has, with variables of the environment, set here, for URLs with credentials.

    What Hydra writes, pickles and prints of them then has no credentials.
    """
    return map_texts(node, lambda text, _: _GIVEN_URL.sub(lambda url: _with_variables(url[0]), text))


def _with_variables(url: str) -> str:
    if without_credentials(url) == url:
        return url
    if "${" not in url:
        return _variable(url)
    # a variable's value is not resolved again, so only a login without interpolations becomes one
    return _AUTHORITY.sub(lambda login: login[0] if "${" in login[0] else f"{_variable(login[0][:-1])}@", url)


def _variable(value: str) -> str:
    name = next(n for i in count(1) if os.environ.get(n := f"{OWN_VARIABLE}{i}", value) == value)
    os.environ[name] = value
    return f"${{oc.env:{name}}}"


def reveal(node: Any, missing: list[tuple[str, str]], key: str = "") -> Any:
    """Return stored containers, which have a key, with their secrets, as handed down or set in the environment.

    `missing` gets the key and what it lacks, of each secret that is not available; its text stays as it is.
    """
    return map_texts(node, lambda text, at: _revealed(text, missing, at), key)


def is_stored_interpolation(key: str, variable: str) -> bool:
    """Return whether a variable that the environment gives to a key is stored as an interpolation."""
    is_own = variable.startswith(OWN_VARIABLE)  # of this process alone
    return not is_own and (is_secret_key(key) or is_secret_variable(variable))


def placeholder(variable: str) -> str:
    """Return a placeholder for a variable until `placed` knows its key, which need not be that of the interpolation."""
    return f"\ue000{variable}\ue001"


def placed(node: Any, key: str = "") -> Any:
    """Return containers to be stored: for each placeholder the interpolation, or the value where `reveal` reads none.

    What is secret of such a value is masked.
    """
    return map_texts(node, lambda text, at: _PLACE.sub(lambda found: _stored_value(found[1], at), text), key)


def _stored_value(variable: str, key: str) -> str:
    if is_stored_interpolation(key, variable):
        return f"${{oc.env:{variable}}}"
    return _URL.sub(lambda url: _shown_address(url[0]), os.environ.get(variable, ""))


def _revealed(text: str, missing: list[tuple[str, str]], key: str) -> str:
    if MASK in text and (handed := _handed_down().get(f"{key} {text}")) is not None:
        return handed
    for found in _ENVIRONMENT.finditer(text):
        variable, default = found[1], found[2]
        if not is_stored_interpolation(key, variable):
            continue
        value = os.environ.get(variable, None if default is None else default.strip().strip("'\""))
        if value is None:
            missing.append((key, f"the environment variable {variable} is not set, and its value was not stored"))
            continue
        if variable in os.environ:
            know_given(key, variable, value)
        text = text.replace(found[0], value)
    return _with_login(text, missing, key) if _MASKED_URL.search(text) else text


def _with_login(url: str, missing: list[tuple[str, str]], key: str) -> str:
    """Return a masked URL without its mask, where the tracker finds the credentials by itself."""
    plain = url.replace(f"{MASK}@", "")
    how = ""
    if key == "tracking.uri" and plain.startswith(("http://", "https://")) and MASK not in plain:
        is_set = any(all(os.environ.get(name) for name in names) for names in MLFLOW_LOGINS)
        if is_set or _is_in_netrc(urlsplit(plain).hostname or ""):
            return plain
        how = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, have them in ~/.netrc, or "
    missing.append((key, f"its credentials were not stored: {how}give it again, {key}=…"))
    return url


def _is_in_netrc(host: str) -> bool:
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _handed_down() -> dict[str, str]:
    return dict(json.loads(os.environ.get(HANDED_DOWN) or "{}"))


def _texts(node: Any) -> list[tuple[str, str]]:
    """Return each text of plain containers with its key, as `reveal` names it."""
    found: list[tuple[str, str]] = []

    def note(text: str, key: str) -> str:
        found.append((key, text))
        return text

    map_texts(node, note)
    return found
