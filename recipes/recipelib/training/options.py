"""Which of the trainer's many options change nothing here: one line refuses each, before any row is
read.

What depends on the machine or the launch (a GPU's precision, DDP's buckets) is taken anywhere, so
that a run can be rehearsed with the options that it will have.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import MISSING

from transformers import Trainer

from recipelib.runtime import UserError, fsdp_option

_TEMPLATE = "the template decides what is trained"
_ROWS = "rows are prepared here, by the template"
_ONLY_LOSS = "evaluation on the way computes the loss and nothing else"
_SHARDED = "the launch decides; accelerate launch --config_file accelerate_configs/fsdp2.yaml"

# What the recipes do themselves, in `encoding`, in the loss, at the end of a run: and why.
_NEVER = {
    **dict.fromkeys(("assistant_only_loss", "chat_template_path"), _TEMPLATE),
    **dict.fromkeys(("completion_only_loss", "eos_token", "label_names"), _TEMPLATE),
    "loss_type": "instruction_sft.py and cot_sft.py have --loss for it",
    "dataset_text_field": f"{_ROWS}; --columns VARIABLE=COLUMN says what yours are called",
    "truncation_mode": f"{_ROWS}, whose key shorten says what is cut",
    "shuffle_dataset": "rows are shuffled in every pass; see --train_sampling_strategy",
    **dict.fromkeys(("dataset_kwargs", "length_column_name", "remove_unused_columns"), _ROWS),
    **dict.fromkeys(
        ("eval_packing", "packing_strategy", "padding_free"),
        "--packing true lays whole rows end to end, no other way",
    ),
    **dict.fromkeys(
        ("prediction_loss_only", "include_for_metrics", "batch_eval_metrics"), _ONLY_LOSS
    ),
    **dict.fromkeys(("eval_do_concat_batches", "eval_use_gather_object"), _ONLY_LOSS),
    "eval_accumulation_steps": _ONLY_LOSS,
    **dict.fromkeys(
        ("bf16_full_eval", "fp16_full_eval"), "evaluation on the way is as precise as the steps"
    ),
    **dict.fromkeys(("hub_strategy", "hub_always_push"), "the finished run is uploaded, once"),
    "hub_revision": "the finished run is uploaded to the main branch",
    **dict.fromkeys(
        ("do_train", "do_eval", "do_predict"), "a recipe trains and scores; see --predict"
    ),
    "model_init_kwargs": "the recipe loads the model; see --revision and --attn_implementation",
    "enable_jit_checkpoint": "SIGTERM lets a run finish its step and save, without it",
    "use_cache": "training needs no KV cache, and what is saved keeps the model's own setting",
    **dict.fromkeys(("fsdp", "fsdp_config", "deepspeed", "parallelism_config"), _SHARDED),
}

# What counts where nothing is trained.
_WITHOUT_TRAINING = {
    *("output_dir", "seed", "max_length", "bf16", "fp16", "tf32", "use_cpu", "trust_remote_code"),
    *("dataset_num_proc", "dataset_cache", "disable_tqdm"),
    *("push_to_hub", "hub_token", "hub_private_repo", "hub_model_id"),
    *("accelerator_config", "ddp_backend", "ddp_timeout", "local_rank"),
}

_EVALUATES = "--eval_strategy steps or epoch"
_SAVES = "--save_strategy steps, epoch or best"
_WORKERS = "--dataloader_num_workers 1 or more"
_BEST = "--load_best_model_at_end true, --save_strategy best or a schedule that follows the loss"
_FOLLOWING = ("reduce_lr_on_plateau", "greedy")  # schedules that follow the evaluation loss
_WITHOUT_OPTIONS = ("constant", "constant_with_warmup")
_WITHOUT_WARMUP = ("constant", *_FOLLOWING)


def refuse_what_is_ours(training) -> None:
    """
    Args:
        training: a `RecipeConfig` as it was given.
    Raises:
        UserError: it has an option that no recipe follows.
    """
    # What a config holds that was made already, and is copied.
    made = {
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "do_eval": training.eval_strategy != "no",
    }
    for name, why in _NEVER.items():
        if not _is_default(training, name) and getattr(training, name) != made.get(name):
            raise UserError(f"--{name}: {why}; leave it out")
    if "tpu_metrics_debug" in (training.debug or ()):
        raise UserError("--debug tpu_metrics_debug: is for TPUs; leave it out")


def refuse_unused(
    training,
    given: Sequence[Iterable[str]],
    *,
    trains: bool = True,
    stops_early: bool = False,
    loss: str = "nll",
) -> None:
    """Refuse options that change nothing beside the others.

    Args:
        training: a `RecipeConfig`.
        given: the names of the options that the user has set, by where they stand: on the command
            line, in a file.
        trains: whether the trainer will train anything.
        stops_early: whether the recipe will let the trainer evaluate, though it was not told so.
        loss: the recipe's, "nll" or "dft".
    Raises:
        UserError: an option that changes nothing.
    """
    own = type(training).__dataclass_fields__
    names = [name for source in given for name in source if name in own]
    if idle := [name for name in names if not trains and name not in _WITHOUT_TRAINING]:
        raise UserError(f"--{idle[0]}: is for training, and nothing is trained; leave it out")
    usual = ("--loss nll", loss == "nll", ["label_smoothing_factor"])
    for needs, met, needing in [usual, *_needed(training, stops_early)]:
        decides = needs.split()[0].removeprefix("--")
        for name in needing if not met else ():
            # A file may hold what the command line makes idle.
            overridden = any(decides in source and name not in source for source in given)
            if name in names and not overridden and not _is_default(training, name):
                raise UserError(f"--{name}: changes nothing without {needs}; leave it out")
    schedule = training.lr_scheduler_type.value
    passed_over = {
        "lr_scheduler_kwargs": schedule in _WITHOUT_OPTIONS,
        "warmup_steps": schedule in _WITHOUT_WARMUP,
    }
    for name, is_passed_over in passed_over.items():
        if name in names and is_passed_over and getattr(training, name):
            raise UserError(
                f"--{name}: changes nothing with --lr_scheduler_type {schedule}; leave it out"
            )
    for name in ("adam_beta1", "adam_beta2", "adam_epsilon", "optim_args"):
        if name in names and not _optimizer_reads(training, name):
            raise UserError(
                f"--{name}: changes nothing with --optim {training.optim.value}; leave it out"
            )
    for source in given:
        if training.max_steps > 0 and {"max_steps", "num_train_epochs"} <= {*source}:
            raise UserError("--num_train_epochs: --max_steps says when to stop; leave one out")


def _needed(training, stops_early: bool) -> list[tuple[str, bool, Sequence[str]]]:
    """What options need, whether it is there, and which options need it."""
    evaluates = stops_early or training.eval_strategy != "no"
    saves = training.save_strategy != "no"
    resumes = training.resume_from_checkpoint is not None
    recomputes = training.activation_checkpointing
    recomputes |= fsdp_option("ACTIVATION_CHECKPOINTING") == "true"
    best = stops_early or training.load_best_model_at_end or training.save_strategy == "best"
    best |= training.lr_scheduler_type.value in _FOLLOWING
    logs = training.logging_strategy == "steps"
    return [
        ("--eval_strategy steps", training.eval_strategy == "steps", ["eval_steps"]),
        (_EVALUATES, evaluates, ["eval_delay", "eval_on_start", "per_device_eval_batch_size"]),
        (_EVALUATES, evaluates, ["load_best_model_at_end"]),
        (_EVALUATES, evaluates, ["save_strategy"] if training.save_strategy == "best" else []),
        (_BEST, best, ["metric_for_best_model", "greater_is_better"]),
        ("--save_strategy steps", training.save_strategy == "steps", ["save_steps"]),
        (_SAVES, saves, ["save_total_limit", "save_only_model"]),
        ("--logging_strategy steps", logs or evaluates, ["logging_steps"]),
        (
            "--logging_steps above 1",
            not logs or training.logging_steps != 1,
            ["logging_first_step"],
        ),
        (
            "--push_to_hub true",
            training.publish,
            ["hub_token", "hub_private_repo", "hub_model_id"],
        ),
        (
            "--report_to",
            bool(training.report_to),
            ["run_name", "project", "trackio_space_id", "trackio_bucket_id"],
        ),
        ("--report_to trackio", "trackio" in training.report_to, ["trackio_static_space_id"]),
        ("--use_liger_kernel true", training.use_liger_kernel, ["liger_kernel_config"]),
        (
            "--activation_checkpointing true",
            recomputes,
            ["activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"],
        ),
        (
            _WORKERS,
            training.dataloader_num_workers > 0,
            [
                *("dataloader_persistent_workers", "dataloader_in_order"),
                *("dataloader_multiprocessing_context", "dataloader_prefetch_factor"),
            ],
        ),
        (
            "--resume_from_checkpoint",
            resumes,
            ["ignore_data_skip", "restore_callback_states_from_checkpoint"],
        ),
        (
            "--optim galore_adamw or apollo_adamw",
            training.optim.value.startswith(("galore", "apollo")),
            ["optim_target_modules"],
        ),
    ]


def _is_default(training, name: str) -> bool:
    field = type(training).__dataclass_fields__[name]
    made = field.default_factory
    default = field.default if made is MISSING else made()
    return getattr(training, name) == default


def _optimizer_reads(training, name: str) -> bool:
    """Whether the optimizer that is asked for is made otherwise without an option's value."""
    if _is_default(training, name):
        return True
    without = copy.copy(training)
    setattr(without, name, type(training).__dataclass_fields__[name].default)
    with suppress(ValueError):  # raised by optimizers that need the model too
        made = [Trainer.get_optimizer_cls_and_kwargs(config) for config in (training, without)]
        return made[0] != made[1]
    return True
