"""Rules across sections."""

from src.config import schema
from src.config.problems import Problem
from src.config.rules.data import sources
from src.config.rules.rule import Problems, applies_to
from src.config.schema.fields import GENERATING, READING_ROWS
from src.metrics import METRICS


@applies_to("run")
def streaming_can_work(data: schema.DataConfig, training: schema.TrainingConfig) -> Problems:
    if not data.streaming:
        return
    if training.max_train_steps is None:
        reason = "needed with data.streaming: the number of rows is unknown"
        yield Problem("training.max_train_steps", reason, None)
    if data.held_out_fraction:
        reason = "can't hold out rows of a stream; give data.validation_files, or set this to 0"
        yield Problem("data.validation_fraction", reason, data.validation_fraction)
    for name, given in (data.mixture or {}).items():
        if given.get("weight") is None and given.get("count") is None:
            yield Problem(f"data.mixture.{name}", "a streamed source needs a weight or a count", given)


@applies_to("run")
def what_is_sharded_is_not_compiled(runtime: schema.RuntimeConfig, deepspeed: schema.DeepSpeedConfig) -> Problems:
    if runtime.compile and deepspeed.stage == 3:
        yield Problem(
            "runtime.compile", "ZeRO-3 gathers weights as it goes, which can't be compiled; deepspeed=zero2", True
        )


@applies_to("run")
def budgets_hold_a_row(data: schema.DataConfig, training: schema.TrainingConfig, model: schema.ModelConfig) -> Problems:
    budget, longest = training.per_device_train_tokens, data.max_seq_length
    has_target = model.type is schema.ModelType.encoder_decoder
    if budget is not None and budget < (longest := longest + has_target * data.max_target_length):
        keys = "data.max_seq_length + data.max_target_length" if has_target else "data.max_seq_length"
        yield Problem("training.per_device_train_tokens", f"at least {keys}, so that a row fits: {longest:,}", budget)


@applies_to("run", *READING_ROWS)
def encoder_decoders_take_pairs(data: schema.DataConfig, model: schema.ModelConfig) -> Problems:
    if model.type is not schema.ModelType.encoder_decoder:
        return
    if data.batching is schema.Batching.packed:
        yield Problem("data.batching", "an encoder-decoder takes padded or length_grouped (or auto)", "packed")
    for key, source in sources(data):
        if source.format == "text":
            yield Problem(f"{key}.format", "an encoder-decoder needs something to read: a format with a prompt", "text")
        if source.format == "messages" and source.supervised_turns is schema.SupervisedTurns.all:
            reason = "an encoder-decoder writes one turn: data.supervised_turns=last"
            yield Problem(f"{key}.supervised_turns", reason, "all")


@applies_to("run", *READING_ROWS)
def kept_thoughts_have_tags(data: schema.DataConfig, tokens: schema.TokensConfig) -> Problems:
    if data.thoughts is schema.Thoughts.keep and tokens.thought_open is None:
        yield Problem("data.thoughts", "nothing to write thoughts with: tokens.thought_open is null", "keep")


@applies_to("run")
def quantised_weights_are_frozen(
    quantization: schema.QuantizationConfig, adapter: schema.AdapterConfig, model: schema.ModelConfig
) -> Problems:
    if not quantization.is_on:
        return
    if quantization.load_in_8bit and quantization.load_in_4bit:
        yield Problem("quantization.load_in_4bit", "8 bits or 4, not both", True)
    key = "quantization.load_in_8bit" if quantization.load_in_8bit else "quantization.load_in_4bit"
    if not adapter.is_on:
        yield Problem(key, "quantised weights can't be trained; train an adapter on them: adapter=lora", True)
    if model.weights is schema.Weights.random:
        yield Problem(key, "only a checkpoint's weights are quantised; model.weights is random", True)


@applies_to("run")
def adapters_can_be_made(adapter: schema.AdapterConfig, quantization: schema.QuantizationConfig) -> Problems:
    if not isinstance(adapter, schema.LoraConfig):
        return
    if adapter.use_dora and quantization.load_in_8bit:
        yield Problem("adapter.use_dora", "PEFT can't put DoRA on weights in 8 bits; quantization=nf4, or LoRA", True)
    if adapter.layers_to_transform is not None and isinstance(adapter.target_modules, str):
        reason = "PEFT chooses layers only where adapter.target_modules is a list of names"
        yield Problem("adapter.layers_to_transform", reason, adapter.layers_to_transform)
    if adapter.init_lora_weights not in (True, False, "gaussian", "orthogonal") and quantization.is_on:
        reason = "changes the base weights, which a quantised base can't have"
        yield Problem("adapter.init_lora_weights", reason, adapter.init_lora_weights)


@applies_to("run")
def rows_of_tokens_have_tokens(adapter: schema.AdapterConfig, tokens: schema.TokensConfig) -> Problems:
    if isinstance(adapter, schema.TokensOnlyConfig) and not tokens.additional_special_tokens:
        reason = "trains the rows of new tokens alone, and tokens has none: tokens=tow, or adapter=lora"
        yield Problem("adapter.type", reason, adapter.type)


@applies_to("run")
def merging_needs_an_adapter(export: schema.ExportConfig, adapter: schema.AdapterConfig) -> Problems:
    if export.merge and not adapter.is_on:
        yield Problem("export.merge", "there is no adapter to merge: adapter is none", True)


@applies_to("run")
def adapters_have_a_base_that_lasts(
    export: schema.ExportConfig, adapter: schema.AdapterConfig, model: schema.ModelConfig
) -> Problems:
    if adapter.is_on and model.weights is schema.Weights.random and not export.merge:
        reason = "an adapter on random weights fits no other model: export.merge=true, or a checkpoint with weights"
        yield Problem("model.weights", reason, "random")


@applies_to("run")
def embedding_lr_has_rows_to_train(
    optimizer: schema.OptimizerConfig, adapter: schema.AdapterConfig, tokens: schema.TokensConfig
) -> Problems:
    if optimizer.embedding_lr is not None and adapter.is_on and not tokens.additional_special_tokens:
        reason = "with an adapter only rows of new tokens are trained, and tokens has none"
        yield Problem("optimizer.embedding_lr", reason, optimizer.embedding_lr)


@applies_to("run")
def thought_weight_has_thoughts(
    loss: schema.LossConfig, tokens: schema.TokensConfig, data: schema.DataConfig
) -> Problems:
    if schema.thought_tags(data, tokens) is not None:
        return
    for key in loss.thought_weights():
        if getattr(loss, key) not in (None, 1):
            yield Problem(f"loss.{key}", "no thoughts are written: see tokens and data.thoughts", getattr(loss, key))


@applies_to("run")
def fading_has_thoughts(tokens: schema.TokensConfig, data: schema.DataConfig) -> Problems:
    if schema.thought_tags(data, tokens) is not None:
        return
    reason = "no thoughts are written: see tokens and data.thoughts"
    if data.thought_dropout:
        yield Problem("data.thought_dropout", reason, data.thought_dropout)
    if data.thought_schedule is not None:
        yield Problem("data.thought_schedule", reason, has_value=False)


@applies_to("run", *GENERATING)
def thoughts_that_are_generated_have_tags(
    generation: schema.GenerationConfig, tokens: schema.TokensConfig, data: schema.DataConfig
) -> Problems:
    if schema.thought_tags(data, tokens) is not None:
        return
    reason = "no thoughts are written: see tokens and data.thoughts"
    if generation.thoughts is not schema.ThoughtMode.free:
        yield Problem("generation.thoughts", reason, generation.thoughts.value)
    if generation.max_thought_tokens is not None:
        yield Problem("generation.max_thought_tokens", reason, generation.max_thought_tokens)


@applies_to("run", *READING_ROWS)
def metrics_have_their_samples(
    generation: schema.GenerationConfig, evaluation: schema.EvaluationConfig, data: schema.DataConfig
) -> Problems:
    own, count = evaluation.metrics is not None, generation.num_return_sequences
    for name in (evaluation.metrics if own else data.metrics) or ():
        needed = METRICS[name].min_samples
        if needed > count:
            reason = f"{name} takes {needed} samples of each row at least: generation.num_return_sequences is {count}"
            yield Problem("evaluation.metrics" if own else "data.metrics", reason, name)


@applies_to("run")
def fp16_keeps_float32_weights(
    training: schema.TrainingConfig, model: schema.ModelConfig, adapter: schema.AdapterConfig
) -> Problems:
    if adapter.is_on:
        return  # what an adapter trains is float32
    is_fp16 = training.mixed_precision is schema.MixedPrecision.fp16
    if model.dtype is schema.Dtype.float16 and not is_fp16:
        yield Problem("model.dtype", "float16 weights can't be trained: bfloat16 or float32", "float16")
    if is_fp16 and model.dtype in (schema.Dtype.float16, schema.Dtype.bfloat16):
        reason = "fp16 mixed precision scales gradients of float32 weights: model.dtype=float32"
        yield Problem("model.dtype", reason, model.dtype.value)


@applies_to("run", *GENERATING)
def precision_fits_the_device(training: schema.TrainingConfig, runtime: schema.RuntimeConfig) -> Problems:
    if training.mixed_precision is schema.MixedPrecision.fp16 and runtime.device is schema.Device.cpu:
        yield Problem("training.mixed_precision", "fp16 needs a GPU; on a CPU use no or bf16", "fp16")


@applies_to("run", *GENERATING)
def flash_attention_needs_a_gpu(model: schema.ModelConfig, runtime: schema.RuntimeConfig) -> Problems:
    if model.attn_implementation is schema.Attention.flash_attention_2 and runtime.device is schema.Device.cpu:
        yield Problem("model.attn_implementation", "needs a GPU; sdpa on a CPU", "flash_attention_2")


@applies_to("run")
def warmup_ends_before_the_run(scheduler: schema.SchedulerConfig, training: schema.TrainingConfig) -> Problems:
    warmup = scheduler.warmup_steps if isinstance(scheduler, schema.WarmupScheduleConfig) else None
    if warmup and training.max_train_steps and warmup >= training.max_train_steps:
        reason = f"warm-up would never end: training.max_train_steps is {training.max_train_steps}"
        yield Problem("scheduler.warmup_steps", reason, warmup)
