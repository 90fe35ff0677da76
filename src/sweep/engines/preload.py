"""Imported by the fork server only: makes it what every trial begins with, with no threads and no CUDA.

What only some trials need it imports after this, see src.sweep.engines.local.
"""

from contextlib import suppress
from importlib import import_module

from src.runtime.collector import rest_while_importing

NEEDED = (
    *("src.run", "src.cli.main", "src.cli.start"),
    *("torch", "transformers", "transformers.generation.utils", "accelerate"),
    *("src.checkpoint.store", "src.data.dataset", "src.evaluation.evaluate", "src.evaluation.samples"),
    *("src.model.build", "src.model.card", "src.model.export", "src.overview"),
    *("src.runtime.session", "src.sweep.pruning", "src.tracking.tracker"),
    *("src.training.loop", "src.training.resume", "src.training.state", "pandas"),  # pyarrow imports pandas at work
)


def warm_up() -> None:
    """Import what every trial needs, and do what each would do for itself."""
    rest_while_importing()  # each trial looks for garbage again, when it is ready to
    for name in NEEDED:
        with suppress(ImportError):  # the trial reports it
            import_module(name)
    from src.config.formats import declared_formats
    from src.model.build import preload_weight_names
    from src.tracking.provenance import versions

    declared_formats()
    preload_weight_names()
    versions()


warm_up()
