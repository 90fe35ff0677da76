"""Models that lie whole in this process, whether or not the run shares its weights out (ZeRO-3)."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def whole_models() -> Iterator[None]:
    """Have transformers build and load models as ever in this block.

    Where DeepSpeed shares out weights, transformers would share out those of every model that is loaded, and all
    processes would have to load it together. Where DeepSpeed is not used, accelerate 1.15 would import all of it, and
    MLflow with it, to see that a model that is saved is none of its.
    """
    integration: Any = sys.modules.get("transformers.integrations.deepspeed")
    other: Any = sys.modules.get("accelerate.utils.other")
    if "deepspeed" not in sys.modules and other is not None:
        asked, other.is_deepspeed_available = other.is_deepspeed_available, lambda: False
        try:
            yield
        finally:
            other.is_deepspeed_available = asked
        return
    if integration is None:
        yield
        return
    reference = integration._hf_deepspeed_config_weak_ref
    integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        integration._hf_deepspeed_config_weak_ref = reference
