"""When Python looks for cyclic garbage: not among what libraries leave behind, which is much, and stays. No torch here.

Each look goes through all there is: while torch, transformers and MLflow are imported that is a quarter of the time,
and once more, for up to two seconds, when the process ends (docs/decisions/0025).
"""

from __future__ import annotations

import atexit
import gc


def rest_while_importing() -> None:
    """Look for no garbage until `collect_from_here`, and for none when the process ends.

    For processes of our own, when they begin. What is part of a cycle at their end is not finalised: a file that nobody
    closed is not flushed.
    """
    gc.disable()
    atexit.unregister(gc.freeze)
    atexit.register(gc.freeze)


def collect_from_here() -> None:
    """Look for garbage from here on, where it rested, but only among what is made from now on."""
    if not gc.isenabled():
        gc.freeze()
        gc.enable()
