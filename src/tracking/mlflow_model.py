"""What MLflow knows of an exported model: its file `MLmodel`, with a signature, beside the files of model/.

A whole decoder-only model can be loaded with `mlflow.transformers.load_model` and `mlflow.pyfunc.load_model`. For an
adapter, and for an encoder-decoder, transformers 5 has no pipeline: MLmodel then holds the signature alone, and the
model's README.md says how it is loaded.
"""

import json
import tempfile
from pathlib import Path
from platform import python_version
from typing import Any

from src.records import read_json
from src.tracking.mlflow_log import OpenRun

MODEL = "model"
TOKENIZER = f"{MODEL}/components/tokenizer"  # where MLflow looks for it


def mlmodel(folder: Path, run_id: str) -> Any:
    """Return MLflow's description of the model in a run's model/; DamagedFileError where that can't be read."""
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ColSpec, Schema

    text = Schema([ColSpec("string")])
    described = Model(artifact_path=MODEL, run_id=run_id, signature=ModelSignature(inputs=text, outputs=text))
    if flavor := _pipeline(folder / MODEL):
        described.add_flavor("transformers", **flavor)
        described.add_flavor("python_function", loader_module="mlflow.transformers", python_version=python_version())
    return described


def log_description(run: OpenRun, folder: Path, described: Any) -> None:
    """Log what describes the model in a run's model/, whose files are there, and its tokenizer where it is sought."""
    for file in sorted((folder / MODEL).glob("*.json*")):
        if file.is_file() and "transformers" in described.flavors and not file.name.startswith("model"):
            run.artifacts.upload(file, TOKENIZER)
    with tempfile.TemporaryDirectory() as place:
        described.save(str(Path(place, "MLmodel")))
        run.artifacts.upload(Path(place, "MLmodel"), MODEL)
    run.log_tags({"mlflow.log-model.history": json.dumps([described.get_tags_dict()])})  # MLflow's page looks there


def _pipeline(model: Path) -> dict[str, Any]:
    """Return the settings with which MLflow loads a text generation pipeline; empty where it can't."""
    if not (model / "config.json").exists():
        return {}
    architectures = read_json(model / "config.json").get("architectures") or [""]
    if not str(architectures[0]).endswith("ForCausalLM"):
        return {}
    file = model / "tokenizer_config.json"
    tokenizer = read_json(file).get("tokenizer_class") if file.exists() else None
    return {
        "task": "text-generation",
        "instance_type": "TextGenerationPipeline",
        "pipeline_model_type": architectures[0],
        "source_model_name": str(model.parent),
        "model_binary": ".",
        "components": ["tokenizer"],
        "tokenizer_type": tokenizer or "PreTrainedTokenizerFast",
    }
