"""What a configuration takes of the start that composes it: `${start_time:}`, `${uid:}`, `${sweep_id:}`.

OmegaConf's resolvers belong to the process, and so does what they stand for.
"""

import uuid
from datetime import datetime
from pathlib import Path

from omegaconf import OmegaConf

from src.config.options import PROJECT_ROOT
from src.config.quoting import in_url


def declare(**values: str) -> None:
    """Declare resolvers that stand for a text each."""
    for name, value in values.items():
        OmegaConf.register_new_resolver(name, lambda value=value: value, replace=True)


def new_identity() -> None:
    """Declare a name that the next run's folder has alone: seconds alone would collide."""
    declare(start_time=datetime.now().strftime("%Y%m%d-%H%M%S"), uid=uuid.uuid4().hex[:6])


def is_named_by_start(folder: Path) -> bool:
    """Return whether a folder has a name that the next start will not give again."""
    uid = OmegaConf.create({"uid": "${uid:}"}).uid
    return bool(uid) and uid in folder.name


declare(project_root=str(PROJECT_ROOT), project_url=in_url(PROJECT_ROOT), start_time="", uid="", sweep_id="")
