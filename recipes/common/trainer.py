"""What our trainers add to TRL's: defaults that fit the machine, and a loss that projects the
answers only.
"""

from __future__ import annotations

import os
import warnings
from contextlib import suppress
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    get_scheduler,
)
from transformers.integrations import get_reporting_integration_callbacks
from trl import SFTConfig, SFTTrainer

from common.arguments import require_at_least
from common.encoding import IGNORED
from common.errors import UserError
from common.launch import is_main_process, say, use_all_cores

# PEFT reads transformers' old name for activation checkpointing; a user can do nothing about it.
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")

# Arguments of SFTConfig about what the recipes do themselves, in `encoding.py` and in the loss.
_NOT_OURS = (
    "assistant_only_loss",
    "chat_template_path",
    "completion_only_loss",
    "eos_token",
    "loss_type",
    "packing",
    "padding_free",
)


def fast_bf16() -> bool:
    """Whether this machine computes bfloat16 faster than float32; CPUs are several times slower."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


@dataclass
class RecipeConfig(SFTConfig):
    """`SFTConfig` with other defaults: bf16 where it is fast, nothing recomputed unless asked, no
    external tracker.
    """

    # TRL turns it on under its deprecated name; a third more time is for the user to choose.
    gradient_checkpointing: bool | None = field(
        default=None, metadata={"help": "Deprecated: --activation_checkpointing."}
    )
    report_to: str | None = field(
        default="none", metadata={"help": "Where to log besides the files: wandb, tensorboard, ..."}
    )
    logging_steps: float = field(default=1, metadata={"help": "Log the loss every so many steps."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints to keep."})

    def __post_init__(self):
        for name in _NOT_OURS:
            if getattr(self, name) != self.__dataclass_fields__[name].default:
                raise UserError(f"--{name}: the template decides what is trained; leave it out")
        if self.max_length is None:
            raise UserError("--max_length: must be a number of tokens, such as 1024")
        require_at_least(
            self, max_length=1, per_device_train_batch_size=1, gradient_accumulation_steps=1
        )
        if self.bf16 is None:
            self.bf16 = fast_bf16() and not self.fp16 and not self.use_cpu
        if not torch.cuda.is_available() or self.use_cpu:
            use_all_cores()
            self.dataloader_pin_memory = False
        # The trainer would upload checkpoints from the start; we upload the finished run.
        self.publish, self.push_to_hub = self.push_to_hub, False
        # Rows come encoded and checked; the trainer's own preparation would cut the ends of long
        # answers.
        self.dataset_kwargs = {**(self.dataset_kwargs or {}), "skip_prepare_dataset": True}
        super().__post_init__()
        if self.n_gpu > 1:  # torch's DataParallel, which would scatter what the loss passes on
            say(f"using one of {self.n_gpu} GPUs; accelerate launch uses all")
            self._n_gpu = 1
        started = int(os.environ.get("WORLD_SIZE", "1"))
        if started > 1 == self.world_size:  # accelerate without a GPU: unrelated models
            raise UserError(
                f"{started} processes were started but none knows of the others; on a machine "
                "without GPUs pass --use_cpu true"
            )
        self._check_early()

    def _check_early(self) -> None:
        """Raise now what the trainer would raise minutes later, after the base model was scored."""
        if self.fp16 and self.device.type == "cpu":
            raise UserError("--fp16: needs a GPU; leave it out")

        def report() -> None:
            for callback in get_reporting_integration_callbacks(self.report_to):
                callback()

        def schedule() -> None:
            optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
            options = {"scheduler_specific_kwargs": self.lr_scheduler_kwargs}
            get_scheduler(self.lr_scheduler_type, optimizer, 0, 1, **options)

        def optimize() -> None:
            with suppress(ValueError):  # of those that need the model, too
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
        return torch.float32, "on a CPU bfloat16 is slower than float32"


class LossBar(TrainerCallback):
    """One progress bar with the latest loss, where transformers prints a line for every logged
    step.
    """

    bar = None

    def on_train_begin(self, args, state, control, **kwargs):
        """Open the bar, at the step that is resumed from."""
        self.bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc="training",
            unit="step",
            disable=args.disable_tqdm or not is_main_process(),
            dynamic_ncols=True,
        )

    def on_step_end(self, args, state, control, **kwargs):
        """Move on by a step."""
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Show the figures that were logged."""
        logs = logs or {}
        shown = {name: f"{logs[name]:.3f}" for name in ("loss", "eval_loss") if name in logs}
        if shown and self.bar is not None:
            self.bar.set_postfix(shown)

    def on_train_end(self, args, state, control, **kwargs):
        """Close the bar."""
        self.bar.close()
        self.bar = None


class RecipeTrainer(SFTTrainer):
    """`SFTTrainer` whose vocabulary projection runs on supervised positions only, and which counts
    tokens.

    With one-word answers the projection of all positions costs a fifth of the whole step on a small
    model; TRL's fused head avoids it under Triton only.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.tokens_seen = 0  # without padding, by this process
        self.slots_seen = 0  # with padding
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)
        self.add_callback(LossBar)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Cross-entropy summed over the supervised tokens, divided by their number in the whole
        step over all processes and accumulation steps.
        """
        targets = inputs["labels"][:, 1:]
        supervised = targets != IGNORED
        columns = supervised.any(0).nonzero().flatten()
        outputs = model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            logits_to_keep=columns,
            use_cache=False,
        )
        picked = supervised[:, columns]
        loss = F.cross_entropy(
            outputs.logits[picked].float(),
            targets[:, columns][picked],
            reduction="sum",
            label_smoothing=self.args.label_smoothing_factor,
        )
        if num_items_in_batch is None:
            loss = loss / supervised.sum()
        else:
            loss = loss / num_items_in_batch
            if self.args.average_tokens_across_devices:
                # DDP and FSDP average the gradients over the processes.
                loss = loss * self.accelerator.num_processes
        if self.aux_loss_enabled:  # of a mixture of experts: a mean over each batch, as in TRL
            steps = 1 if num_items_in_batch is None else self.current_gradient_accumulation_steps
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss / steps
        if model.training:
            self.tokens_seen += int(inputs["attention_mask"].sum())
            self.slots_seen += inputs["attention_mask"].numel()
        return (loss, outputs) if return_outputs else loss
