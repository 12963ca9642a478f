"""The trainer's arguments: defaults that fit the machine; what cannot work is refused early."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from transformers import Trainer, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks
from transformers.utils import is_liger_kernel_available
from trl import SFTConfig

from recipelib.runtime import (
    UserError,
    check_joined,
    complete_ranks,
    fsdp_option,
    join_on_cpu,
    require_at_least,
    say,
    use_all_cores,
    uses_fsdp,
)
from recipelib.training.options import refuse_what_is_ours


def fast_bf16() -> bool:
    """Whether this machine computes bfloat16 faster than float32; CPUs are several times slower."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


@dataclass
class RecipeConfig(SFTConfig):
    """`SFTConfig` with other defaults: bf16 where it is fast, nothing recomputed unless asked, no
    external tracker.
    """

    # The command line that says the same, where Python gave the options.
    command: ClassVar[list[str] | None] = None

    # TRL turns it on under this deprecated name; it costs a third more time, so the user decides.
    gradient_checkpointing: bool | None = field(
        default=None, metadata={"help": "Deprecated: --activation_checkpointing."}
    )
    report_to: str | None = field(
        default="none", metadata={"help": "Where to log besides the files: wandb, tensorboard, ..."}
    )
    # transformers logs a loss that is not finite as 0.
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Log a loss of nan or inf as the mean of others."}
    )
    logging_steps: float = field(default=1, metadata={"help": "Log the loss every so many steps."})
    ddp_find_unused_parameters: bool | None = field(
        default=False,  # the search walks over the graph in every step
        metadata={"help": "Search for parameters that a step leaves out; only data parallel."},
    )
    stop_after_nan: int = field(
        default=3,
        metadata={"help": "Stop after so many steps in a row whose loss is not finite; 0: never."},
    )
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints to keep."})
    dataset_num_proc: int | None = field(
        default=None, metadata={"help": "Processes that prepare rows; by default one per core."}
    )
    dataset_cache: bool = field(
        default=True,
        metadata={
            "help": "Keep prepared rows for the next run, in the cache folder of `datasets` "
            "(HF_DATASETS_CACHE)."
        },
    )
    packing: bool = field(
        default=False,
        metadata={
            "help": "Lay the rows of a micro-batch end to end instead of padding them. Steps hold "
            "the same rows and have the same loss; many short rows and few long ones train faster."
        },
    )

    def __post_init__(self):
        refuse_what_is_ours(self)
        if self.max_length is None:
            raise UserError("--max_length: must be a number of tokens, such as 1024")
        require_at_least(
            self,
            max_length=1,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=1,
            per_device_eval_batch_size=1,
            dataset_num_proc=1,
            dataloader_num_workers=0,
            neftune_noise_alpha=0,
            stop_after_nan=0,
            learning_rate=0,
            weight_decay=0,
            adam_epsilon=0,
            seed=0,
        )
        for name in ("adam_beta1", "adam_beta2", "label_smoothing_factor"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name):g}: must be 0 or more and below 1")
        if self.max_steps <= 0 and not self.num_train_epochs > 0:
            raise UserError(f"--num_train_epochs {self.num_train_epochs:g}: must be above 0")
        if self.metric_for_best_model not in (None, "loss", "eval_loss"):
            raise UserError(
                f"--metric_for_best_model {self.metric_for_best_model}: only the loss is computed "
                "on the way, and the lowest is the best; leave it out"
            )
        if self.save_strategy == "best" and self.metric_for_best_model is None:
            self.metric_for_best_model = "loss"
        complete_ranks()
        self.use_cpu = join_on_cpu(self.use_cpu)
        if self.bf16 is None:
            self.bf16 = fast_bf16() and not self.fp16 and not self.use_cpu
        if not torch.cuda.is_available() or self.use_cpu:
            use_all_cores()
            self.dataloader_pin_memory = False
        if uses_fsdp() and self.accelerator_config is None:
            # Otherwise each process keeps the whole gradient until the last micro-batch of a step.
            sync = {"gradient_accumulation_kwargs": {"sync_each_batch": True}}
            self.accelerator_config = sync
        # The trainer would upload every checkpoint; we upload the finished run.
        self.publish, self.push_to_hub = self.push_to_hub, False
        # Rows are encoded and checked already; the trainer's own preparation would cut off the ends
        # of long answers.
        self.dataset_kwargs = {**(self.dataset_kwargs or {}), "skip_prepare_dataset": True}
        super().__post_init__()
        check_joined(self.world_size)
        if self.n_gpu > 1:  # torch's DataParallel would scatter what the loss passes on
            say(f"using one of {self.n_gpu} GPUs; accelerate_configs/ddp.yaml uses all")
            self._n_gpu = 1
        self._check_early()

    def _check_early(self) -> None:
        """Raise now what the trainer would raise minutes later, once the base model was scored."""
        if self.fp16 and self.device.type == "cpu":
            raise UserError("--fp16: needs a GPU; leave it out")
        if self.activation_offloading and self.device.type == "cpu":
            raise UserError("--activation_offloading: needs a GPU to offload from; leave it out")
        if self.use_liger_kernel and not is_liger_kernel_available():
            raise UserError("--use_liger_kernel: needs the package liger-kernel; leave it out")
        if self.activation_checkpointing and fsdp_option("ACTIVATION_CHECKPOINTING") == "true":
            raise UserError(
                "activation checkpointing has two owners: drop --activation_checkpointing, or set "
                "fsdp_activation_checkpointing: false in the accelerate config"
            )

        def report() -> None:
            for callback in get_reporting_integration_callbacks(self.report_to):
                callback()

        def schedule() -> None:
            optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
            options = {"scheduler_specific_kwargs": self.lr_scheduler_kwargs}
            get_scheduler(self.lr_scheduler_type, optimizer, 0, 1, **options)

        def optimize() -> None:
            if any("=" not in part for part in (self.optim_args or "=").split(",")):
                raise UserError(f"--optim_args {self.optim_args}: write name=value,name=value")
            with suppress(ValueError):  # raised by optimizers that need the model too
                Trainer.get_optimizer_cls_and_kwargs(self)

        checks = {"report_to": report, "lr_scheduler_type": schedule, "optim": optimize}
        for name, check in checks.items():
            try:
                check()
            except (ImportError, RuntimeError, TypeError, ValueError) as error:
                raise UserError(f"--{name}: {' '.join(str(error).split())}") from None

    @property
    def model_dtype(self) -> tuple[torch.dtype, str]:
        """The dtype to load the model in, and why."""
        if self.bf16:
            return torch.bfloat16, "the GPU computes bfloat16 fast"
        if self.fp16:
            return torch.float32, "fp16 needs float32 weights to scale the loss"
        if torch.cuda.is_available() and not self.use_cpu:
            return torch.float32, "bf16 is off"
        return torch.float32, "bf16 is off, as by default on a CPU"
