"""What our trainers add to TRL's: defaults that fit the machine, a loss that projects the answers
only, and packing that changes no loss.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.distributed.fsdp import update_fsdp_plugin_peft
from transformers.trainer_pt_utils import BatchRebalanceSampler
from trl import SFTTrainer

from recipelib.encoding.prompt_encoder import IGNORED
from recipelib.models.head import logits_at
from recipelib.models.quantization import prepare_four_bit
from recipelib.models.sharding import FSDP_OFF, check_shards, prepare_for_fsdp2, reshard
from recipelib.runtime.checkpoints import clear_way
from recipelib.runtime.console import is_main_process
from recipelib.runtime.errors import UserError
from recipelib.runtime.launch import uses_fsdp
from recipelib.training.batches import sampling_seed
from recipelib.training.packing import RowsApart, row_lengths, rows_stay_apart

# PEFT reads transformers' old name for activation checkpointing; a user can do nothing about it.
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")


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
        if uses_fsdp() and not self.is_fsdp_enabled:
            raise UserError(FSDP_OFF)
        if getattr(self.model, "is_loaded_in_4bit", False):
            prepare_four_bit(self.model)
        # By which a step's tokens are counted: `compute_loss` does it for every model.
        self._loss_shifts_labels = True
        self.tokens_seen = 0  # without padding, by this process
        self.slots_seen = 0  # with padding
        self._casting: list[BaseTunerLayer] | None = None  # see `_inputs_as_they_are`
        self.rows_apart: bool | None = None  # with packing: whether sdpa is given row by row
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)
        self.add_callback(LossBar)

    def shard(self):
        """Under FSDP, shard the model now and not when training starts, so that the model can be
        scored before; otherwise do nothing.

        Returns:
            The model to score and to train. Where it is sharded, each process holds its part, all
            processes have to make equally many forward passes.
        Raises:
            UserError: what should be sharded is not, or the model cannot be packed.
        """
        if self.is_fsdp_enabled:
            self._shard()
        if self.args.packing:
            coarse = self.args.bf16 or self.args.fp16
            self.rows_apart = rows_stay_apart(self.model, self.data_collator, coarse)
        return self.model

    def _shard(self) -> None:
        plugin = self.accelerator.state.fsdp_plugin
        if plugin.activation_checkpointing:
            # accelerate would wrap the layers, in which PEFT then finds no adapter to save. The
            # trainer's own way computes and, under FSDP2, gathers just as much.
            plugin.activation_checkpointing = False
            self.args.activation_checkpointing = True
        if plugin.fsdp_version == 2:
            prepare_for_fsdp2(plugin, self.model)
            self.create_optimizer()  # whose parameters accelerate then exchanges for the shards
            self.model, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)
        else:
            if isinstance(self.model, PeftModel):
                update_fsdp_plugin_peft(self.model, self.accelerator)
            self.model = self.accelerator.prepare(self.model)
        self.model_wrapped = self.model
        if plugin.fsdp_version == 2:
            check_shards(self.model, self.accelerator.num_processes)

    def train(self, resume_from_checkpoint: str | None = None, **kwargs):
        """Train; the model may have been scored since it was sharded. What a finished run left in
        the folder goes only now.
        """
        clear_way(self.args.output_dir, resume_from_checkpoint)
        if self.args.packing and self.rows_apart is None:
            self.shard()
        reshard(self.model)
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Forward and backward pass of a micro-batch."""
        if self.args.packing and self.neftune_noise_alpha is not None:
            # The noise is divided by the root of a line's length (Jain et al. 2023, algorithm 1);
            # what is meant is the width that padding would give.
            lengths = row_lengths(inputs)
            longer = (sum(lengths) / max(lengths)) ** 0.5
            self.model.get_input_embeddings().neftune_noise_alpha = (
                self.neftune_noise_alpha * longer
            )
        with self._keeping_apart(inputs), self._inputs_as_they_are():
            return super().training_step(model, inputs, num_items_in_batch)

    def prediction_step(self, model, inputs, *args, **kwargs):
        """Forward pass of a micro-batch that is evaluated."""
        with self._keeping_apart(inputs):
            return super().prediction_step(model, inputs, *args, **kwargs)

    def _keeping_apart(self, inputs) -> AbstractContextManager:
        return RowsApart(row_lengths(inputs)) if self.rows_apart else nullcontext()

    @contextmanager
    def _inputs_as_they_are(self) -> Iterator[None]:
        """Adapters get their input as it is, not in their own float32: autocast casts it back.

        Forward and backward, which may recompute; not LoRA's variants, which do more than
        products.
        """
        if self._casting is None:
            modules = self.model.modules() if self.args.bf16 or self.args.fp16 else ()
            adapters = [one for one in modules if isinstance(one, BaseTunerLayer)]
            self._casting = [one for one in adapters if not getattr(one, "lora_variant", None)]
        for layer in self._casting:
            layer.cast_input_dtype_enabled = False
        try:
            yield
        finally:
            for layer in self._casting:
                layer.cast_input_dtype_enabled = True

    def _get_train_sampler(self, train_dataset=None):
        sampler = super()._get_train_sampler(train_dataset)
        if isinstance(sampler, BatchRebalanceSampler):  # which has a seed of its own
            sampler.seed = sampling_seed(self.args)
        return sampler

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False):
        """Save the model, or the adapter, whole, whatever the accelerate config; called by all
        processes.

        Checkpoints on the way (`_internal_call`) with sharded state dicts hold shards, which
        `recipes/consolidate.py` puts together.
        """
        output_dir = output_dir or self.args.output_dir
        plugin = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        if plugin is None or plugin.fsdp_version == 1:
            super().save_model(output_dir, _internal_call=_internal_call)
        elif _internal_call and "SHARDED" in str(plugin.state_dict_type):
            if self.args.should_save:  # what the consolidated weights will need beside them
                config = (
                    self.model.peft_config["default"]
                    if isinstance(self.model, PeftModel)
                    else self.model.config
                )
                config.save_pretrained(output_dir)
        else:
            self._save(output_dir, state_dict=self.whole_state_dict())

    def whole_state_dict(self) -> dict[str, torch.Tensor]:
        """The weights gathered from all processes (on the main one; the others get an empty dict);
        of an adapted model those of the adapter only.
        """
        options = StateDictOptions(
            full_state_dict=True,
            cpu_offload=True,
            ignore_frozen_params=isinstance(self.model, PeftModel),
        )
        weights = get_model_state_dict(self.model, options=options)
        # Of tied weights each came by itself: shared as in the model, they are saved once.
        names: dict[int, str] = {}
        for name, one in self.model.named_parameters(remove_duplicate=False):
            if name in weights:
                weights[name] = weights[names.setdefault(id(one), name)]
        return weights

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Cross-entropy summed over the supervised tokens, divided by their number in the whole
        step over all processes and accumulation steps.
        """
        targets = inputs["labels"][:, 1:]
        supervised = targets != IGNORED
        # Tokens with a mask; or a line with the positions and lengths of its rows.
        batch = {name: one for name, one in inputs.items() if name != "labels"}
        with logits_at(self.model, supervised.nonzero(), inputs["labels"].shape[1]):
            outputs = model(**batch, use_cache=False)
        loss = F.cross_entropy(
            outputs.logits[0].float(),
            targets[supervised],
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
            slots = inputs["input_ids"].numel()
            self.slots_seen += slots
            self.tokens_seen += slots if self.args.packing else int(inputs["attention_mask"].sum())
        return (loss, outputs) if return_outputs else loss
