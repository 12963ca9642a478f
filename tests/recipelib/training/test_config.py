"""The trainer's arguments fit the machine, and what would fail late is refused at once."""

from dataclasses import fields
from functools import cached_property

import pytest
import torch
from trl import SFTConfig

from recipelib.cli import RecipeArguments, parse_arguments
from recipelib.runtime.errors import UserError
from recipelib.training.config import RecipeConfig
from recipelib.training.options import refuse_unused


def parse(*argv: str) -> RecipeConfig:
    defaults = {"output_dir": "runs/nowhere"}
    return parse_arguments(RecipeArguments, "A recipe.", defaults, list(argv))[1]


def test_a_cpu_computes_in_float32_without_being_told(monkeypatch):
    for gpu in (False, True):
        monkeypatch.setattr("recipelib.training.config.fast_bf16", lambda gpu=gpu: gpu)
        config = parse("--use_cpu", "true")
        assert config.bf16 is False
        assert config.fp16 is False
        assert config.dataloader_pin_memory is False
        assert config.model_dtype[0] == torch.float32
        assert "CPU" in config.model_dtype[1]
        assert config.activation_checkpointing is False
        assert config.report_to == []


def test_pushing_to_the_hub_is_left_to_the_recipe():
    config = parse("--push_to_hub", "true", "--use_cpu", "true")
    assert (config.publish, config.push_to_hub) == (True, False)
    assert parse("--use_cpu", "true").publish is False


def test_several_gpus_in_one_process_are_one(monkeypatch, capsys):
    def set_up(self):
        self._n_gpu = 2
        self.distributed_state = None
        return torch.device("cpu")

    devices = cached_property(set_up)
    devices.__set_name__(SFTConfig, "_setup_devices")
    monkeypatch.setattr(SFTConfig, "_setup_devices", devices)
    config = RecipeConfig(output_dir="runs/nowhere", use_cpu=True)
    assert config.n_gpu == 1
    assert config.train_batch_size == config.per_device_train_batch_size
    assert "using one of 2 GPUs; accelerate_configs/ddp.yaml uses all" in capsys.readouterr().out


REFUSED = {
    "--report_to foo": "--report_to: foo is not supported, only .*wandb",
    "--report_to wandb": "--report_to: .*pip install wandb",
    "--optim adamw_bnb_8bit": "--optim: .*pip install -U bitsandbytes",
    "--optim foo": "optim: invalid choice: 'foo' .*adamw_torch",
    "--lr_scheduler_type foo": "lr_scheduler_type.*: invalid choice: 'foo' .*cosine",
    "--lr_scheduler_type cosine_with_min_lr": "--lr_scheduler_type: .*min_lr",
    "--fp16 true": "--fp16: needs a GPU",
    "--padding_free true": "--padding_free: --packing true lays whole rows",
    "--packing_strategy wrapped": "--packing_strategy: --packing true lays whole rows",
    "--packing true --eval_packing false": "--eval_packing: --packing true lays whole rows",
    "--neftune_noise_alpha -1": "--neftune_noise_alpha -1.0: must be 0 or more",
    "--loss_type dft": "--loss_type: .*have --loss for it",
    "--assistant_only_loss true": "--assistant_only_loss: the template decides",
    "--completion_only_loss false": "--completion_only_loss: the template decides",
    "--chat_template_path some.jinja": "--chat_template_path: the template decides",
    "--eos_token </s>": "--eos_token: the template decides",
    "--dataset_text_field body": "--dataset_text_field: .*--columns VARIABLE=COLUMN",
    "--fsdp full_shard": "--fsdp: .*accelerate launch --config_file accelerate_configs/fsdp2.yaml",
    "--metric_for_best_model accuracy": "--metric_for_best_model accuracy: only the loss is",
    "--max_steps 2 --num_train_epochs 3": "--num_train_epochs: --max_steps says when to stop",
    "--lr_scheduler_type constant --warmup_steps 5": "--warmup_steps: changes nothing with",
    "--optim sgd --adam_beta1 0.8": "--adam_beta1: changes nothing with --optim sgd",
    "--optim_args momentum=0.9": "--optim_args: changes nothing with --optim adamw_torch_fused",
    "--optim sgd --optim_args momentum": "--optim_args momentum: write name=value",
    "--activation_offloading true": "--activation_offloading: needs a GPU",
    "--label_smoothing_factor 1": "--label_smoothing_factor 1: must be 0 or more and below 1",
    "--num_train_epochs 0": "--num_train_epochs 0: must be above 0",
    "--seed -1": "--seed -1: must be 0 or more",
    "--group_by_length true": "--group_by_length: has moved; pass --train_sampling_strategy",
}


@pytest.mark.parametrize("command", REFUSED)
def test_what_would_fail_after_minutes_is_refused_at_once_in_one_line(command, monkeypatch):
    # As where nothing is installed.
    for check in ("integrations.integration_utils.is_wandb", "trainer_optimizer.is_bitsandbytes"):
        monkeypatch.setattr(f"transformers.{check}_available", lambda: False)
    with pytest.raises(UserError, match=REFUSED[command]) as refused:
        parse("--use_cpu", "true", *command.split())
    assert "\n" not in str(refused.value)


# No recipe follows them, whatever else is asked for.
IGNORED = {
    **dict.fromkeys(("assistant_only_loss", "completion_only_loss", "padding_free"), True),
    **dict.fromkeys(("prediction_loss_only", "batch_eval_metrics", "eval_use_gather_object"), True),
    **dict.fromkeys(("bf16_full_eval", "fp16_full_eval", "hub_always_push", "use_cache"), True),
    **dict.fromkeys(("do_train", "do_eval", "do_predict", "shuffle_dataset"), True),
    "enable_jit_checkpoint": True,
    **dict.fromkeys(("eval_do_concat_batches", "remove_unused_columns"), False),
    **dict.fromkeys(("chat_template_path", "eos_token", "dataset_text_field"), "other"),
    **dict.fromkeys(("length_column_name", "hub_revision"), "other"),
    **dict.fromkeys(("fsdp", "deepspeed", "parallelism_config"), "other"),
    **{name: {"other": 1} for name in ("dataset_kwargs", "model_init_kwargs", "fsdp_config")},
    **{name: ["other"] for name in ("label_names", "include_for_metrics")},
    "eval_packing": False,
    "packing_strategy": "wrapped",
    "truncation_mode": "keep_end",
    "loss_type": "dft",
    "eval_accumulation_steps": 2,
    "hub_strategy": "end",
}
# Each with what it needs, and options with which it is taken.
EVALUATED, SAVED_BY_LOSS = {"eval_strategy": "epoch"}, {"save_strategy": "best"}
BY_LOSS = {**EVALUATED, **SAVED_BY_LOSS}
WORKERS = {"dataloader_num_workers": 1}
NEEDING = {
    "eval_steps": (5, "--eval_strategy steps", {"eval_strategy": "steps"}),
    "eval_delay": (1, "--eval_strategy steps or epoch", EVALUATED),
    "eval_on_start": (True, "--eval_strategy steps or epoch", EVALUATED),
    "per_device_eval_batch_size": (2, "--eval_strategy steps or epoch", EVALUATED),
    "load_best_model_at_end": (True, "--eval_strategy", {**EVALUATED, "save_strategy": "epoch"}),
    "save_strategy": ("best", "--eval_strategy steps or epoch", EVALUATED),
    "metric_for_best_model": ("eval_loss", "--load_best_model_at_end true", BY_LOSS),
    "greater_is_better": (False, "--load_best_model_at_end true", BY_LOSS),
    "save_steps": (5, "--save_strategy steps", {"save_strategy": "steps"}),
    "save_total_limit": (1, "--save_strategy steps, epoch or best", {"save_strategy": "epoch"}),
    "save_only_model": (True, "--save_strategy steps, epoch or best", {"save_strategy": "epoch"}),
    "logging_steps": (5, "--logging_strategy steps", {"logging_strategy": "steps"}),
    "logging_first_step": (True, "--logging_steps above 1", {"logging_steps": 5}),
    "hub_token": ("x", "--push_to_hub true", {"push_to_hub": True}),
    "hub_private_repo": (True, "--push_to_hub true", {"push_to_hub": True}),
    "hub_model_id": ("x", "--push_to_hub true", {"push_to_hub": True}),
    "run_name": ("x", "--report_to", {}),
    "project": ("x", "--report_to", {}),
    "trackio_space_id": ("x", "--report_to", {}),
    "trackio_bucket_id": ("x", "--report_to", {}),
    "trackio_static_space_id": ("x", "--report_to trackio", {}),
    "liger_kernel_config": ({"rope": True}, "--use_liger_kernel true", {}),
    "activation_checkpointing_kwargs": (
        {"use_reentrant": False},
        "--activation_checkpointing true",
        {"activation_checkpointing": True},
    ),
    "gradient_checkpointing_kwargs": (
        {"use_reentrant": False},
        "--activation_checkpointing true",
        {"activation_checkpointing": True},
    ),
    "dataloader_persistent_workers": (True, "--dataloader_num_workers 1 or more", WORKERS),
    "dataloader_in_order": (False, "--dataloader_num_workers 1 or more", WORKERS),
    "dataloader_multiprocessing_context": ("spawn", "--dataloader_num_workers 1 or more", WORKERS),
    "ignore_data_skip": (True, "--resume_from_checkpoint", {"resume_from_checkpoint": "last"}),
    "restore_callback_states_from_checkpoint": (
        True,
        "--resume_from_checkpoint",
        {"resume_from_checkpoint": "last"},
    ),
    "optim_target_modules": ("all-linear", "--optim galore_adamw or apollo_adamw", {}),
}
# Which of the others change something, and by whom: the trainer of transformers or of TRL, PyTorch,
# accelerate, ourselves. What depends on the machine or the launch is here too.
FOLLOWED = {
    *("output_dir", "per_device_train_batch_size", "num_train_epochs", "max_steps", "seed"),
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim"),
    *("optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm"),
    *("gradient_accumulation_steps", "average_tokens_across_devices", "label_smoothing_factor"),
    *("bf16", "fp16", "tf32", "activation_checkpointing", "gradient_checkpointing", "use_cpu"),
    *("torch_compile", "torch_compile_backend", "torch_compile_mode", "use_liger_kernel"),
    *("neftune_noise_alpha", "torch_empty_cache_steps", "auto_find_batch_size", "packing"),
    *("logging_strategy", "log_on_each_node", "logging_nan_inf_filter", "log_level", "debug"),
    *("include_num_input_tokens_seen", "log_level_replica", "disable_tqdm", "report_to"),
    *("eval_strategy", "save_on_each_node", "stop_after_nan", "push_to_hub", "data_seed"),
    *("full_determinism", "accelerator_config", "dataloader_drop_last", "skip_memory_metrics"),
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_prefetch_factor"),
    *("train_sampling_strategy", "ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_backend"),
    *("ddp_broadcast_buffers", "ddp_static_graph", "ddp_timeout", "resume_from_checkpoint"),
    *("local_rank", "trust_remote_code", "router_aux_loss_coef", "dataset_num_proc"),
    *("dataset_cache", "max_length", "pad_to_multiple_of", "activation_offloading", "pad_token"),
}


def test_every_option_of_the_trainer_is_followed_or_refused():
    # A new one of an upgrade is to be looked at.
    assert not FOLLOWED & IGNORED.keys() | NEEDING.keys() & (FOLLOWED | IGNORED.keys())
    assert {one.name for one in fields(RecipeConfig)} == FOLLOWED | IGNORED.keys() | NEEDING.keys()


@pytest.mark.parametrize("name", IGNORED)
def test_what_no_recipe_follows_is_refused(name):
    with pytest.raises(UserError, match=f"^--{name}: [^\\n]*; leave it out$"):
        RecipeConfig(output_dir="runs/nowhere", use_cpu=True, **{name: IGNORED[name]})


@pytest.mark.parametrize("name", NEEDING)
def test_what_changes_nothing_by_itself_is_refused(name):
    value, needs, more = NEEDING[name]
    without = {"logging_strategy": "no"} if name == "logging_steps" else {"save_strategy": "no"}
    if name in ("save_strategy", "save_steps"):
        without = {} if name == "save_strategy" else {"save_strategy": "epoch"}
    common = {"output_dir": "runs/nowhere", "use_cpu": True, name: value}
    line = f"^--{name}: changes nothing without {needs}.*; leave it out$"
    with pytest.raises(UserError, match=line):
        refuse_unused(RecipeConfig(**{**common, **without}), [[name]])
    refuse_unused(RecipeConfig(**{**common, **without}), [])  # the recipe's own default
    if more:
        refuse_unused(RecipeConfig(**{**common, **more}), [[name]])


def test_activations_are_recomputed_when_asked():
    config = parse("--activation_checkpointing", "true", "--use_cpu", "true")
    assert config.activation_checkpointing is True


def test_what_works_is_taken():
    stable = '--lr_scheduler_type warmup_stable_decay --lr_scheduler_kwargs {"num_decay_steps":5}'
    for command in (
        "--optim sgd",
        "--optim adafactor",
        "--report_to none",
        "--optim sgd --optim_args momentum=0.9",
        "--packing true",
        "--max_steps -1 --num_train_epochs 3",
        "--eval_strategy epoch --save_strategy best",
        stable,
    ):
        assert parse("--use_cpu", "true", *command.split()).output_dir == "runs/nowhere"


def test_processes_that_do_not_know_of_each_other_do_not_train(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="2 processes were started, but this one knows of 1"):
        RecipeConfig(output_dir=str(tmp_path))
