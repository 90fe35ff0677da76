"""Rules across sections and against the file system: checks of a typed config, each giving problems. No torch here.

A rule's parameters name the sections it reads; the gate calls it when these sections are good in themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from src.config.problems import Problem
from src.config.rules.across import (
    adapters_can_be_made,
    adapters_have_a_base_that_lasts,
    embedding_lr_has_rows_to_train,
    encoder_decoders_take_pairs,
    flash_attention_needs_a_gpu,
    fp16_keeps_float32_weights,
    kept_thoughts_have_tags,
    merging_needs_an_adapter,
    precision_fits_the_device,
    quantised_weights_are_frozen,
    streaming_can_work,
    thought_weight_has_thoughts,
    warmup_ends_before_the_run,
)
from src.config.rules.checkpoint import (
    DEFAULT_METRIC,
    best_model_can_be_told,
    folders_to_start_from_are_there,
    scores_of,
    the_best_is_kept,
)
from src.config.rules.data import (
    a_source_is_given,
    cleaning_is_for_dialogues,
    columns_and_templates_fit_the_format,
    files_can_be_found,
    folds_can_be_made,
    formats_are_known,
    mixture_is_whole,
    rows_have_prompts,
    set_names_are_plain,
    something_is_predicted,
    text_is_no_chat,
    validation_and_test_sets_differ,
)
from src.config.rules.deepspeed import (
    a_deepspeed_file_agrees_with_the_optimizer,
    a_deepspeed_file_agrees_with_the_schedule,
    processes_of,
    zero_agrees_with_the_rest,
    zero_can_share_out,
    zero_weights_can_be_exported,
)
from src.config.rules.generation import generation_lengths_fit
from src.config.rules.model import checkpoint_can_be_loaded
from src.config.rules.patterns import adapter_patterns_are_regular_expressions, patterns_are_regular_expressions
from src.config.rules.runtime import machines_can_meet
from src.config.rules.tokens import new_tokens_are_distinct, new_tokens_can_be_initialised, thought_tags_come_in_pairs
from src.config.rules.tracking import tracker_can_be_reached_by_some_scheme

RULES: tuple[Callable[..., Iterator[Problem]], ...] = (
    a_source_is_given,
    files_can_be_found,
    mixture_is_whole,
    set_names_are_plain,
    validation_and_test_sets_differ,
    formats_are_known,
    columns_and_templates_fit_the_format,
    cleaning_is_for_dialogues,
    text_is_no_chat,
    streaming_can_work,
    folds_can_be_made,
    encoder_decoders_take_pairs,
    patterns_are_regular_expressions,
    adapter_patterns_are_regular_expressions,
    tracker_can_be_reached_by_some_scheme,
    kept_thoughts_have_tags,
    thought_tags_come_in_pairs,
    new_tokens_are_distinct,
    new_tokens_can_be_initialised,
    checkpoint_can_be_loaded,
    quantised_weights_are_frozen,
    adapters_can_be_made,
    merging_needs_an_adapter,
    adapters_have_a_base_that_lasts,
    embedding_lr_has_rows_to_train,
    thought_weight_has_thoughts,
    fp16_keeps_float32_weights,
    precision_fits_the_device,
    flash_attention_needs_a_gpu,
    warmup_ends_before_the_run,
    generation_lengths_fit,
    best_model_can_be_told,
    the_best_is_kept,
    folders_to_start_from_are_there,
    machines_can_meet,
    zero_weights_can_be_exported,
    zero_agrees_with_the_rest,
    a_deepspeed_file_agrees_with_the_optimizer,
    a_deepspeed_file_agrees_with_the_schedule,
    zero_can_share_out,
)


PREDICT_RULES: tuple[Callable[..., Iterator[Problem]], ...] = (
    something_is_predicted,
    rows_have_prompts,
    files_can_be_found,
    set_names_are_plain,
    formats_are_known,
    columns_and_templates_fit_the_format,
    cleaning_is_for_dialogues,
    text_is_no_chat,
    encoder_decoders_take_pairs,
    patterns_are_regular_expressions,
    kept_thoughts_have_tags,
    precision_fits_the_device,
    flash_attention_needs_a_gpu,
    generation_lengths_fit,
)
"""The rules for src.predict: nothing about how a run is trained, which its frozen config has behind it."""
