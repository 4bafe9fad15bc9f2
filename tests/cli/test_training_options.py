# SPDX-License-Identifier: Apache-2.0
"""Every option of `TrainingArguments` through `hf-aace train`: it works, or is refused in one sentence."""

import contextlib
import io
import multiprocessing
import os
import shlex
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import fields

import datasets
import pytest
from transformers import TrainingArguments

from hf_aace.cli import main


# Small enough for a second; two epochs of one step.
TINY = ["train", "--train_size", "40", "--num_train_epochs", "2", "--disable_tqdm", "true"]
WORKS = ""

# For each option the words to give, and what comes of it: nothing wrong, or what the error says.
OPTIONS = {
    "output_dir": [("--output_dir here", WORKS)],
    "per_device_train_batch_size": [("--per_device_train_batch_size 16", WORKS)],
    "num_train_epochs": [("--num_train_epochs 1", WORKS)],
    "max_steps": [("--max_steps 2", WORKS)],
    "learning_rate": [("--learning_rate 1e-3", WORKS)],
    "lr_scheduler_type": [
        ("--lr_scheduler_type linear", WORKS),
        ("--lr_scheduler_type reduce_lr_on_plateau", WORKS),
        ("--lr_scheduler_type warmup_stable_decay", "schedule cannot be made"),
    ],
    "lr_scheduler_kwargs": [
        ("""--lr_scheduler_kwargs '{"num_cycles": 1}'""", WORKS),
        ("""--lr_scheduler_kwargs '{"foo": 1}'""", "schedule cannot be made"),
    ],
    "warmup_steps": [("--warmup_steps 0.1", WORKS), ("--warmup_steps -1", "warmup_steps")],
    "optim": [
        ("--optim sgd", WORKS),
        ("--optim adafactor", WORKS),
        ("--optim lomo", "optim='lomo'"),
    ],
    "optim_args": [("--optim_args eps=1e-6", WORKS), ("--optim_args foo", "`optim_args` must be")],
    "weight_decay": [("--weight_decay 0.1", WORKS)],
    "adam_beta1": [("--adam_beta1 0.8", WORKS)],
    "adam_beta2": [("--adam_beta2 0.9", WORKS), ("--adam_beta2 2", "beta parameter")],
    "adam_epsilon": [("--adam_epsilon 1e-6", WORKS)],
    "optim_target_modules": [("--optim_target_modules pwconv1", WORKS)],
    "gradient_accumulation_steps": [
        ("--gradient_accumulation_steps 2", WORKS),
        ("--gradient_accumulation_steps 0", "`gradient_accumulation_steps` must be"),
    ],
    "average_tokens_across_devices": [("--average_tokens_across_devices false", WORKS)],
    "max_grad_norm": [("--max_grad_norm 0", WORKS)],
    "label_smoothing_factor": [("--label_smoothing_factor 0.1", WORKS)],
    "bf16": [("--bf16 --use_cpu", WORKS)],
    "fp16": [("--fp16 --use_cpu", WORKS)],
    "bf16_full_eval": [
        ("--bf16_full_eval --use_cpu", "`bf16_full_eval` needs `bf16`"),
        ("--bf16_full_eval --bf16 --use_cpu", WORKS),
    ],
    "fp16_full_eval": [
        ("--fp16_full_eval --use_cpu", "`fp16_full_eval` needs `bf16`"),
        ("--fp16_full_eval --fp16 --use_cpu", "`fp16_full_eval` needs `bf16`"),  # `fp16` has no effect on a CPU
    ],
    "tf32": [("--tf32 false", WORKS)],
    "activation_checkpointing": [
        ("--activation_checkpointing --model_name_or_path vit-tiny-digits", WORKS),
        ("--activation_checkpointing", "does not support activation checkpointing"),
    ],
    "activation_checkpointing_kwargs": [("""--activation_checkpointing_kwargs '{"use_reentrant": false}'""", WORKS)],
    "gradient_checkpointing": [("--gradient_checkpointing --model_name_or_path vit-tiny-digits", WORKS)],
    "gradient_checkpointing_kwargs": [("""--gradient_checkpointing_kwargs '{"use_reentrant": false}'""", WORKS)],
    "torch_compile": [("--torch_compile --torch_compile_backend eager", WORKS)],
    "torch_compile_backend": [("--torch_compile_backend eager", WORKS)],
    "torch_compile_mode": [("--torch_compile_mode default --torch_compile_backend aot_eager", WORKS)],
    "use_liger_kernel": [("--use_liger_kernel", "liger-kernel")],
    "liger_kernel_config": [("""--liger_kernel_config '{"rope": true}'""", WORKS)],
    "use_cache": [("--use_cache", WORKS)],
    "neftune_noise_alpha": [("--neftune_noise_alpha 5", "get_input_embeddings")],
    "torch_empty_cache_steps": [("--torch_empty_cache_steps 1", WORKS)],
    "auto_find_batch_size": [("--auto_find_batch_size", WORKS)],
    "logging_strategy": [("--logging_strategy no", WORKS)],
    "logging_steps": [("--logging_strategy steps --logging_steps 1", WORKS)],
    "logging_first_step": [("--logging_first_step", WORKS)],
    "log_on_each_node": [("--log_on_each_node false", WORKS)],
    "logging_nan_inf_filter": [("--logging_nan_inf_filter false", WORKS)],
    "include_num_input_tokens_seen": [("--include_num_input_tokens_seen", WORKS)],
    "log_level": [("--log_level error", WORKS)],
    "log_level_replica": [("--log_level_replica error", WORKS)],
    "disable_tqdm": [("--disable_tqdm false", WORKS)],
    "report_to": [("--report_to tensorboard", WORKS), ("--report_to dvclive", "`report_to`: ")],
    "run_name": [("--run_name mine", WORKS)],
    "project": [("--project mine", WORKS)],
    "trackio_space_id": [("--trackio_space_id mine", WORKS)],
    "trackio_bucket_id": [("--trackio_bucket_id mine", WORKS)],
    "trackio_static_space_id": [("--trackio_static_space_id mine", WORKS)],
    "eval_strategy": [("--eval_strategy no", WORKS)],
    "eval_steps": [("--eval_strategy steps --eval_steps 1", WORKS)],
    "eval_delay": [("--eval_delay 1", WORKS)],
    "per_device_eval_batch_size": [("--per_device_eval_batch_size 16", WORKS)],
    "prediction_loss_only": [("--prediction_loss_only", WORKS)],
    "eval_on_start": [("--eval_on_start", WORKS)],
    "eval_do_concat_batches": [("--eval_do_concat_batches false", "`eval_do_concat_batches`")],
    "eval_use_gather_object": [("--eval_use_gather_object", WORKS)],
    "eval_accumulation_steps": [("--eval_accumulation_steps 1 --per_device_eval_batch_size 100", WORKS)],
    "include_for_metrics": [("--include_for_metrics inputs loss", WORKS)],
    "batch_eval_metrics": [("--batch_eval_metrics", "`batch_eval_metrics`")],
    "save_only_model": [("--save_only_model", WORKS)],
    "save_strategy": [
        ("--save_strategy best --metric_for_best_model accuracy", WORKS),
        ("--save_strategy best", "metric_for_best_model"),
    ],
    "save_steps": [("--save_strategy steps --save_steps 1", WORKS)],
    "save_on_each_node": [("--save_on_each_node", WORKS)],
    "save_total_limit": [("--save_total_limit 1", WORKS)],
    "enable_jit_checkpoint": [("--enable_jit_checkpoint", WORKS)],
    "push_to_hub": [("--push_to_hub", "Hub|huggingface.co")],  # the Hub is out of reach here
    "hub_token": [("--hub_token secret", WORKS)],
    "hub_private_repo": [("--hub_private_repo", WORKS)],
    "hub_model_id": [("--hub_model_id mine", WORKS)],
    "hub_strategy": [("--hub_strategy end", WORKS)],
    "hub_always_push": [("--hub_always_push", WORKS)],
    "hub_revision": [("--hub_revision main", WORKS)],
    "load_best_model_at_end": [("--load_best_model_at_end", WORKS)],
    "metric_for_best_model": [
        ("--metric_for_best_model accuracy", WORKS),
        ("--metric_for_best_model eval_loss", WORKS),
        ("--metric_for_best_model recall", "`metric_for_best_model` is 'recall', which this run does not measure"),
        ("--metric_for_best_model accuracy --prediction_loss_only", "`metric_for_best_model` is 'accuracy'"),
    ],
    "greater_is_better": [("--greater_is_better true", WORKS)],
    "ignore_data_skip": [("--ignore_data_skip", WORKS)],
    "restore_callback_states_from_checkpoint": [("--restore_callback_states_from_checkpoint", WORKS)],
    "full_determinism": [("--full_determinism", WORKS)],
    "seed": [("--seed 1", WORKS)],
    "data_seed": [("--data_seed 1", WORKS)],
    "use_cpu": [("--use_cpu", WORKS)],
    "accelerator_config": [
        ("""--accelerator_config '{"split_batches": true}'""", WORKS),
        ("""--accelerator_config '{"foo": true}'""", "unexpected keyword argument 'foo'"),
    ],
    "parallelism_config": [("--parallelism_config {}", "parallelism_config")],
    "dataloader_drop_last": [
        ("--dataloader_drop_last --per_device_train_batch_size 16", WORKS),
        ("--dataloader_drop_last", "`dataloader_drop_last` leaves nothing to train on"),
    ],
    "dataloader_num_workers": [("--dataloader_num_workers 1", WORKS)],
    "dataloader_pin_memory": [("--dataloader_pin_memory false", WORKS)],
    "dataloader_persistent_workers": [("--dataloader_num_workers 1 --dataloader_persistent_workers", WORKS)],
    "dataloader_prefetch_factor": [("--dataloader_num_workers 1 --dataloader_prefetch_factor 2", WORKS)],
    "dataloader_multiprocessing_context": [
        ("--dataloader_num_workers 1 --dataloader_multiprocessing_context fork", WORKS),
        ("--dataloader_num_workers 1 --dataloader_multiprocessing_context spawn", WORKS),
    ],
    "dataloader_in_order": [("--dataloader_num_workers 1 --dataloader_in_order false", WORKS)],
    "remove_unused_columns": [("--remove_unused_columns true", WORKS)],
    "label_names": [("--label_names labels", WORKS), ("--label_names label", "`label_names` is ['label']")],
    "train_sampling_strategy": [("--train_sampling_strategy sequential", WORKS)],
    "length_column_name": [("--length_column_name size", WORKS)],
    "ddp_find_unused_parameters": [("--ddp_find_unused_parameters true", WORKS)],
    "ddp_bucket_cap_mb": [("--ddp_bucket_cap_mb 1", WORKS)],
    "ddp_broadcast_buffers": [("--ddp_broadcast_buffers true", WORKS)],
    "ddp_static_graph": [("--ddp_static_graph", WORKS)],
    "ddp_backend": [("--ddp_backend gloo", "`ddp_backend` is for several processes")],
    "ddp_timeout": [("--ddp_timeout 100", WORKS)],
    "fsdp": [("--fsdp full_shard", "fsdp")],
    "fsdp_config": [("--fsdp full_shard --fsdp_config missing.json", "missing.json")],
    "deepspeed": [("--deepspeed missing.json", "deepspeed")],
    "debug": [("--debug underflow_overflow", WORKS), ("--debug foo", "invalid DebugOption")],
    "skip_memory_metrics": [("--skip_memory_metrics false", WORKS)],
    "do_train": [("--do_train false", "training is what this command does")],
    "do_eval": [("--do_eval false", WORKS)],
    "do_predict": [("--do_predict", WORKS)],
    "resume_from_checkpoint": [
        ("--resume_from_checkpoint false", WORKS),
        ("--resume_from_checkpoint nowhere", "which is no checkpoint"),
    ],
    "local_rank": [("--local_rank 0", WORKS)],
}
CASES = [(name, *case) for name, cases in OPTIONS.items() for case in cases]
# What is refused before the model is loaded, which takes no time.
BY_OTHERS = ("accelerator_config", "warmup_steps", "debug")
FAST = [case for case in CASES if case[2].startswith("`") or (case[2] and case[0] in BY_OTHERS)]


def train(words):
    """Run the command in a folder of its own; return what it says on its way out, nothing if it went well."""
    os.chdir(tempfile.mkdtemp())
    datasets.config.HF_DATASETS_CACHE = os.getcwd()
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            code = main([*TINY, *shlex.split(words)])
        except SystemExit as stop:
            code = stop.code
    return WORKS if code == 0 else said.getvalue().strip().splitlines()[-1]


def test_every_option_is_in_the_table():
    newer = {"activation_checkpointing", "activation_checkpointing_kwargs"}  # than Transformers 5.19
    options = {field.name for field in fields(TrainingArguments) if field.init}
    assert sorted(OPTIONS.keys() ^ (options | newer)) == []


@pytest.mark.parametrize(("name", "words", "expected"), FAST)
def test_an_option_that_cannot_be_followed_is_refused_before_training(name, words, expected, monkeypatch, tmp_path):
    monkeypatch.setattr("hf_aace.AACETrainer.train", lambda *args, **kwargs: pytest.fail("it was trained"))
    monkeypatch.chdir(tmp_path)  # and back, after `train`
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    assert expected in train(words)


def fork_workers():
    """Those that load images, as in a user's process; here they would be started as the process itself was."""
    multiprocessing.set_start_method("fork", force=True)


@pytest.mark.slow
def test_every_option_works_or_is_refused_in_one_sentence(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("forkserver")  # each in a process of its own: some change global settings
    context.set_forkserver_preload(["hf_aace.cli.train"])
    wrong = {}
    with ProcessPoolExecutor(1, context, fork_workers, max_tasks_per_child=1) as pool:
        futures = {words: (pool.submit(train, words), expected) for _, words, expected in CASES}
        for words, (future, expected) in futures.items():
            try:
                said = future.result()
            except Exception as error:
                said = f"a traceback: {error!r}"
            if (said != WORKS) != (expected != WORKS) or not any(part in said for part in expected.split("|")):
                wrong[words] = said
    assert wrong == {}
