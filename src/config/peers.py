"""What arguments of other trainers are called here, a table a trainer: hints and docs/coming_from.md are made of it.

Each name has a key of Towline's, or says why there is none. Values that are written otherwise here are told apart from
those that stay as they are. No torch here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from src.config.quoting import shell_override


@dataclass(frozen=True)
class Counterpart:
    """What stands here for an argument of another trainer."""

    key: str = ""
    """A key, or a group whose option is chosen; '' where there is none."""
    values: Mapping[str, str] = field(default_factory=dict)
    """Their values that are written otherwise here, as texts."""
    is_same: bool = False
    """Whether their other values are values of `key` too, where it takes them."""
    is_list: bool = False
    """Whether a text, or texts with commas between them, are a list here."""
    note: str = ""
    """What else differs; or why there is no counterpart."""
    instead_of: Mapping[str, str] = field(default_factory=dict)
    """Choices that it does not go with: GROUP=OPTION, and what to choose in its place."""

    @property
    def is_whole(self) -> bool:
        """Whether a mapping of theirs has no keys that are keys of their own."""
        return not self.is_same and not self.values

    def value(self, given: Any) -> tuple[Any, bool]:
        """Return a value of theirs as it is here, and whether that can be said."""
        text = value_text(given)
        if text in self.values:
            ours = self.values[text]
            return ({"null": None, "true": True, "false": False, "[]": []}.get(ours, ours), True)
        if self.is_list and isinstance(given, str):
            return [part.strip() for part in given.split(",")], self.is_same
        return given, self.is_same


def value_text(value: Any) -> str:
    """Return a value as the tables have it: as in YAML; a list of one as what is in it."""
    if isinstance(value, list) and len(value) == 1:
        return value_text(value[0])
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def _same(
    key: str,
    values: Mapping[str, str] | None = None,
    note: str = "",
    *,
    is_list: bool = False,
    instead_of: Mapping[str, str] | None = None,
) -> Counterpart:
    """Return a key that takes their values, but for those that are named."""
    return Counterpart(key, values or {}, True, is_list, note, instead_of or {})


def _only(
    key: str, values: Mapping[str, str], note: str = "", instead_of: Mapping[str, str] | None = None
) -> Counterpart:
    """Return a key that takes, of their values, those that are named."""
    return Counterpart(key, values, note=note, instead_of=instead_of or {})


def _other(key: str, note: str) -> Counterpart:
    """Return a key whose values mean something else than theirs."""
    return Counterpart(key, note=note)


def _table(known: Mapping[str, Counterpart], none: Mapping[str, str]) -> dict[str, Counterpart]:
    """Return a table of arguments; those without a counterpart come by the reason that completes "because …"."""
    without = {name: Counterpart(note=because) for because, names in none.items() for name in names.split()}
    assert not known.keys() & without.keys()
    return dict(known) | without


def _each(names: str, here: Counterpart) -> dict[str, Counterpart]:
    """Return several arguments that are the same here."""
    return dict.fromkeys(names.split(), here)


def _alike(section: str, names: str) -> dict[str, Counterpart]:
    """Return arguments that are called alike here."""
    return {name: _same(f"{section}.{name}") for name in names.split()}


TINY_MODEL = {"model=tiny_llama": "model=causal_lm"}
"""The default model has random weights, whatever its checkpoint is."""
SUMS = {"data=tow_addition": "data=prompt_completion"}
"""The default data has files of its own, which take the place of a name on the hub."""
NO_ADAPTER = {"adapter=none": "adapter=lora"}
"""Quantised weights are frozen."""
OPTIMIZERS = {
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_apex_fused", "adam"), "adamw"),
    **dict.fromkeys(("adamw_bnb_8bit", "adamw_torch_8bit", "ao_adamw_8bit", "adam8bit"), "adamw_8bit"),
    "paged_adamw": "paged_adamw_32bit",
}
SCHEDULES = {"cosine_with_min_lr": "cosine", "cosine_warmup_with_min_lr": "cosine"}
TRACKERS = {"none": "none", "null": "none", "[]": "none", "mlflow": "mlflow", "all": "mlflow"}
STRATEGIES = {"no": "null", "false": "null", "epoch": "epoch"}
BF16, FP16 = {"true": "bf16", "false": "no"}, {"true": "fp16", "false": "no"}
NF4, INT8 = {"true": "nf4", "false": "none"}, {"true": "int8", "false": "none"}
PACKED, GROUPED = {"true": "packed", "false": "padded"}, {"true": "length_grouped", "false": "padded"}
LORA_OR_NONE = {"true": "lora", "false": "none"}
ALL_LINEAR = {"all": "all-linear", "all_linear": "all-linear"}
FLASH = {"true": "flash_attention_2", "false": "null"}
INVERTED = {"true": "false", "false": "true"}
NO_CLIPPING = {"0": "null", "0.0": "null"}
NO_LIMIT = {"-1": "null", "0": "null"}
LONGEST_NAME = 100
"""Characters of an option that is suggested as something else."""
DATA_FILES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt", ".gz")

ONE_TRACKER = "MLflow is the only tracker, beside the run's own folder"
STEPS = "steps is a number of steps"
IN_ONE_LIST = "both in one list: `optimizer.betas=[0.9,0.999]`"
BY_FOLDER = "files are named one by one, by glob or by folder"
NO_LOADERS = "rows are encoded before the first step and read by memory map, so there are no loader processes"
NO_HUB = "nothing is sent to a hub; `model/` in the run's folder loads with plain from_pretrained"
NO_PREFERENCES = "there is supervised fine-tuning only: no preferences and no rewards"
NO_IMAGES = "models read and write text only"
NO_FSDP = "weights, gradients and optimizer state are sharded by DeepSpeed: `deepspeed=zero3`"
NO_COMPILER = "models are not compiled"
NO_KERNELS = "kernels of other libraries are not used"
NO_METHOD = "this method is not here; adapters are `adapter=lora`, `adapter=dora`, `adapter=rslora`, `adapter=qlora`"
NO_OPTIMIZER = "this optimizer is not here; see `optimizer=adamw` and its neighbours in conf/optimizer"
NO_NOISE = "no noise is added to embeddings"
NO_PROCESS_SETTINGS = "processes are connected as the run needs it"
WHOLE_MODEL = "a model is on one device, or sharded by `deepspeed=zero3`"
ITS_OWN_TOKENIZER = "the tokenizer is the checkpoint's own, as it is"
ITS_OWN_TEMPLATE = "a chat is written by the tokenizer's own chat template; for rows without one `data.prompt_template`"
FORMATS = "a format reads the rows: `data=prompt_completion`, `data=messages` and others in conf/data"
NO_EARLY_STOP = (
    "a run trains as long as `training.num_train_epochs` says; `checkpoint.load_best_model_at_end` exports the best "
    "evaluation's weights"
)
COLUMNS = "which field is which part of a row: `data=prompt_completion data.columns.prompt=question`"
SAFE = "weights are always written as safetensors"

TRAINING_ARGUMENTS = _table(
    {
        "output_dir": _same("hydra.run.dir", note="without it `outputs/<name>/<start>-<uid>`"),
        **_alike(
            "training",
            "per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps num_train_epochs "
            "logging_steps",
        ),
        "max_steps": _same("training.max_train_steps", NO_LIMIT),
        "max_grad_norm": _same("training.max_grad_norm", NO_CLIPPING),
        "bf16": _only("training.mixed_precision", BF16),
        "fp16": _only("training.mixed_precision", FP16),
        "logging_strategy": _other("training.logging_steps", "a number of steps"),
        "learning_rate": _same("optimizer.lr"),
        "optim": _same("optimizer", OPTIMIZERS),
        "weight_decay": _same("optimizer.weight_decay"),
        "adam_beta1": _other("optimizer.betas", IN_ONE_LIST),
        "adam_beta2": _other("optimizer.betas", IN_ONE_LIST),
        "adam_epsilon": _same("optimizer.eps"),
        "lr_scheduler_type": _same("scheduler", SCHEDULES),
        "lr_scheduler_kwargs": _other("scheduler.min_lr_ratio", "of it there is min_lr_rate"),
        "warmup_steps": _same("scheduler.warmup_steps", note="a share of all steps is `scheduler.warmup_ratio`"),
        "label_smoothing_factor": _same("loss.label_smoothing"),
        "gradient_checkpointing": _same("model.gradient_checkpointing"),
        "activation_checkpointing": _same("model.gradient_checkpointing"),
        "report_to": _only("tracking", TRACKERS, ONE_TRACKER),
        "run_name": _same("name"),
        "project": _same("tracking.experiment_name"),
        "eval_strategy": _only("evaluation.eval_steps", STRATEGIES, STEPS),
        "eval_steps": _same("evaluation.eval_steps"),
        "prediction_loss_only": _only("evaluation.metrics", {"true": "[]", "false": "null"}),
        "save_strategy": _only(
            "checkpoint.checkpointing_steps", STRATEGIES, f"{STEPS}; best is `checkpoint.keep_best`, which is on"
        ),
        "save_steps": _same("checkpoint.checkpointing_steps"),
        "save_total_limit": _same("checkpoint.keep_last"),
        "save_only_model": _same("checkpoint.newest_optimizer_only", note="the newest can be resumed nevertheless"),
        "load_best_model_at_end": _same("checkpoint.load_best_model_at_end"),
        "metric_for_best_model": _same(
            "checkpoint.metric_for_best_model",
            {"loss": "eval/validation/loss", "eval_loss": "eval/validation/loss"},
            "a name of metrics.jsonl: eval/<set>/<metric>",
        ),
        "greater_is_better": _same("checkpoint.greater_is_better"),
        "resume_from_checkpoint": _same("checkpoint.resume", {"true": "auto", "false": "never", "null": "auto"}),
        "full_determinism": _same("runtime.deterministic"),
        "use_cpu": _only("runtime.device", {"true": "cpu", "false": "auto"}),
        "seed": _same("seed"),
        "data_seed": _same("seed", note="one seed for everything"),
        "train_sampling_strategy": _only(
            "data.batching",
            {"group_by_length": "length_grouped", "random": "padded"},
            "rows are always shuffled by the seed",
        ),
        "fsdp": _other("deepspeed", f"{NO_FSDP} is nearest to full_shard"),
        "deepspeed": _other(
            "deepspeed",
            "a named option; a JSON of DeepSpeed's is `deepspeed=file deepspeed.config_file=ds_config.json`",
        ),
    },
    {
        "an optimizer's settings are keys of its own: `optimizer.betas`, `optimizer.eps`": "optim_args",
        NO_OPTIMIZER: "optim_target_modules",
        "it is always so: a step's loss is divided by the supervised tokens of all processes": (
            "average_tokens_across_devices"
        ),
        "an evaluation computes as training does, see `training.mixed_precision`": "bf16_full_eval fp16_full_eval",
        "PyTorch's own setting is left as it is": "tf32",
        "checkpointing has one form, without reentrance": (
            "gradient_checkpointing_kwargs activation_checkpointing_kwargs"
        ),
        NO_COMPILER: "torch_compile torch_compile_backend torch_compile_mode",
        NO_KERNELS: "use_liger_kernel liger_kernel_config",
        "it is off while training and on in the exported model": "use_cache",
        NO_NOISE: "neftune_noise_alpha",
        "memory is not handed back between steps": "torch_empty_cache_steps",
        "what fits is said before training: `python -m src.preflight`": "auto_find_batch_size",
        "lines come every `training.logging_steps` steps and at the last one": "logging_first_step",
        "rank 0 writes; what each process prints is in `logs/` of the run's folder": (
            "log_on_each_node log_level log_level_replica save_on_each_node"
        ),
        "a loss that is not finite ends the run and names the rows": "logging_nan_inf_filter",
        "tokens are always counted: tokens_seen in `summary.json`": "include_num_input_tokens_seen",
        "a terminal gets a progress line, a log a line every `training.logging_steps` steps": "disable_tqdm",
        ONE_TRACKER: "trackio_space_id trackio_bucket_id trackio_static_space_id",
        "evaluations begin with the first one that `evaluation.eval_steps` asks for": "eval_delay",
        "before the first step samples are generated, and nothing is evaluated": "eval_on_start",
        "what an evaluation gathers is decided for you": (
            "eval_do_concat_batches eval_use_gather_object eval_accumulation_steps include_for_metrics "
            "batch_eval_metrics"
        ),
        "a signal always has the run saved": "enable_jit_checkpoint",
        NO_HUB: "push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision",
        "a run that was stopped goes on with the rows that come next and with all that it knew": (
            "ignore_data_skip restore_callback_states_from_checkpoint"
        ),
        "how processes share the work is `deepspeed=zero3` and `runtime.num_processes`": (
            "accelerator_config parallelism_config"
        ),
        NO_LOADERS: (
            "dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor "
            "dataloader_multiprocessing_context dataloader_in_order"
        ),
        "every row of an epoch is fed": "dataloader_drop_last",
        "a format names the fields that it reads: `data.columns`": "remove_unused_columns label_names",
        "lengths are known once rows are encoded": "length_column_name",
        NO_PROCESS_SETTINGS: (
            "ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend "
            "ddp_timeout local_rank"
        ),
        NO_FSDP: "fsdp_config",
        "a loss or gradient that is not finite ends the run by name; to try a run out there is `debug=smoke`": "debug",
        "peak memory is always in `summary.json`": "skip_memory_metrics",
        "`python -m src.run` trains and evaluates, `python -m src.predict` generates": "do_train do_eval do_predict",
    },
)
"""TrainingArguments of transformers 5.23."""

TRAINING_ARGUMENTS_BEFORE = _table(
    {
        "evaluation_strategy": TRAINING_ARGUMENTS["eval_strategy"],
        "warmup_ratio": _same("scheduler.warmup_ratio"),
        "group_by_length": _only("data.batching", GROUPED),
        "per_gpu_train_batch_size": _same("training.per_device_train_batch_size"),
        "per_gpu_eval_batch_size": _same("training.per_device_eval_batch_size"),
        "overwrite_output_dir": _same("force"),
        "no_cuda": TRAINING_ARGUMENTS["use_cpu"],
        "adafactor": _only("optimizer", {"true": "adafactor"}),
        "half_precision_backend": _other("training.mixed_precision", "PyTorch's own"),
        "predict_with_generate": _only(
            "evaluation.metrics", {"false": "[]", "true": "null"}, "metrics of generated text are `data.metrics`"
        ),
        "generation_max_length": _same("generation.max_new_tokens", note="without the prompt"),
        "generation_num_beams": _same("generation.num_beams"),
    },
    {
        SAFE: "save_safetensors",
        "a run's folder holds its journals, and MLflow mirrors them": "logging_dir",
        "mixed precision is PyTorch's own: `training.mixed_precision`": "fp16_opt_level fp16_backend",
        NO_COMPILER: "torchdynamo jit_mode_eval",
        "such a device was never tried here": "use_mps_device use_ipex tpu_num_cores xpu_backend",
        NO_HUB: "push_to_hub_model_id push_to_hub_organization push_to_hub_token",
        "metrics are named: `evaluation.metrics`": "include_inputs_for_metrics",
        "speed is always measured: `perf/tokens_per_second` in metrics.jsonl": "include_tokens_per_second",
        "how processes share the work is decided for you": "split_batches dispatch_batches past_index sortish_sampler",
        NO_FSDP: "fsdp_min_num_params fsdp_transformer_layer_cls_to_wrap",
    },
)
"""Names that TrainingArguments and Seq2SeqTrainingArguments had in transformers 4."""

TRL = _table(
    {
        "max_length": _same("data.max_seq_length", note="an encoder-decoder's completion is `data.max_target_length`"),
        "max_seq_length": _same("data.max_seq_length"),
        "truncation_mode": _only("data.overflow", {"keep_start": "truncate", "keep_end": "truncate_prompt"}),
        "packing": _only("data.batching", PACKED),
        "dataset_num_proc": _same("data.preprocessing_num_workers"),
        "dataset_text_field": _other("data.columns", "`data=text data.columns.text=content`"),
        "pad_to_multiple_of": _other(
            "tokens.pad_to_multiple_of",
            "rows of the embedding matrix; a batch is as long as its longest row",
        ),
        "model_init_kwargs": _other("model.dtype", "and the other keys of `model`"),
        "trust_remote_code": _same("model.trust_remote_code"),
        "model_name_or_path": _same("model.checkpoint", instead_of=TINY_MODEL),
        "model_revision": _same("model.revision"),
        "dtype": _same("model.dtype"),
        "torch_dtype": _same("model.dtype"),
        "attn_implementation": _same("model.attn_implementation"),
        "use_peft": _only("adapter", LORA_OR_NONE),
        "lora_r": _same("adapter.r"),
        "lora_target_modules": _same("adapter.target_modules", ALL_LINEAR, is_list=True),
        **_alike("adapter", "lora_alpha lora_dropout use_rslora use_dora"),
        "load_in_8bit": _only("quantization", INT8, instead_of=NO_ADAPTER),
        "load_in_4bit": _only("quantization", NF4, instead_of=NO_ADAPTER),
        "bnb_4bit_quant_type": _same("quantization.bnb_4bit_quant_type"),
        "use_bnb_nested_quant": _same("quantization.bnb_4bit_use_double_quant"),
        "dataset_name": _same("data.dataset_name", instead_of=SUMS),
        "dataset_config": _same("data.dataset_config_name"),
        "dataset_train_split": _same("data.train_split"),
        "dataset_test_split": _same("data.validation_split"),
        "dataset_streaming": _same("data.streaming"),
    },
    {
        "the loss is the cross-entropy of the supervised tokens": "loss_type router_aux_loss_coef",
        ITS_OWN_TEMPLATE: "chat_template_path",
        FORMATS: "dataset_kwargs formatting_func",
        ITS_OWN_TOKENIZER: "eos_token pad_token",
        "rows are always shuffled by the seed": "shuffle_dataset",
        "rows are packed best fit decreasing": "packing_strategy",
        "packed rows have no padding with `model.attn_implementation=flash_attention_2`": "padding_free",
        "rows of an evaluation are not packed": "eval_packing",
        "of a pair the completion is learned and nothing else; `data=text` learns all": "completion_only_loss",
        "of a chat what the assistant says is learned; see `data.supervised_turns`": "assistant_only_loss",
        "activations are recomputed, not moved away: `model.gradient_checkpointing`": "activation_offloading",
        "every linear layer is adapted, or those that `adapter.target_modules` names": "lora_target_parameters",
        "the rows of new tokens are trained under an adapter by themselves": "lora_modules_to_save",
        "it follows from `model.type`": "lora_task_type",
        "quantised weights are stored as bitsandbytes does": "bnb_4bit_quant_storage",
        NO_PROCESS_SETTINGS: "ignore_bias_buffers",
        NO_KERNELS: "use_liger",
        "rows are encoded in chunks of their own": "dataset_batch_size num_of_sequences chars_per_token",
    },
)
"""Of SFTConfig, and of ModelConfig and ScriptArguments of TRL's own script."""

AXOLOTL = _table(
    {
        "base_model": _same("model.checkpoint", instead_of=TINY_MODEL),
        "model_type": _only("model", {"AutoModelForCausalLM": "causal_lm", "AutoModelForSeq2SeqLM": "encoder_decoder"}),
        "revision_of_model": _same("model.revision"),
        "trust_remote_code": _same("model.trust_remote_code"),
        "flash_attention": _only("model.attn_implementation", FLASH),
        "sdp_attention": _only("model.attn_implementation", {"true": "sdpa", "false": "null"}),
        "eager_attention": _only("model.attn_implementation", {"true": "eager", "false": "null"}),
        "bfloat16": _only("model.dtype", {"true": "bfloat16", "false": "float32"}),
        "float16": _only("model.dtype", {"true": "float16", "false": "float32"}),
        "float32": _only("model.dtype", {"true": "float32"}),
        "adapter": _same("adapter", {"null": "none"}),
        "lora_model_dir": _same("init_from"),
        "lora_r": TRL["lora_r"],
        "lora_target_modules": TRL["lora_target_modules"],
        "lora_target_linear": _only("adapter.target_modules", {"true": "all-linear"}),
        **_alike("adapter", "lora_alpha lora_dropout"),
        "peft_layers_to_transform": _same("adapter.layers_to_transform"),
        "peft_use_dora": _same("adapter.use_dora"),
        "peft_use_rslora": _same("adapter.use_rslora"),
        "peft_init_lora_weights": _same("adapter.init_lora_weights"),
        "merge_lora": _same("export.merge"),
        "load_in_8bit": TRL["load_in_8bit"],
        "load_in_4bit": TRL["load_in_4bit"],
        "bnb_config_kwargs": _other("quantization.bnb_4bit_quant_type", "and the other keys of `quantization`"),
        "datasets": _other(
            "data.train_files",
            "`data.train_files=[data/tow_addition]` and `data=prompt_completion`, `data=messages`, …; several with "
            "settings of their own are `data.mixture`",
        ),
        "test_datasets": _other("data.validation_files", "a list of files, or a mapping from a set's name to files"),
        "pretraining_dataset": _other(
            "data.streaming", "`data=text` reads plain text, `data.streaming=true` as it comes"
        ),
        "dataset_processes": _same("data.preprocessing_num_workers"),
        "dataset_num_proc": _same("data.preprocessing_num_workers"),
        "dataset_prepared_path": _same("data.cache_dir"),
        "val_set_size": _same("data.validation_fraction", note="a share"),
        "sequence_len": _same("data.max_seq_length"),
        "excess_length_strategy": _only("data.overflow", {"drop": "drop", "truncate": "truncate", "raise": "error"}),
        "sample_packing": _only("data.batching", PACKED),
        "group_by_length": TRAINING_ARGUMENTS_BEFORE["group_by_length"],
        "default_system_message": _same("data.system_prompt"),
        "tokens": _other("tokens", "`tokens.additional_special_tokens`, a list; or an option of conf/tokens"),
        "plugins": _other("plugins", "modules that register metrics, optimizers, formats and trackers of your own"),
        "special_tokens": _other(
            "tokens.additional_special_tokens", "a list; BOS, EOS and pad are the checkpoint's own"
        ),
        "micro_batch_size": _same("training.per_device_train_batch_size"),
        "eval_batch_size": _same("training.per_device_eval_batch_size"),
        "batch_size": _other(
            "training.per_device_train_batch_size", "times `training.gradient_accumulation_steps`, times processes"
        ),
        "num_epochs": _same("training.num_train_epochs"),
        "optimizer": _same("optimizer", OPTIMIZERS),
        "embedding_lr": _same("optimizer.embedding_lr"),
        "lr_scheduler": _same("scheduler", SCHEDULES),
        "cosine_min_lr_ratio": _same("scheduler.min_lr_ratio"),
        "evals_per_epoch": _other("evaluation.eval_steps", "a number of steps, or epoch"),
        "saves_per_epoch": _other("checkpoint.checkpointing_steps", "a number of steps, or epoch"),
        "eval_max_new_tokens": _same("generation.max_new_tokens"),
        "eval_table_size": _same("evaluation.sample_prompts"),
        "do_causal_lm_eval": _only("evaluation.metrics", {"false": "[]", "true": "null"}),
        "eval_causal_lm_metrics": _other("evaluation.metrics", "exact_match, rouge1, rouge2, rougeL, chrf, bleu"),
        "auto_resume_from_checkpoints": _only("checkpoint.resume", {"true": "auto", "false": "never"}),
        "device": _same("runtime.device", {"cuda:0": "cuda", "gpu": "cuda"}),
        "world_size": _same("runtime.num_processes"),
        "use_mlflow": _only("tracking", {"true": "mlflow", "false": "none"}),
        "mlflow_tracking_uri": _same("tracking.uri"),
        "mlflow_experiment_name": _same("tracking.experiment_name"),
        "mlflow_run_name": _same("tracking.run_name"),
        "hf_mlflow_log_artifacts": _same("tracking.log_model"),
        "use_wandb": _only("tracking", {"false": "none"}, ONE_TRACKER),
        "wandb_project": _same("tracking.experiment_name", note=ONE_TRACKER),
        "wandb_name": _same("tracking.run_name", note=ONE_TRACKER),
        "dataset_exact_deduplication": Counterpart(note="rows are taken as they are; equal ones stay"),
    },
    {
        "the configuration comes with the checkpoint": (
            "base_model_config cls_model_config model_config overrides_of_model_config overrides_of_model_kwargs "
            "is_falcon_derived_model is_llama_derived_model is_mistral_derived_model is_qwen_derived_model"
        ),
        ITS_OWN_TOKENIZER: (
            "tokenizer_config tokenizer_type tokenizer_use_fast tokenizer_legacy tokenizer_use_mistral_common "
            "tokenizer_save_jinja_files added_tokens_overrides processor_type eot_tokens"
        ),
        "rows are added for new tokens, up to a multiple of `tokens.pad_to_multiple_of`": (
            "resize_token_embeddings_to_32x shrink_embeddings embeddings_skip_upcast"
        ),
        "how new rows start is `tokens.init.method`": "mean_resizing_embeddings",
        "tokens that a checkpoint never learned are found and started as new ones": "fix_untrained_tokens",
        WHOLE_MODEL: "device_map max_memory gpu_memory_limit low_cpu_mem_usage lora_on_cpu ddp",
        NO_KERNELS: (
            "xformers_attention flex_attention s2_attention flash_attn_cross_entropy flash_attn_rms_norm "
            "flash_attn_fuse_qkv flash_attn_fuse_mlp flash_optimum unsloth_cross_entropy_loss unsloth_lora_mlp "
            "unsloth_lora_qkv unsloth_lora_o unsloth_rms_norm unsloth_rope lora_mlp_kernel lora_qkv_kernel "
            "lora_o_kernel use_kernels liger_rope liger_rms_norm liger_glu_activation liger_layer_norm "
            "liger_fused_linear_cross_entropy flex_attn_compile_kwargs"
        ),
        "positions are the model's own": "rope_scaling use_pose pose_split_on_token_ids pose_max_context_len",
        "every linear layer is adapted, or those that `adapter.target_modules` names": (
            "lora_target_parameters peft_layers_pattern unfrozen_parameters"
        ),
        "the rows of new tokens are trained under an adapter by themselves": (
            "lora_modules_to_save peft_trainable_token_indices"
        ),
        "PEFT decides it": (
            "lora_fan_in_fan_out peft_autocast_adapter_dtype peft_ensure_weight_tying peft_layer_replication"
        ),
        NO_METHOD: (
            "relora relora_steps relora_prune_ratio relora_cpu_offload loraplus_lr_ratio loraplus_lr_embedding "
            "loftq_config lisa_n_layers lisa_step_interval lisa_layers_attribute qlora_sharded_model_loading"
        ),
        "quantisation is bitsandbytes', see `quantization=nf4` and `quantization=int8`": (
            "gptq gptq_disable_exllama qat model_quantization_config fp8"
        ),
        NO_PREFERENCES: (
            "rl trl vllm reward_model process_reward_model num_labels dpo_beta dpo_use_weighting rl_beta orpo_alpha "
            "rpo_alpha simpo_gamma cpo_alpha kto_desirable_weight kto_undesirable_weight max_prompt_len"
        ),
        "rows are always shuffled by the seed": "shuffle_merged_datasets curriculum_sampling",
        "rows are prepared once and used again: `data.cache_dir`": "skip_prepare_dataset push_dataset_to_hub",
        "sources are taken whole, or `data.limit` rows of each": "dataset_shard_num dataset_shard_idx",
        "rows are read by memory map": "dataset_keep_in_memory",
        "a row is kept whatever its length; only too long ones are cut or dropped": "min_sample_len",
        "a batch is as long as its longest row": "pad_to_sequence_len",
        "packing has no settings: best fit decreasing over all rows": (
            "sample_packing_group_size sample_packing_bin_size sample_packing_sequentially sample_packing_eff_est "
            "eval_sample_packing multipack_real_batches pretraining_sample_concatenation batch_flattening "
            "pretrain_multipack_buffer_size pretrain_multipack_attn max_packed_sequence_len"
        ),
        "prompts are not learned; `data=text` learns all": "train_on_inputs",
        "of a chat what the assistant says is learned, with what ends its turn; see `data.supervised_turns`": (
            "roles_to_train train_on_eos"
        ),
        ITS_OWN_TEMPLATE: "chat_template chat_template_jinja conversation",
        COLUMNS: (
            "field_messages field_system field_instruction field_input field_output message_field_role "
            "message_field_content message_property_mappings"
        ),
        NO_OPTIMIZER: "torchdistx_path lr_groups lr_quadratic_warmup lr_div_factor cosine_constant_lr_ratio",
        "the new rows' rate is a number, `optimizer.embedding_lr`": "embedding_lr_scale",
        "AdamW has two betas and one epsilon": "adam_beta3 adam_epsilon2",
        "a loss that is not finite ends the run; a limit for it is not here": (
            "loss_watchdog_threshold loss_watchdog_patience"
        ),
        NO_EARLY_STOP: "early_stopping_patience",
        "memory is not handed back between steps": "gc_steps",
        "metrics are those of `evaluation.metrics`": "do_bench_eval bench_dataset bench_split",
        NO_HUB: "hf_use_auth_token",
        ONE_TRACKER: (
            "use_tensorboard wandb_entity wandb_watch wandb_run_id wandb_mode wandb_log_model use_comet "
            "comet_api_key comet_workspace comet_project_name"
        ),
        "a step's time is in metrics.jsonl, and nothing is profiled": "profiler_steps",
        NO_FSDP: "fsdp_final_state_dict_type fsdp_version",
        "a sequence is on one device": (
            "sequence_parallel_degree context_parallel_size tensor_parallel_size heads_k_stride ring_attn_func"
        ),
        "sweeps have trials of their own: `python -m src.run -m`": "use_ray ray_run_name ray_num_workers",
        "there is no page to chat on": "gradio_title gradio_share gradio_server_name gradio_server_port",
        "every key is checked always": "strict",
        NO_NOISE: "noisy_embedding_alpha",
        "no experts' layers are changed": "llama4_linearized_experts",
    },
)
"""Of axolotl's YAML. It also takes most names of TrainingArguments."""

LLAMA_FACTORY = _table(
    {
        "model_name_or_path": _same("model.checkpoint", instead_of=TINY_MODEL),
        "model_revision": _same("model.revision"),
        "trust_remote_code": _same("model.trust_remote_code"),
        "train_from_scratch": _only("model.weights", {"true": "random", "false": "pretrained"}),
        "flash_attn": _only(
            "model.attn_implementation",
            {"auto": "null", "disabled": "eager", "sdpa": "sdpa", "fa2": "flash_attention_2"},
        ),
        "disable_gradient_checkpointing": _only("model.gradient_checkpointing", INVERTED),
        "pure_bf16": _only("model.dtype", {"true": "bfloat16"}, "and `training.mixed_precision=no`"),
        "infer_dtype": _same("model.dtype", note="of `python -m src.predict`"),
        "adapter_name_or_path": _same("init_from"),
        "finetuning_type": _only("adapter", {"lora": "lora", "full": "none"}, NO_METHOD),
        "lora_rank": _same("adapter.r"),
        "lora_target": _same("adapter.target_modules", ALL_LINEAR, is_list=True),
        **_alike("adapter", "lora_alpha lora_dropout use_rslora use_dora"),
        "pissa_init": _only("adapter.init_lora_weights", {"true": "pissa", "false": "true"}),
        "quantization_bit": _only("quantization", {"4": "nf4", "8": "int8", "null": "none"}, instead_of=NO_ADAPTER),
        "quantization_type": _same("quantization.bnb_4bit_quant_type"),
        "double_quantization": _same("quantization.bnb_4bit_use_double_quant"),
        "quantization_method": _other("quantization", "bitsandbytes' only"),
        "dataset": _other(
            "data.train_files",
            "`data.train_files=[data/tow_addition]`, or `data.dataset_name`; several are `data.mixture`",
        ),
        "eval_dataset": _other("data.validation_files", "a list of files, or a mapping from a set's name to files"),
        "dataset_dir": _other("data.train_files", BY_FOLDER),
        "cutoff_len": _same("data.max_seq_length"),
        "mask_history": _only("data.supervised_turns", {"true": "last", "false": "all"}),
        "streaming": _same("data.streaming"),
        "mix_strategy": _other("data.mixture", "by weight no row comes twice, by count as often as it takes"),
        "interleave_probs": _other("data.mixture", "a weight for each source"),
        "preprocessing_num_workers": _same("data.preprocessing_num_workers"),
        "max_samples": _same("data.limit", note="rows of an evaluation are `evaluation.max_samples`"),
        "val_size": _same("data.validation_fraction", note="a share"),
        "packing": _only("data.batching", PACKED),
        "neat_packing": _only("data.batching", PACKED, "rows in one sequence never see each other"),
        "tokenized_path": _same("data.cache_dir"),
        "default_system": _same("data.system_prompt"),
        "system_message": _same("data.system_prompt"),
        "template": _other("data.prompt_template", f"for rows that are no chats; {ITS_OWN_TEMPLATE.partition(';')[0]}"),
        "enable_thinking": _only("data.thoughts", {"true": "keep", "false": "drop"}),
        "add_tokens": _same("tokens.additional_special_tokens", is_list=True),
        "add_special_tokens": _same("tokens.additional_special_tokens", is_list=True),
        "new_special_tokens_config": _other(
            "tokens.init.descriptions",
            "a mapping from a token to its description, with `tokens.init.method=description`",
        ),
        "init_special_tokens": _only(
            "tokens.init.method",
            {"noise_init": "mean", "desc_init": "description", "desc_init_w_noise": "description"},
        ),
        "include_effective_tokens_per_second": Counterpart(note="`perf/tokens_per_second` is always measured"),
        "eval_num_beams": _same("generation.num_beams"),
        **_alike("generation", "do_sample temperature top_p top_k num_beams max_new_tokens repetition_penalty"),
        "export_dir": _other("export.merge", "the result is always in `model/` of the run's folder"),
    },
    {
        "`python -m src.run` is supervised fine-tuning; `data=text` is continued pretraining": "stage",
        NO_PREFERENCES: (
            "pref_beta pref_ftx pref_loss pref_bco_weight dpo_label_smoothing kto_chosen_weight kto_rejected_weight "
            "simpo_gamma ppo_buffer_size ppo_epochs ppo_score_norm ppo_target ppo_whiten_rewards ref_model "
            "ref_model_adapters ref_model_quantization_bit reward_model reward_model_adapters "
            "reward_model_quantization_bit reward_model_type ld_alpha ranking"
        ),
        NO_METHOD: (
            "freeze_trainable_layers freeze_trainable_modules freeze_extra_modules use_llama_pro oft_rank "
            "oft_block_size oft_target module_dropout loraplus_lr_ratio loraplus_lr_embedding mixture_of_depths"
        ),
        NO_OPTIMIZER: (
            "use_galore galore_target galore_rank galore_update_interval galore_scale galore_proj_type "
            "galore_layerwise use_apollo apollo_target apollo_rank apollo_update_interval apollo_scale use_badam "
            "badam_mode badam_switch_mode badam_switch_interval badam_update_ratio use_adam_mini use_muon"
        ),
        "the rows of new tokens are trained under an adapter by themselves": "additional_target",
        "an adapter is new unless `init_from` names one": "create_new_adapter adapter_folder",
        "PiSSA is computed exactly, and kept with the base that it changed": "pissa_iter pissa_convert",
        "prompts are not learned; `data=text` learns all": "train_on_prompt",
        "padding is never learned": "ignore_pad_token_for_loss",
        "the loss is the cross-entropy of the supervised tokens": "use_dft_loss moe_aux_loss_coef",
        "rows are always shuffled by the seed": "disable_shuffling buffer_size",
        "rows are prepared anew where anything of them has changed: `data.cache_dir`": "overwrite_cache",
        "rows are encoded in chunks of their own": "preprocessing_batch_size",
        "each set is evaluated by itself always": "eval_on_each_dataset",
        "rows with tools are refused": "tool_format",
        NO_IMAGES: (
            "media_dir freeze_vision_tower freeze_multi_modal_projector freeze_language_model image_max_pixels "
            "image_min_pixels video_max_pixels video_min_pixels video_fps video_maxlen audio_sampling_rate"
        ),
        ITS_OWN_TOKENIZER: "use_fast_tokenizer split_special_tokens",
        "the matrices grow by the rows that new tokens need": "resize_vocab",
        "models and rows are kept where Hugging Face's libraries do (HF_HOME)": "cache_dir",
        WHOLE_MODEL: "low_cpu_mem_usage offload_folder quantization_device_map",
        "positions are the model's own": "rope_scaling",
        NO_KERNELS: "shift_attn use_unsloth use_unsloth_gc enable_liger_kernel use_v1_kernels use_mca",
        "checkpointing has one form, without reentrance": "use_reentrant_gc",
        "what a model computes in is `model.dtype` and `training.mixed_precision`": (
            "upcast_layernorm upcast_lmhead_output fp8 fp8_backend"
        ),
        "`python -m src.predict` generates with this library's own model": (
            "infer_backend vllm_maxlen vllm_gpu_util use_kv_cache"
        ),
        "hubs are reached as Hugging Face's libraries do (HF_TOKEN)": "hf_hub_token ms_hub_token om_hub_token",
        "what was assembled is printed by every run": "print_param_status",
        "weights are exported whole, as they were trained": (
            "export_size export_device export_quantization_bit export_quantization_dataset export_legacy_format "
            "export_hub_model_id"
        ),
        "accuracy of single tokens is no metric here; see `evaluation.metrics`": "compute_accuracy",
        NO_EARLY_STOP: "early_stopping_steps",
        "MLflow draws the curves: `make ui`": "plot_loss",
        "generation has no such setting": "length_penalty skip_special_tokens",
        ONE_TRACKER: "use_swanlab swanlab_project swanlab_run_name swanlab_workspace swanlab_mode swanlab_api_key",
        "sweeps have trials of their own: `python -m src.run -m`": "ray_run_name ray_num_workers",
    },
)
"""Of LLaMA-Factory's YAML. It also takes every name of TrainingArguments and Seq2SeqTrainingArguments."""

ELSEWHERE = _table(
    {
        **_each("lr learning_rates", _same("optimizer.lr")),
        **_each("wd decay", _same("optimizer.weight_decay")),
        **_each("epochs n_epochs max_epochs", _same("training.num_train_epochs")),
        **_each("steps num_steps max_iters num_training_steps", _same("training.max_train_steps", NO_LIMIT)),
        **_each("bs batch train_batch_size", _same("training.per_device_train_batch_size")),
        "val_batch_size": _same("training.per_device_eval_batch_size"),
        **_each(
            "grad_accum grad_accum_steps accumulation_steps accumulate_grad_batches gradient_accumulation",
            _same("training.gradient_accumulation_steps"),
        ),
        **_each(
            "gradient_clip_val gradient_clipping grad_clip clip_grad_norm max_norm",
            _same("training.max_grad_norm", NO_CLIPPING),
        ),
        "precision": _only(
            "training.mixed_precision",
            {"32": "no", "32-true": "no", "16": "fp16", "16-mixed": "fp16", "bf16": "bf16", "bf16-mixed": "bf16"},
        ),
        **_each("log_interval log_every log_every_n_steps log_steps", _same("training.logging_steps")),
        "max_time": _other("training.max_seconds", "in seconds"),
        **_each("eval_interval eval_every eval_freq val_check_interval", _same("evaluation.eval_steps")),
        "max_eval_samples": _same("evaluation.max_samples"),
        **_each(
            "save_interval save_every save_freq checkpoint_steps checkpoint_every",
            _same("checkpoint.checkpointing_steps"),
        ),
        **_each("save_top_k keep_checkpoints", _same("checkpoint.keep_best")),
        "resume": _same("checkpoint.resume", {"true": "auto", "false": "never"}),
        "ckpt_path": _same("checkpoint.resume"),
        "monitor": _other("checkpoint.metric_for_best_model", "a name of metrics.jsonl: eval/<set>/<metric>"),
        **_each("warmup num_warmup_steps warmup_iters", _same("scheduler.warmup_steps")),
        **_each("schedule lr_schedule lr_scheduler_name", _same("scheduler", SCHEDULES)),
        "min_lr": _other("scheduler.min_lr_ratio", "a share of the peak"),
        **_each(
            "max_len seq_len seq_length block_size context_length model_max_length max_tokens",
            _same("data.max_seq_length"),
        ),
        "max_source_length": _same("data.max_seq_length", note="the prompt of an encoder-decoder"),
        **_each("train_file train_data train_path", _same("data.train_files", is_list=True, instead_of=SUMS)),
        **_each("validation_file val_file eval_file val_data eval_data", _same("data.validation_files", is_list=True)),
        "test_file": _same("data.test_files", is_list=True),
        "max_train_samples": _same("data.limit"),
        **_each("val_split validation_split_percentage test_size", _other("data.validation_fraction", "a share")),
        "kfold": _same("data.num_folds"),
        **_each(
            "model_name model_id model_path checkpoint_path pretrained_model_name_or_path",
            _same("model.checkpoint", instead_of=TINY_MODEL),
        ),
        **_each("use_flash_attention_2 use_flash_attn", _only("model.attn_implementation", FLASH)),
        **_each("grad_checkpointing use_gradient_checkpointing", _same("model.gradient_checkpointing")),
        **_each("lora use_lora", _only("adapter", LORA_OR_NONE)),
        "use_qlora": _only("adapter", {"true": "qlora", "false": "none"}),
        "rank": _same("adapter.r"),
        "target_modules": _same("adapter.target_modules", ALL_LINEAR, is_list=True),
        **_each("new_tokens special_tokens_to_add", _same("tokens.additional_special_tokens", is_list=True)),
        "accelerator": _same("runtime.device", {"gpu": "cuda"}),
        **_each("devices num_devices num_gpus gpus n_gpu nproc_per_node", _same("runtime.num_processes")),
        **_each("num_nodes nnodes", _same("runtime.num_machines")),
        "node_rank": _same("runtime.machine_rank"),
        "master_addr": _same("runtime.main_process_ip"),
        "master_port": _same("runtime.main_process_port"),
        **_each("output out_dir output_path save_dir default_root_dir", _same("hydra.run.dir")),
        **_each("random_seed random_state", _same("seed")),
        **_each("exp_name experiment_id", _same("name")),
        "project_name": _same("tracking.experiment_name"),
        "tracking_uri": _same("tracking.uri"),
        "logger": _only("tracking", TRACKERS, ONE_TRACKER),
    },
    {
        "the rows of new tokens are trained under an adapter by themselves": "modules_to_save trainable_token_indices",
        "it follows from `model.type`": "task_type peft_type",
        "PEFT decides it": "fan_in_fan_out inference_mode layers_pattern lora_bias",
        NO_EARLY_STOP: "early_stopping patience early_stopping_threshold",
        "quantised weights are stored as bitsandbytes does": "llm_int8_threshold llm_int8_skip_modules",
        NO_LOADERS: "num_workers pin_memory",
        ITS_OWN_TOKENIZER: "tokenizer tokenizer_name padding_side",
        "every weight decays but norms and biases": "no_decay",
        "`debug=smoke` tries every part in four steps": "fast_dev_run",
    },
)
"""Short names, and those of PEFT, bitsandbytes, Lightning and the field's scripts."""


@dataclass(frozen=True)
class Peer:
    """Another trainer: its title and what is said of it in docs/coming_from.md, and its table."""

    title: str
    about: str
    table: Mapping[str, Counterpart]


PEERS = (
    Peer("transformers", "`TrainingArguments` of transformers 5.23.", TRAINING_ARGUMENTS),
    Peer(
        "transformers 4",
        "What `TrainingArguments` and `Seq2SeqTrainingArguments` had before.",
        TRAINING_ARGUMENTS_BEFORE,
    ),
    Peer(
        "TRL",
        "`SFTConfig`, and `ModelConfig` and `ScriptArguments` of the command `trl sft`. `SFTConfig` has all names of "
        "`TrainingArguments` besides.",
        TRL,
    ),
    Peer("LLaMA-Factory", "It takes all names of `TrainingArguments` besides.", LLAMA_FACTORY),
    Peer("axolotl", "It takes most names of `TrainingArguments` besides.", AXOLOTL),
    Peer("Elsewhere", "Of PEFT, bitsandbytes, Lightning and the field's scripts, and short names.", ELSEWHERE),
)
"""In the order in which a name is looked up."""


def find(name: str) -> Iterator[tuple[Peer, Counterpart]]:
    """Yield every trainer that has an argument of that name, however its words are joined, and what it is here."""
    wanted = _joined(name)
    for peer in PEERS:
        for theirs, here in peer.table.items():
            if _joined(theirs) == wanted:
                yield peer, here


def options_of(group: str) -> dict[str, str]:
    """Return what other trainers call the options of a group, each with the option's name; no switches."""
    found: dict[str, set[str]] = {}
    for here in (here for peer in PEERS for here in peer.table.values() if here.key == group):
        for theirs, ours in here.values.items():
            found.setdefault(theirs, set()).add(ours)
    return {theirs: ours.pop() for theirs, ours in found.items() if len(ours) == 1 and theirs not in INVERTED}


def option_hint(group: str, given: str, near: str = "") -> str:
    """Return what to choose in place of an option that a group does not have; '' where that can't be said.

    Args:
        near: an option of a similar name, '' for none.
    """
    ours = options_of(group)
    if better := ours.get(given) or ours.get(given.lower()):
        return f"; did you mean {group}={better}?"
    remedy = ""
    if len(given) > LONGEST_NAME:
        return ""
    if group == "deepspeed" and given.lower().endswith(".json"):
        remedy = f"deepspeed=file {shell_override('deepspeed.config_file', given)}"
    elif group == "model" and ("/" in given or not near):
        remedy = f"model=causal_lm {shell_override('model.checkpoint', given)}"
    elif group == "data" and given.lower().endswith(DATA_FILES):
        remedy = f"data=prompt_completion {shell_override('data.train_files', [given])}"
    elif group == "data" and ("/" in given or not near):
        remedy = f"data=prompt_completion {shell_override('data.dataset_name', given)}"
    if remedy or near:
        return f"; did you mean {remedy or near}?"
    return f"; {ONE_TRACKER}" if group == "tracking" else ""


def flag_hint(message: str) -> str:
    """Return what to write in place of the flags that a message of argparse's names; '' where it names none."""
    if found := re.search(r"argument (--\w+).*: ignored explicit argument (.*)", message):
        topic = f": --help {found[2].strip(chr(39))}" if found[1] == "--help" else ""
        return f"; there is no = behind {found[1]}{topic}"
    given = re.findall(r"(?<!\S)--([\w.-]+)", message) if message.startswith("unrecognized arguments") else []
    written = {next((here.key for _, here in find(name) if here.key), name) for name in given}
    return (
        f"; keys are written without dashes: {' '.join(f'{key}=VALUE' for key in sorted(written))}" if written else ""
    )


def names() -> dict[str, str]:
    """Return every name of the tables, by itself and with its words joined."""
    return {_joined(name): name for peer in PEERS for name in peer.table}


def _joined(name: str) -> str:
    """Return a name without what joins its words and without capitals: learningRate and learning-rate are one."""
    return name.lstrip("-").replace("_", "").replace("-", "").lower()
