"""Whether a frozen configuration may run code: a checkpoint's, or a plugin's.

`model.trust_remote_code` and `model.use_safetensors=false` let a checkpoint run code, and `plugins` names modules that
are imported. On the command line or in conf/ they are the user's own word; in the config.yaml of a folder they may be
somebody else's. So a start signs them, with a key that only this user can read, for the folder that it starts in. A
folder from elsewhere has no such signature.
"""

import hashlib
import hmac
import json
import os
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from src.records import read_bytes

RUNS_CODE = {"trust_remote_code": True, "use_safetensors": False}
"""Keys of the model section, and the value with which a checkpoint may run code."""
KEY_BYTES = 32
SIGNED = ("checkpoint", "revision", *RUNS_CODE)


def code_keys(sections: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of a configuration that run code, with their values."""
    model, plugins = sections.get("model"), sections.get("plugins")
    given = model if isinstance(model, Mapping) else {}
    found = {f"model.{key}": value for key, value in RUNS_CODE.items() if given.get(key) is value}
    return found | ({"plugins": plugins} if plugins else {})


def signature(folder: Path, sections: Mapping[str, Any]) -> str | None:
    """Return this user's signature of what may run code in a run's folder; None where nothing may, or there is no key.

    A missing key is made. Where that can't be done the command line has to repeat itself, which is all that is lost.
    """
    if not code_keys(sections):
        return None
    try:
        return _sign(_make_key(), folder, sections)
    except (OSError, ValueError, RuntimeError):
        return None


def is_signed(folder: Path, sections: Mapping[str, Any], signatures: Iterable[Any]) -> bool:
    """Return whether this user started a run with this configuration in this folder."""
    try:
        key = read_bytes(_key_file(), KEY_BYTES)
    except (OSError, ValueError, RuntimeError):  # RuntimeError: this user has no home
        return False
    expected = _sign(key, folder, sections)
    return len(key) == KEY_BYTES and any(
        isinstance(one, str) and hmac.compare_digest(one.encode(), expected.encode()) for one in signatures
    )


def _sign(key: bytes, folder: Path, sections: Mapping[str, Any]) -> str:
    signed = [str(folder.resolve()), *(sections["model"].get(name) for name in SIGNED)]
    if plugins := sections.get("plugins"):
        signed.append(plugins)
    return hmac.new(key, json.dumps(signed, default=str).encode(), hashlib.sha256).hexdigest()


def _key_file() -> Path:
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "towline" / "key"


def _make_key() -> bytes:
    file = _key_file()
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        part = file.with_name(f".key.{os.getpid()}")
        with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as made:
            made.write(secrets.token_bytes(KEY_BYTES))
        try:
            os.link(part, file)
        except FileExistsError:  # another start was faster: there is one key
            pass
        finally:
            part.unlink()
    return read_bytes(file, KEY_BYTES)
