"""What ensembles leave in their folders, for whoever reads it back. No torch here."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from src.records import Types, check_keys, damaged, read_json

ENSEMBLES, RECORD = "ensembles", "ensemble.json"
RECORD_KEYS: Mapping[str, Types] = {
    **dict.fromkeys(("decided_by", "scores", "rows"), dict),
    "method": str,
    "is_finished": bool,
    "members": list,
}
MEMBER_KEYS: Mapping[str, Types] = {"name": str, "run": str, "is_in": bool, "scores": dict}
REMEDY = "Restore it; or move the ensemble's folder away: the same command makes it anew."


def read_record(folder: Path) -> dict[str, Any]:
    """Return what ensemble.json says, its scores once it is finished; empty without one. DamagedFileError as read."""
    try:
        record = read_json(folder / RECORD, RECORD_KEYS, remedy=REMEDY)
        for member in record["members"]:
            check_keys(member if isinstance(member, dict) else {}, MEMBER_KEYS)
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise damaged(folder / RECORD, f"a member's {error}", REMEDY) from error
    return record


def members_in(folder: Path) -> list[Path]:
    """Return the folders of the runs that an ensemble's folder is made of; none of another folder."""
    return [Path(member["run"]) for member in read_record(folder).get("members", [])]
