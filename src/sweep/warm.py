"""What every trial would do once for itself, done by the fork server, which imports this: no threads, no CUDA."""

from __future__ import annotations

from src.config.formats import declared_formats
from src.model.build import know_weight_names
from src.tracking.provenance import versions

declared_formats()
know_weight_names()
versions()
