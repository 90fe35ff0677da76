"""When Python collects cyclic garbage: not among the many objects that libraries make on import.

Each collection goes through all objects: while torch, transformers and MLflow are imported that is a quarter of the
time, and up to two seconds more when the process ends (docs/decisions/0025).
"""

import atexit
import gc


def rest_while_importing() -> None:
    """Collect no garbage until `collect_from_here`, and none when the process ends.

    For processes of our own, when they begin. What is part of a cycle at their end is not finalised: a file that is
    still open is not flushed.
    """
    gc.disable()
    atexit.unregister(gc.freeze)
    atexit.register(gc.freeze)


def collect_from_here() -> None:
    """Collect garbage again after `rest_while_importing`, but only among objects made from now on."""
    if not gc.isenabled():
        gc.freeze()
        gc.enable()
