"""What our trainer adds to TRL's: it knows its task, its loss projects only the answers onto the
vocabulary, and packing does not change the loss.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.data_loader import prepare_data_loader
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, TrainerState
from transformers.distributed.fsdp import update_fsdp_plugin_peft
from transformers.trainer import TRAINER_STATE_NAME
from trl import SFTTrainer

from recipelib.activations import STATES, StateCache, WithStates, beginning_at
from recipelib.encoding import IGNORED, Counts
from recipelib.models import (
    FSDP_OFF,
    bare_model,
    check_shards,
    count_parameters,
    logits_at,
    name_layers,
    prepare_for_fsdp2,
    prepare_four_bit,
    reshard,
)
from recipelib.runtime import (
    UserError,
    check_adapter,
    clear_results,
    clear_way,
    ending_with_others,
    heeding_sigterm,
    is_main_process,
    uses_fsdp,
)
from recipelib.training.batches import evaluation_batches, training_batches
from recipelib.training.ends import end_at, trained_ends
from recipelib.training.memory import MemoryEstimate, estimate_memory
from recipelib.training.packing import RowsApart, row_lengths, rows_stay_apart
from recipelib.training.plan import show_plan
from recipelib.training.resuming import note_split, taken_up
from recipelib.training.stopping import EndInOrder

# PEFT uses transformers' old name for activation checkpointing; the user cannot change that.
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")


@contextmanager
def _head_out_of_sight(model) -> Iterator[None]:
    """A context in which TRL does not see the head, for it refuses adapters there: its loss takes
    the head's weight and would not train them. Ours calls the head.
    """
    if isinstance(model, PeftModel):
        model.get_output_embeddings = lambda: None
    try:
        yield
    finally:
        vars(model).pop("get_output_embeddings", None)


class LossBar(TrainerCallback):
    """A progress bar with the latest loss; transformers would print a line per logged step."""

    bar = None

    def on_train_begin(self, args, state, control, **kwargs):
        """Open the bar, at the step where a resumed run goes on."""
        self.bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc="training",
            unit="step",
            disable=args.disable_tqdm or not is_main_process(),
            dynamic_ncols=True,
        )

    def on_step_end(self, args, state, control, **kwargs):
        """Advance the bar."""
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


@dataclass(frozen=True)
class TrainingFigures:
    """What training took, in all processes together.

    Attributes:
        steps: optimizer steps.
        tokens, slots: without and with padding.
        seconds: of training alone.
        peak_memory_bytes: of the process that took the most, see `MemoryMeter`.
        peak_resident_bytes: the same for resident memory.
        estimated_memory_bytes: what was estimated beforehand.
        world_size, distributed_type: as accelerate names them.
    """

    steps: int
    tokens: int
    slots: int
    seconds: float
    peak_memory_bytes: int
    peak_resident_bytes: int
    estimated_memory_bytes: int
    world_size: int
    distributed_type: str


class RecipeTrainer(SFTTrainer):
    """An `SFTTrainer` that knows its task. It projects only supervised positions onto the
    vocabulary, and counts tokens, time and memory.

    With one-word answers, projecting all positions costs a fifth of the whole step of a small
    model; TRL's fused head avoids that under Triton only.

    Under FSDP the model is sharded when the trainer is made, not when training starts, so that
    `trainer.model` can be scored before: each process holds its shard, and all have to make equally
    many forward passes.

    Args:
        training: a `RecipeConfig`.
        task: gives the `encoded` examples, the `tokenizer`, the `held_out()` examples, the
            `checkpoint` to resume, and the `memory` meter, which may be None: then nothing is
            estimated, measured or shown.
        rates: learning rates for the parameters with these words in their names.
        cache: of what the model's frozen layers compute of the training examples; they are then
            run once, when training begins, and not in the steps.
        loss: "nll", or "dft": dynamic fine-tuning, see `compute_loss`.
        options: further ones of `SFTTrainer`.
    Raises:
        UserError: a checkpoint of another run; FSDP is asked for but off; a model whose rows cannot
            be packed.
    """

    def __init__(
        self,
        model,
        training,
        task,
        *,
        rates: Mapping[str, float] | None = None,
        cache: StateCache | None = None,
        loss: str = "nll",
        **options,
    ):
        training.loss_type = loss  # TRL's name for it
        check_adapter(task.checkpoint, model)
        held_out = task.held_out() if training.eval_strategy != "no" else None
        config = bare_model(model).config
        use_cache = getattr(config, "use_cache", None)
        with _head_out_of_sight(model):
            super().__init__(
                model,
                training,
                train_dataset=(
                    task.encoded.examples if task.encoded.stream is None else task.encoded.stream
                ),
                eval_dataset=held_out,
                processing_class=task.tokenizer,
                **options,
            )
        if use_cache is not None:  # TRL has turned it off; no step asks for it, and it is saved
            config.use_cache = use_cache
        self.task, self.rates, self.cache = task, rates or {}, cache
        if uses_fsdp() and not self.is_fsdp_enabled:
            raise UserError(FSDP_OFF)
        if getattr(self.model, "is_loaded_in_4bit", False):
            prepare_four_bit(self.model)
        # The trainer counts a step's labels from the second on, as `compute_loss` does.
        self._loss_shifts_labels = True
        self.tokens_seen = 0  # without padding, by this process
        self.slots_seen = 0  # with padding
        self.seconds = 0.0
        self._checkpoint: str | None = None  # that training goes on from
        self._values = self._place = None  # see `set_initial_training_values`
        self._evaluated = [0.0, 0]  # the sum of losses, and of how many tokens (or rows)
        self._casting: list[BaseTunerLayer] | None = None  # see `_without_input_casts`
        self.rows_apart: bool | None = (
            None  # with packing: whether sdpa is given each row by itself
        )
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)
        self.add_callback(LossBar)
        self._end_in_order = EndInOrder(self.accelerator, task)
        self.add_callback(self._end_in_order)
        if rates:
            self.optimizer = self._optimizer_at(rates)
        self.estimated = self._estimate() if task.memory else None
        if self.is_fsdp_enabled:
            self._shard()
        if self.args.packing:
            coarse = self.args.bf16 or self.args.fp16
            self.rows_apart = rows_stay_apart(self.model, self.data_collator, coarse)

    def _estimate(self) -> MemoryEstimate:
        """The memory that training will need; called before the model is sharded."""
        return estimate_memory(self.model, self.args, self.task.encoded)

    def _optimizer_at(self, rates: Mapping[str, float]) -> torch.optim.Optimizer:
        """The optimizer that the arguments ask for, with these learning rates for the parameters
        that have these words in their names.

        Raises:
            UserError: --optim names an optimizer that groups parameters itself.
        """
        kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        if options.keys() & {"params", "model", "optimizer_dict"}:
            name = getattr(self.args.optim, "value", self.args.optim)
            raise UserError(f"--optim {name}: groups parameters itself; try adamw_torch")
        decayed = {*self.get_decay_parameter_names(self.model)}
        groups: dict[tuple[float, float], list] = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                own = (rate for word, rate in rates.items() if word in name)
                decay = self.args.weight_decay if name in decayed else 0.0
                rate = next(own, self.args.learning_rate)
                groups.setdefault((rate, decay), []).append(parameter)
        return kind(
            [
                {"params": parameters, "lr": rate, "weight_decay": decay}
                for (rate, decay), parameters in groups.items()
            ],
            **options,
        )

    def _shard(self) -> None:
        plugin = self.accelerator.state.fsdp_plugin
        if plugin.activation_checkpointing:
            # accelerate would wrap the layers, and PEFT would find no adapter in them to save. The
            # trainer's own way computes as much and, under FSDP2, gathers as much.
            plugin.activation_checkpointing = False
            self.args.activation_checkpointing = True
        name_layers(plugin, self.model)
        if plugin.fsdp_version == 2:
            prepare_for_fsdp2(plugin, self.model)
            self.create_optimizer()  # accelerate then exchanges its parameters for the shards
            self.model, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)
        else:
            if isinstance(self.model, PeftModel):
                update_fsdp_plugin_peft(self.model, self.accelerator)
            self.model = self.accelerator.prepare(self.model)
        self.model_wrapped = self.model
        if plugin.fsdp_version == 2:
            check_shards(self.model, self.accelerator.num_processes)

    def train(self, resume_from_checkpoint: str | None = None, **kwargs):
        """Show the plan and train, from the task's checkpoint unless another is given. The model
        may have been scored since it was sharded. What a finished run left in the output folder is
        removed only now.
        """
        checkpoint, memory = resume_from_checkpoint or self.task.checkpoint, self.task.memory
        self._checkpoint = checkpoint
        if memory:
            self.show_plan()
        clear_way(self.args.output_dir, checkpoint, bare_model(self.model).name_or_path)
        reshard(self.model)
        start = time.perf_counter()
        with memory.sampling() if memory else nullcontext():
            if self.cache is not None:
                self._begin_above(self.cache)
            with ending_with_others(), heeding_sigterm(steps=True):
                output = super().train(resume_from_checkpoint=checkpoint, **kwargs)
        self.seconds = time.perf_counter() - start
        self._peak = memory.stop() if memory else 0
        return output

    def set_initial_training_values(self, args, dataloader):
        """How many passes and steps there are; of a resumed run, until all rows are trained."""
        values = super().set_initial_training_values(args, dataloader)
        self._place = None
        if self._checkpoint is not None and not args.ignore_data_skip:
            file = Path(self._checkpoint, TRAINER_STATE_NAME)
            state, stream = TrainerState.load_from_json(str(file)), self.task.encoded.stream
            values, self._place = taken_up(values, state, args, stream=stream is not None)
        self._values = values
        return values

    def _init_training_state(self, *args) -> tuple[int, int]:
        found = super()._init_training_state(*args)
        note_split(self.state, self._values, self.args)
        return self._place or found

    def show_plan(self) -> None:
        """Show what is trained, on what, and how much of it."""
        show_plan(self.model, self.args, self.task, self.estimated, self.rates)

    def parameter_counts(self) -> tuple[int, int]:
        """Trainable and all parameters of the model."""
        return count_parameters(self.model)

    def _begin_above(self, cache: StateCache) -> None:
        """Run the frozen layers, and give each batch what they put out."""
        with self.accelerator.autocast():
            cache.fill(self.model, description="frozen layers, once")
        reshard(self.model)
        if isinstance(self.data_collator, WithStates):  # trained before
            return
        places = np.arange(len(self.train_dataset))
        self.train_dataset = self.train_dataset.add_column("place", places)
        self.data_collator = WithStates(self.data_collator, cache)
        self.args.remove_unused_columns = False

    def figures(self) -> TrainingFigures:
        """What training took; all processes have to call this."""
        resident = self.task.memory.resident if self.task.memory else 0
        counted = [self.tokens_seen, self.slots_seen, self._peak, resident]
        processes = self.accelerator.gather(torch.tensor([counted], device=self.args.device))
        tokens, slots = processes[:, :2].sum(0).tolist()
        peak, resident = processes[:, 2:].amax(0).tolist()
        return TrainingFigures(
            steps=self.state.global_step,
            tokens=tokens,
            slots=slots,
            seconds=self.seconds,
            peak_memory_bytes=peak,
            peak_resident_bytes=resident,
            estimated_memory_bytes=self.estimated.total if self.estimated else 0,
            world_size=self.args.world_size,
            distributed_type=str(self.accelerator.distributed_type.value),
        )

    def rows_read(self) -> tuple[Counts, int]:
        """What became of the rows of a stream that all processes have read so far, and how many bad
        ones were left out; all processes have to call this.
        """
        read = [*vars(self.task.encoded.counts).values(), self.task.skipped_rows]
        read = torch.tensor([read], device=self.args.device)
        *totals, skipped = self.accelerator.gather(read).sum(0).tolist()
        return Counts(*totals), skipped

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Forward and backward pass of a micro-batch."""
        if self.args.packing and self.neftune_noise_alpha is not None:
            # The noise is divided by the root of the width (Jain et al. 2023, algorithm 1), meaning
            # the width that padding would give, not the length of the line.
            lengths = row_lengths(inputs)
            longer = (sum(lengths) / max(lengths)) ** 0.5
            self.model.get_input_embeddings().neftune_noise_alpha = (
                self.neftune_noise_alpha * longer
            )
        with self._keeping_apart(inputs), self._without_input_casts(), self._above(inputs):
            loss = super().training_step(model, inputs, num_items_in_batch)
        return self.watched(loss, inputs)

    def watched(self, loss: torch.Tensor, inputs: Mapping) -> torch.Tensor:
        """The loss of a micro-batch, once it was looked at: see `EndInOrder`."""
        self._end_in_order.saw(loss, inputs)
        return loss

    def prediction_step(self, model, inputs, *args, **kwargs):
        """Forward pass of a micro-batch that is evaluated. Rows that only make the processes'
        shares even do not count.
        """
        labels, loader = inputs["labels"], self.accelerator.gradient_state
        counts = True
        if loader.end_of_dataloader and loader.remainder > 0:  # so many rows are new in this round
            place = self.accelerator.process_index * self.args.eval_batch_size
            new = max(0, loader.remainder - place)
            counts = new > 0
            if counts and self.args.packing:
                labels[:, sum(row_lengths(inputs)[:new]) :] = IGNORED
            elif counts:
                labels[new:] = IGNORED
        with self._keeping_apart(inputs):
            loss, *rest = super().prediction_step(model, inputs, *args, **kwargs)
        if counts:
            targets = labels[:, 1:] if self._loss_shifts_labels else labels
            number = int((targets != IGNORED).sum())
            self._evaluated[0] += loss.item() * number
            self._evaluated[1] += number
        return loss, *rest

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        """The loss is the mean over all supervised tokens, or rows, each counted once; transformers
        takes the mean of the batches' means.
        """
        self._evaluated = [0.0, 0]
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        sums = torch.tensor(self._evaluated, device=self.args.device)
        total, number = self.accelerator.reduce(sums).tolist()
        output.metrics[f"{metric_key_prefix}_loss"] = total / max(number, 1)
        return output

    def _above(self, inputs) -> AbstractContextManager:
        """A context in which the frozen layers are not run but what they put out is given."""
        if self.cache is None:
            return nullcontext()
        return beginning_at(
            self.cache.frozen.layers, self.cache.frozen.boundary, inputs.pop(STATES)
        )

    def _keeping_apart(self, inputs) -> AbstractContextManager:
        return RowsApart(row_lengths(inputs)) if self.rows_apart else nullcontext()

    @contextmanager
    def _without_input_casts(self) -> Iterator[None]:
        """A context in which adapters get their input as it is, not cast to their own float32:
        autocast would cast it back.

        It lasts through the forward pass and the backward pass, which may recompute. LoRA's
        variants compute more than products and are left as they are.
        """
        if self._casting is None:
            modules = self.model.modules() if self.args.bf16 or self.args.fp16 else ()
            layers = [module for module in modules if isinstance(module, BaseTunerLayer)]
            self._casting = [layer for layer in layers if not getattr(layer, "lora_variant", None)]
        for layer in self._casting:
            layer.cast_input_dtype_enabled = False
        try:
            yield
        finally:
            for layer in self._casting:
                layer.cast_input_dtype_enabled = True

    def get_eval_dataloader(self, eval_dataset=None):
        """The batches of this process, of equally many rows in all of them."""
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        shared = self.accelerator
        return evaluation_batches(
            self._remove_unused_columns(rows),
            self.args,
            self.data_collator,
            size=self.args.eval_batch_size,
            processes=shared.num_processes,
            process=shared.process_index,
            device=shared.device,
        )

    def get_train_dataloader(self):
        """The batches of this process. The rows of a stream are its own already, which accelerate
        would share out once more.
        """
        if self.task.encoded.stream is None:
            shared = self.accelerator
            return training_batches(
                self._remove_unused_columns(self.train_dataset),
                self.task.encoded.lengths,
                self.args,
                self.data_collator,
                size=self._train_batch_size,
                processes=shared.num_processes,
                process=shared.process_index,
                device=shared.device,
                split_batches=shared.split_batches,
                dispatch_batches=shared.dispatch_batches,
                even_batches=shared.even_batches,
                non_blocking=shared.non_blocking,
            )
        # TRL has looked at the first example: what was read for it does not count.
        vars(self.task.encoded.counts).update(vars(Counts()))
        for stream in self.task.streams:
            stream.forget()
        batches = DataLoader(
            self.train_dataset,
            batch_size=self.args.per_device_train_batch_size,
            collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return prepare_data_loader(
            batches,
            self.accelerator.device,
            num_processes=1,
            process_index=0,
            put_on_device=True,
            dispatch_batches=False,
        )

    @cached_property
    def ends(self) -> list[int]:
        """The tokens that end what the model learns to write, the most frequent first."""
        return trained_ends(self.task.encoded.examples)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False):
        """Save the model or the adapter, whole whatever the accelerate config; called by all
        processes.

        With sharded state dicts the checkpoints on the way (`_internal_call`) hold shards, which
        `recipes/consolidate.py` puts together.
        """
        output_dir = output_dir or self.args.output_dir
        end_at(self.model, self.ends)
        if not _internal_call:
            clear_results(output_dir, bare_model(self.model).name_or_path)
        plugin = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        if plugin is None or plugin.fsdp_version == 1:
            super().save_model(output_dir, _internal_call=_internal_call)
        elif _internal_call and "SHARDED" in str(plugin.state_dict_type):
            if self.args.should_save:  # consolidated weights will need them beside them
                adapted = isinstance(self.model, PeftModel)
                config = self.model.peft_config["default"] if adapted else self.model.config
                config.save_pretrained(output_dir)
                self.processing_class.save_pretrained(output_dir)
        else:
            self._save(output_dir, state_dict=self.whole_state_dict())
        if self.args.should_save:
            self.save_ends(output_dir)
            if not _internal_call:  # a pickle, which nobody should load
                Path(output_dir, "training_args.bin").unlink(missing_ok=True)

    def save_ends(self, output_dir: str) -> None:
        """Write the generation config: PEFT, and who consolidates shards, has none of its own."""
        bare = bare_model(self.model)
        if self.ends and bare.can_generate():
            bare.generation_config.save_pretrained(output_dir)

    def whole_state_dict(self) -> dict[str, torch.Tensor]:
        """The weights, gathered from all processes; of an adapted model only the adapter's. The
        main process gets them, the others an empty dict.
        """
        options = StateDictOptions(
            full_state_dict=True,
            cpu_offload=True,
            ignore_frozen_params=isinstance(self.model, PeftModel),
        )
        weights = get_model_state_dict(self.model, options=options)
        # Tied weights came as separate tensors; shared as in the model, they are saved once.
        names: dict[int, str] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            if name in weights:
                weights[name] = weights[names.setdefault(id(parameter), name)]
        return weights

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Cross-entropy, summed over the supervised tokens and divided by the number of those in
        the whole step, of all processes and accumulation steps. In training with "dft" each token
        is weighted by its own probability, kept out of the gradient (Wu et al. 2025, On the
        Generalization of SFT, arXiv:2508.05629); evaluation has the usual loss.
        """
        targets = inputs["labels"][:, 1:]
        supervised = targets != IGNORED
        # Tokens and their mask; with packing a line and the positions and lengths of its rows.
        batch = {name: tensor for name, tensor in inputs.items() if name != "labels"}
        with logits_at(self.model, supervised.nonzero(), inputs["labels"].shape[1]):
            outputs = model(**batch, use_cache=False)
        dft = self.args.loss_type == "dft" and model.training
        loss = F.cross_entropy(
            outputs.logits[0].float(),
            targets[supervised],
            reduction="none" if dft else "sum",
            label_smoothing=self.args.label_smoothing_factor,
        )
        if dft:
            loss = (loss * torch.exp(-loss.detach())).sum()
        if num_items_in_batch is None:
            loss = loss / supervised.sum()
        else:
            loss = loss / num_items_in_batch
            if self.args.average_tokens_across_devices:
                # DDP and FSDP average the gradients over the processes.
                loss = loss * self.accelerator.num_processes
        # A mixture of experts': a mean over each batch, as in TRL. Llama 4 computes none.
        if self.aux_loss_enabled and (balance := getattr(outputs, "aux_loss", None)) is not None:
            steps = 1 if num_items_in_batch is None else self.current_gradient_accumulation_steps
            loss = loss + self.router_aux_loss_coef * balance / steps
        if model.training:
            slots = inputs["input_ids"].numel()
            self.slots_seen += slots
            self.tokens_seen += slots if self.args.packing else int(inputs["attention_mask"].sum())
        return (loss, outputs) if return_outputs else loss
