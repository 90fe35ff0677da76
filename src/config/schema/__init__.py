"""What a configuration may hold: a dataclass a group or section, with types, defaults and ranges.

Defaults live in conf/; a field without one here must come from there. Ranges and allowed forms stand in the field's
metadata as a `Check` and are applied by `src.config.gate`. No torch here, so that a refused config costs nothing.
Groups with options of different keys (optimizer, scheduler, tracking) have one dataclass an option, chosen by `type`.
"""

import dataclasses
from dataclasses import dataclass
from enum import Enum
from typing import Any, get_type_hints

from omegaconf import MISSING

from src.config.schema.adapter import AdapterConfig, LoraBias, LoraConfig, NoAdapterConfig, TokensOnlyConfig
from src.config.schema.checks import MOST_INT, Check, Keys
from src.config.schema.data import (
    PLACEHOLDER,
    Batching,
    DataConfig,
    Malformed,
    Overflow,
    Side,
    SourceConfig,
    SupervisedTurns,
    Thoughts,
    ThoughtSchedule,
)
from src.config.schema.deepspeed import WIDTH_SIZES, DeepSpeedConfig, NoDeepSpeedConfig, ZeroConfig, ZeroFileConfig
from src.config.schema.entries import (
    ENTRY_SECTIONS,
    USING_RUNS,
    EnsembleConfig,
    EnsembleMethod,
    ExportEntryConfig,
    PredictConfig,
    ReportConfig,
)
from src.config.schema.fields import later_default
from src.config.schema.generation import GenerationConfig, ThoughtMode
from src.config.schema.model import Attention, Dtype, ModelConfig, ModelType, Weights
from src.config.schema.optimizer import OPTIMIZERS, AdafactorConfig, AdamWConfig, OptimizerConfig, SGDConfig
from src.config.schema.quantization import QuantizationConfig
from src.config.schema.scheduler import SCHEDULES, SchedulerConfig, WarmupScheduleConfig
from src.config.schema.sections import (
    CheckpointConfig,
    Device,
    EvaluationConfig,
    ExportConfig,
    LossConfig,
    MixedPrecision,
    Reduction,
    RuntimeConfig,
    TopLevelConfig,
    TrainingConfig,
)
from src.config.schema.sweep import Direction, EngineName, Pruner, Replicate, Sampler, SweepConfig
from src.config.schema.tokens import InitMethod, TokensConfig
from src.config.schema.tracking import TRACKERS, MlflowConfig, TrackingConfig
from src.metrics import METRICS


@dataclass(kw_only=True)
class RunConfig(TopLevelConfig):
    """A whole configuration, checked. What follows from several keys is a property, never written back."""

    model: ModelConfig
    quantization: QuantizationConfig
    adapter: AdapterConfig
    tokens: TokensConfig
    data: DataConfig
    optimizer: OptimizerConfig
    scheduler: SchedulerConfig
    generation: GenerationConfig
    deepspeed: DeepSpeedConfig
    tracking: TrackingConfig
    training: TrainingConfig
    loss: LossConfig
    evaluation: EvaluationConfig
    checkpoint: CheckpointConfig
    export: ExportConfig
    runtime: RuntimeConfig

    @property
    def lora(self) -> LoraConfig | None:
        """LoRA's settings; None where every weight is trained, or rows of new tokens alone."""
        return self.adapter if isinstance(self.adapter, LoraConfig) else None

    @property
    def thought_tags(self) -> tuple[str, str] | None:
        """What opens and closes a thought in the text that the model writes; None where it writes none."""
        return thought_tags(self.data, self.tokens)

    @property
    def metrics(self) -> list[str]:
        """The metrics that need generated text: evaluation's own, or what the data says."""
        return self.data.metrics if self.evaluation.metrics is None else self.evaluation.metrics

    @property
    def num_scored_samples(self) -> int:
        """How many texts of a row evaluation generates: all samples where a metric takes them, else one."""
        takes_all = any(METRICS[name].takes_samples for name in self.metrics)
        return self.generation.num_return_sequences if takes_all else 1


_BY_TYPE: dict[str, dict[str, type]] = {
    "adapter": {"none": NoAdapterConfig, "lora": LoraConfig, "tokens_only": TokensOnlyConfig},
    "optimizer": OPTIMIZERS,
    "scheduler": SCHEDULES,
    "deepspeed": {"none": NoDeepSpeedConfig, "zero": ZeroConfig, "file": ZeroFileConfig},
    "tracking": TRACKERS,
}
SECTIONS: dict[str, type | dict[str, type]] = {
    name: _BY_TYPE.get(name, hint)
    for name, hint in get_type_hints(RunConfig).items()
    if name not in get_type_hints(TopLevelConfig)
}
"""Section name -> its dataclass, or its dataclasses by the section's `type`."""
LATER_KEYS: dict[str, dict[str, Any]] = {
    name: {
        one.name: default.value if isinstance(default, Enum) else default
        for one in dataclasses.fields(hint)
        if (default := later_default(one)) != MISSING
    }
    for name, hint in get_type_hints(RunConfig).items()
    if name in SECTIONS and isinstance(hint, type)
}
"""Keys by section that an earlier version did not have, each with the value at which all is as without it.

Configurations that were frozen before then have the hash that they had.
"""


def thought_tags(data: DataConfig, tokens: TokensConfig) -> tuple[str, str] | None:
    """Return what opens and closes a thought in completions; without a choice, they are kept where there are tags."""
    if data.thoughts is Thoughts.drop or tokens.thought_open is None or tokens.thought_close is None:
        return None
    return tokens.thought_open, tokens.thought_close
