"""Training through a cloze: the loss over labels, and saving what PEFT cannot save: soft prompts
that are sharded, networks in front of them, label embeddings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel, PromptEmbedding
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from recipelib.adapters import BASE, SOFT_VERBALIZER
from recipelib.encoding import EncodedRows, collate
from recipelib.inference import word_scores
from recipelib.models import bare_model, logits_at, reshard
from recipelib.prompts import combine_words
from recipelib.runtime import TRAINED, clear_results
from recipelib.training.batches import micro_batches
from recipelib.training.choice_trainer import ChoiceTrainer
from recipelib.training.ends import end_at
from recipelib.training.fake_step import MicroBatch
from recipelib.training.memory import MemoryEstimate, estimate_memory


class ClozeTrainer(ChoiceTrainer):
    """A `ChoiceTrainer` of what label words, or embeddings in their place, fill in.

    Args:
        task: a `ClozeTask`, or anything with its `encoded`, `facts` and `trained_as`.
    """

    def __init__(self, model, training, task, **options):
        super().__init__(model, training, task, data_collator=collate, **options)

    def scores(self, model, inputs) -> torch.Tensor:
        """[rows, labels] the log-likelihoods of the labels' words, combined."""
        words = word_scores(self.model, inputs, run=model)
        return combine_words(words, inputs["word_labels"], self.task.facts["combine"])

    def _estimate(self) -> MemoryEstimate:
        batch = heaviest_cloze_batch(self.task.encoded, self.args)
        return estimate_memory(self.model, self.args, batch, _loss_of_shapes)

    def trained_weights(self, *, frozen: bool = False) -> dict[str, torch.Tensor]:
        """All trained parameters, whole, by name; or the frozen ones too. Of a sharded model only
        the main process gets them, the others get nothing.
        """
        parameters = dict(self.model.named_parameters())
        trained = {
            name for name, parameter in parameters.items() if frozen or parameter.requires_grad
        }
        if not self.is_fsdp_enabled:
            weights = {name: parameter.detach().cpu() for name, parameter in parameters.items()}
        else:
            options = StateDictOptions(full_state_dict=True, cpu_offload=True)
            weights = get_model_state_dict(self.model, options=options)
        return {name: weight.contiguous() for name, weight in weights.items() if name in trained}

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False):
        """Save what was trained; called by all processes. A soft prompt or prefix is saved as PEFT
        does, a tuned model as transformers does, label embeddings beside them.
        """
        folder, adapted = (
            Path(output_dir or self.args.output_dir),
            isinstance(self.model, PeftModel),
        )
        if adapted and not _internal_call and not self.model.active_peft_config.is_prompt_learning:
            super().save_model(output_dir)
            return
        weights = self.trained_weights(frozen=not adapted and not _internal_call)
        if not self.args.should_save:
            return
        if not _internal_call:
            clear_results(str(folder), bare_model(self.model).name_or_path)
        folder.mkdir(parents=True, exist_ok=True)
        if _internal_call:  # a checkpoint on the way
            save_file(weights, folder / TRAINED, self.task.trained_as)
            return
        soft = {
            name: weight for name, weight in weights.items() if ".soft_verbalizer." in f".{name}"
        }
        if soft:
            tensors = {name.rpartition(".")[2]: weight for name, weight in soft.items()}
            save_file(tensors, folder / SOFT_VERBALIZER, {"format": "pt"})
        rest = {name: weight for name, weight in weights.items() if name not in soft}
        if not adapted:
            self._save_whole(folder, rest)
            return
        prompts = {name for name in rest if name.startswith("prompt_encoder.")}
        if rest.keys() - prompts:  # the model was tuned too
            prefix = "base_model."
            base = {name.removeprefix(prefix): rest[name] for name in rest.keys() - prompts}
            self._save_whole(folder / BASE, base)
        tuned = str(folder / BASE) if rest.keys() - prompts else None
        self._save_prompt(folder, {name: rest[name] for name in prompts}, tuned)

    def _save_whole(self, folder: Path, weights: dict[str, torch.Tensor]) -> None:
        """Save a model; `weights` are all its parameters, tied ones once."""
        bare = bare_model(self.model)
        whole = dict(weights)
        for name, parameter in bare.named_parameters(remove_duplicate=False):
            if name not in whole and not name.startswith("soft_verbalizer."):
                named = bare.named_parameters()
                twin = next(other for other, weight in named if weight is parameter)
                whole[name] = whole[twin]
        if (doubled := getattr(bare, "head_bias", None)) is not None:  # see `prepare_for_fsdp2`
            head = bare.get_output_embeddings()
            name = next(name for name, module in bare.named_modules() if module is head)
            whole[doubled] = whole.pop(f"{name}.bias")  # the two are tied when it is loaded
        for name, buffer in bare.named_buffers():
            if name in bare.state_dict():
                whole[name] = buffer
        end_at(bare, ())  # so that it can be saved, whatever it holds
        bare.save_pretrained(folder, state_dict=whole)
        self.processing_class.save_pretrained(folder)

    def _save_prompt(
        self, folder: Path, weights: dict[str, torch.Tensor], base: str | None
    ) -> None:
        """Save the soft prompt as PEFT does: the embeddings that its network puts out. It is for
        the tuned model in `base`, or else for the model that it was trained with.
        """
        config = self.model.peft_config["default"]
        kind = type(self.model.prompt_encoder["default"])  # a new one: the model's may be sharded
        encoder = kind(config, None) if kind is PromptEmbedding else kind(config)
        encoder.load_state_dict(
            {
                name.removeprefix("prompt_encoder.default."): weight
                for name, weight in weights.items()
            }
        )
        with torch.no_grad():
            count = config.num_virtual_tokens * config.num_transformer_submodules
            embeddings = encoder(torch.arange(count)[None])[0].clone()
        save_file({"prompt_embeddings": embeddings}, folder / "adapter_model.safetensors")
        kept = config.inference_mode, config.base_model_name_or_path
        config.inference_mode = True
        config.base_model_name_or_path = base or config.base_model_name_or_path
        config.save_pretrained(folder)
        config.inference_mode, config.base_model_name_or_path = kept

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        weights = load_file(Path(resume_from_checkpoint) / TRAINED)
        options = StateDictOptions(full_state_dict=True, strict=False)
        set_model_state_dict(self.model, weights, options=options)


class KeepBest(TrainerCallback):
    """Scores validation rows after every epoch, and ends with the weights of the best epoch.

    The trainer's own `load_best_model_at_end` would load a checkpoint through PEFT, which knows
    the embeddings of a soft prompt but not the network that makes them.

    Args:
        score: scores the validation rows with the model as it is now; higher is better. A tuple:
            of a tie the second value decides.
    """

    def __init__(self, model, score: Callable[[], tuple[float, ...]]):
        self.model, self.score = model, score
        self.best: tuple[float, ...] | None = None
        self.scores: list[float] = []
        self._weights: list[torch.Tensor] = []

    def _trained(self) -> list[torch.Tensor]:
        """The trained parameters; of sharded ones this process's shard."""
        return [
            parameter.to_local() if isinstance(parameter, DTensor) else parameter
            for parameter in self.model.parameters()
            if parameter.requires_grad
        ]

    @torch.no_grad()
    def on_epoch_end(self, args, state, control, **kwargs):
        """Score, and keep the weights if they are the best so far."""
        value = self.score()
        reshard(self.model)
        self.scores.append(value[0])
        if self.best is None or value > self.best:
            self.best = value
            self._weights = [weight.detach().to("cpu", copy=True) for weight in self._trained()]

    @torch.no_grad()
    def on_train_end(self, args, state, control, **kwargs):
        """Go back to the best weights."""
        for weight, best in zip(self._trained(), self._weights, strict=True):
            weight.copy_(best)


def keep_best(trainer: ClozeTrainer, task) -> list[float] | None:
    """Let a trainer end with the weights of the epoch that is best on the task's validation rows.

    Returns:
        The score of each epoch, filled in while training; None without validation rows.
    """
    if task.validation is None:
        return None
    best = KeepBest(trainer.model, lambda: task.validate(trainer.model))
    trainer.add_callback(best)
    return best.scores


def heaviest_cloze_batch(encoded: EncodedRows, training) -> MicroBatch:
    """The largest of the forward passes that training will make, for `memory.estimate_memory`."""
    examples = encoded.examples
    column = examples.with_format("arrow")[:]["lengths"].combine_chunks()
    starts, lengths = column.offsets.to_numpy(), column.values.to_numpy()
    sequences = np.diff(starts).tolist()
    widths = np.maximum.reduceat(lengths[: starts[-1]], starts[:-1]).tolist()

    def slots(batch: Sequence[int]) -> int:
        return sum(sequences[index] for index in batch) * max(widths[index] for index in batch)

    batches = micro_batches(encoded.lengths, training)
    heaviest = [examples[index] for index in max(batches, key=slots)]
    together = [length for example in heaviest for length in example["lengths"]]
    read = [len({(read[0], read[1]) for read in example["reads"]}) for example in heaviest]
    return MicroBatch(len(together), max(together), sum(read), len({*together}) > 1)


def _loss_of_shapes(model, training, batch: MicroBatch) -> torch.Tensor:
    """The loss of `ClozeTrainer` for a batch of these shapes, see `fake_step.step_peaks`."""
    tokens = torch.zeros(batch.rows, batch.width, dtype=torch.long, device=training.device)
    places = torch.zeros(batch.supervised, 2, dtype=torch.long, device=training.device)
    halved = training.bf16 or training.fp16
    dtype = torch.float16 if training.fp16 else torch.bfloat16
    with (
        torch.autocast(training.device.type, dtype, enabled=halved),
        logits_at(model, places, batch.width),
    ):
        logits = model(
            input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False
        ).logits
    return logits.float().log_softmax(-1)[0, :, 0].sum()
