"""How MLflow's page shows an experiment: the columns of its table of runs, and the path that opens it.

MLflow 3 opens an experiment as one of traces, where training runs are not shown, unless the address has
`workflowType=machine_learning`; the experiment's tag `mlflow.experimentKind` does not decide it. A saved view is a tag
of the experiment, `mlflow.sharedViewState.<id>`, and the address names it with `viewStateShareKey=<id>`.
"""

import json
from typing import Any
from urllib.parse import urlencode

from src.errors import one_line
from src.tracking.exporters import MOST_CHARACTERS, Warn
from src.tracking.mlflow_client import quiet_client

VIEW = "towline"
VIEW_TAG = f"mlflow.sharedViewState.{VIEW}"
WIDTHS = {
    "attributes.`Run Name`": 230,
    "runDateAndNestInfo": 140,
    "duration": 80,
    "metrics.`eval/validation/loss`": 145,
    "metrics.`best/eval/validation/loss`": 175,
    "metrics.`eval/validation/exact_match`": 190,
    "metrics.`best`": 85,  # of a sweep: the best value of what it compares
    "metrics.`train_seconds`": 115,
    "metrics.`tokens_per_second`": 145,
    "metrics.`peak_memory_gib`": 140,
    "params.`model.checkpoint`": 150,
    "params.`optimizer.lr`": 100,
    "params.`seed`": 60,
}
"""The columns in their order, by the names that MLflow's page has for them, and the widths in pixels that they need."""


def view_tag(created_milliseconds: int = 0) -> str:
    """Return the value of an experiment's tag that holds the view, as MLflow's page writes it."""
    chosen = [column for column in WIDTHS if column.startswith(("metrics.", "params."))]  # the others are always there
    state = {"selectedColumns": chosen, "columnOrder": list(WIDTHS), "columnWidths": WIDTHS}
    return json.dumps({"name": "Towline", "createdAt": created_milliseconds, "state": json.dumps(state)})


def runs_path(server: str, experiment_name: str, warn: Warn) -> tuple[str, bool]:
    """Return the path of the page that shows an experiment's runs, and whether there is such an experiment.

    The view is added to an experiment that lacks it; where the server refuses that, its own columns are shown. Where
    there is no experiment of that name, it is the one that changed last, or the page of all. May raise whatever MLflow
    raises.
    """
    client = quiet_client()(tracking_uri=server)
    named = client.get_experiment_by_name(experiment_name)
    is_there = named is not None and named.lifecycle_stage == "active"
    found = [named] if is_there else client.search_experiments(max_results=1, order_by=["last_update_time DESC"])
    query = {"workflowType": "machine_learning"}
    place = ""
    for experiment in found:
        place = f"/{experiment.experiment_id}/runs"
        if _has_view(client, experiment, warn):
            query["viewStateShareKey"] = VIEW
    return f"/#/experiments{place}?{urlencode(query)}", is_there


def _has_view(client: Any, experiment: Any, warn: Warn) -> bool:
    """Return whether an experiment has the view, after adding it where it is missing: users may have changed theirs."""
    if VIEW_TAG in experiment.tags:
        return True
    try:
        client.set_experiment_tag(experiment.experiment_id, VIEW_TAG, view_tag(experiment.creation_time or 0))
    except Exception as error:  # whatever MLflow raises, of a server that does not allow it for example
        warn(f"MLflow shows its own columns, as it refused others: {one_line(error, MOST_CHARACTERS)}")
        return False
    return True
