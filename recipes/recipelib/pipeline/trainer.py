"""The trainer of a model that is cut into stages."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import nn
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_utils import EvalLoopOutput

from recipelib.encoding import IGNORED
from recipelib.models import bare_model, count_parameters, load_model
from recipelib.pipeline import checkpoints
from recipelib.pipeline.pipeline import Pipeline
from recipelib.pipeline.plan import bubble, show_stages, stage_memory
from recipelib.pipeline.schedule import Schedule
from recipelib.pipeline.stage import ends_of, keep_part, views
from recipelib.pipeline.stages import Stages
from recipelib.runtime import clear_results, say
from recipelib.training import (
    RecipeTrainer,
    end_at,
    evaluation_batches,
    show_plan,
    training_batches,
)


class PipelineTrainer(RecipeTrainer):
    """A `RecipeTrainer` whose model is cut into stages that stand in several processes. A step of
    one process takes `per_device_train_batch_size` rows in each micro-batch.

    Args:
        model: from `load_part`, with adapters or without. What other processes compute is taken
            out.
        stages: who computes what.
        args: a recipe's `schedule`, `micro_batches`, and those that name its model.
    """

    def __init__(self, model, training, task, *, stages: Stages, args):
        self.stages, self._method = stages, args
        self._counts = count_parameters(model)
        if _stop_dropout(model):
            say("dropout is off: its draws would depend on the number of stages")
        bare = bare_model(model)
        self._ends = ends_of(bare)
        tied = keep_part(bare, self._ends, stages)
        super().__init__(model, training, task)
        own = views(bare, self._ends, stages, training.label_smoothing_factor)
        self._train_batch_size = training.per_device_train_batch_size * args.micro_batches
        schedule = Schedule(
            own,
            stages,
            args.schedule,
            args.micro_batches,
            width=bare.config.hidden_size,
            dtype=bare.dtype,
            device=self.args.device,
            precision=self.accelerator.autocast,
        )
        whole = partial(load_model, args, training, float32=bare.dtype == torch.float32)
        self.pipeline = Pipeline(self.model, schedule, tied, whole)

    # What the trainer asks ----------------------------------------------------------------------

    def _wrap_model(self, model, training=True, dataloader=None):
        return self.pipeline  # accelerate would wrap it in DistributedDataParallel

    def get_tp_size(self) -> int:
        """How many processes are given the same rows."""
        return self.stages.processes

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Forward and backward pass of a step; its loss."""
        model.train()
        batch = _batch(self._prepare_inputs(inputs))
        if self.stages.is_first:
            self.slots_seen += batch["input_ids"].numel()
            self.tokens_seen += int(batch["attention_mask"].sum())
        return self.watched(model.train_step(batch, num_items_in_batch), batch)

    def _clip_grad_norm(self, model):
        return self.pipeline.clip(self.args.max_grad_norm)

    def _get_grad_norm(self, model, grad_norm=None):
        return self.pipeline.clip(float("inf")) if grad_norm is None else grad_norm

    # Rows ---------------------------------------------------------------------------------------

    def get_train_dataloader(self):
        """The batches of this process's pipeline, each of all micro-batches of a step."""
        return training_batches(
            self._remove_unused_columns(self.train_dataset),
            self.task.encoded.lengths,
            self.args,
            self.data_collator,
            size=self._train_batch_size,
            processes=self.stages.pipelines,
            process=self.stages.pipeline,
            device=self.accelerator.device,
        )

    def get_eval_dataloader(self, eval_dataset=None):
        """The same for evaluation, each row once."""
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        return evaluation_batches(
            self._remove_unused_columns(rows),
            self.args,
            self.data_collator,
            size=self.args.per_device_eval_batch_size * self._method.micro_batches,
            processes=self.stages.pipelines,
            process=self.stages.pipeline,
            device=self.accelerator.device,
            even_batches=False,
        )

    def evaluation_loop(
        self,
        dataloader,
        description,
        prediction_loss_only=None,
        ignore_keys=None,
        metric_key_prefix="eval",
    ) -> EvalLoopOutput:
        """The mean loss of all supervised tokens."""
        self.pipeline.eval()
        sums = torch.zeros(2, device=self.args.device)
        for inputs in dataloader:
            batch = _batch(self._prepare_inputs(inputs))
            losses = self.pipeline.schedule.evaluate(batch)
            if losses is not None:
                sums[0] += losses.sum()
                sums[1] += (batch["labels"][:, 1:] != IGNORED).sum()
        total, tokens = self.accelerator.reduce(sums).tolist()
        metrics = {f"{metric_key_prefix}_loss": total / tokens}
        return EvalLoopOutput(None, None, metrics, len(dataloader.dataset))

    # What is shown and left -----------------------------------------------------------------------

    def _estimate(self):
        return stage_memory(
            self.model, self._ends, self.stages, self._method, self.args, self.task.encoded
        )

    def show_plan(self) -> None:
        """Show what is trained, and the stages."""
        rows, parts = self.args.per_device_train_batch_size, self._method.micro_batches
        beside = self.stages.pipelines
        show_plan(
            self.model,
            self.args,
            self.task,
            self.estimated,
            self.rates,
            counts=self._counts,
            batch=f"{rows * parts * beside} = {rows} in each of {parts} micro-batches x {beside} "
            "(pipelines)",
            padding=self.expected_padding(),
        )
        show_stages(self.model, self.stages, self._method, self.estimated)

    def expected_padding(self) -> float:
        """The share of padding in the first epoch."""
        lengths = self.task.encoded.lengths
        order = [*self.get_train_dataloader().batch_sampler]
        slots = sum(len(rows) * int(lengths[rows].max()) for rows in order)
        return 1 - sum(int(lengths[rows].sum()) for rows in order) / slots if slots else 0.0

    def parameter_counts(self) -> tuple[int, int]:
        """Trainable and all parameters of all stages."""
        return self._counts

    def pipeline_figures(self) -> dict:
        """What a run's metrics.json keeps of the stages, all processes have to call this:
        `bubble`, the share of a step in which a process idles in theory, and `idle_fraction`, the
        measured share, in which unequal stages and messages count as well.
        """
        took = self.pipeline.seconds
        share = self.pipeline.busy / took if took else 0.0
        busy = self.accelerator.reduce(torch.tensor(share, device=self.args.device), "mean")
        return {
            "stages": [[layers.start, layers.stop] for layers in self.stages.cut],
            "pipelines": self.stages.pipelines,
            "schedule": self._method.schedule,
            "micro_batches": self._method.micro_batches,
            "bubble": bubble(self.stages, self._method.micro_batches),
            "idle_fraction": 1 - busy.item(),
        }

    # Weights on disk ------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False):
        """Save the whole model or the adapter; called by all processes. Of a checkpoint on the way
        (`_internal_call`) each process writes what it trains.
        """
        output_dir = output_dir or self.args.output_dir
        if _internal_call:
            checkpoints.save_weights(output_dir, self.pipeline)
            return
        end_at(self.model, self.ends)
        clear_results(output_dir, bare_model(self.model).name_or_path)
        weights = {}
        for name, tensor in self.pipeline.every_weight():
            if self.args.should_save:
                weights[name] = tensor.to("cpu", copy=True)
        if self.args.should_save:
            self._save(output_dir, state_dict=weights)
            if isinstance(self.model, PeftModel):  # which leaves out other processes' layers
                whole = {name.replace(".default.", "."): it for name, it in weights.items()}
                file = Path(output_dir, SAFETENSORS_WEIGHTS_NAME)
                save_file(whole, file, {"format": "pt"})
            self.save_ends(output_dir)
            Path(output_dir, "training_args.bin").unlink(missing_ok=True)  # a pickle

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        checkpoints.save_optimizer(output_dir, self.pipeline, self.optimizer)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir, SCHEDULER_NAME))

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # What makes the checkpoint whole is written next, by the main process alone.
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        checkpoints.load_weights(resume_from_checkpoint, self.pipeline)

    def _load_best_model(self) -> None:
        checkpoints.load_weights(self.state.best_model_checkpoint, self.pipeline)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            checkpoints.load_optimizer(checkpoint, self.pipeline, self.optimizer)
            kept = torch.load(Path(checkpoint, SCHEDULER_NAME), weights_only=True)
            self.lr_scheduler.load_state_dict(kept)
            rates = self.lr_scheduler.get_last_lr()
            for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate


def _batch(inputs) -> dict[str, torch.Tensor]:
    return {name: inputs[name] for name in ("input_ids", "attention_mask", "labels")}


def _stop_dropout(model: nn.Module) -> bool:
    """Turn dropout off; whether there was any."""
    found = False
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            found |= module.p > 0
            module.p = 0.0
        elif isinstance(rate := getattr(module, "attention_dropout", 0.0), float):
            found |= rate > 0
            module.attention_dropout = 0.0
    return found
