"""Models that lie whole in this process, though the run shares its weights out (ZeRO-3)."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def whole_models() -> Iterator[None]:
    """Have transformers build and load models as ever in this block.

    Where DeepSpeed shares out weights, transformers would share out those of every model that is loaded, and all
    processes would have to load it together.
    """
    integration: Any = sys.modules.get("transformers.integrations.deepspeed")
    if integration is None:
        yield
        return
    reference = integration._hf_deepspeed_config_weak_ref
    integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        integration._hf_deepspeed_config_weak_ref = reference
