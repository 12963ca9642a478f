"""What is shown of a pipeline before it trains: its stages, their memory, and the bubble."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

from recipelib.encoding import IGNORED, EncodedRows
from recipelib.models import bare_model, logits_at
from recipelib.pipeline.stage import Ends, views
from recipelib.pipeline.stages import Stages
from recipelib.runtime import gib, print_table
from recipelib.training import MemoryEstimate, MicroBatch, Sharding, estimate_memory


def bubble(stages: Stages, micro_batches: int) -> float:
    """The share of a step in which a process waits, if all stages take equally long: (stages - 1) /
    (micro_batches + stages - 1) (Huang et al. 2018, arXiv:1811.06965, section 2.3). With several
    stages in a process they count as so many times the micro-batches (Narayanan et al. 2021).
    """
    waiting = stages.processes - 1
    return waiting / (micro_batches * len(stages.own) + waiting)


def in_flight(stages: Stages, schedule: str, micro_batches: int) -> int:
    """Of how many micro-batches at once this process keeps what the backward pass needs, at most.
    Interleaved, the stages of a process wait for one another, too.
    """
    if stages.mesh is None:
        return 1
    if schedule == "gpipe":
        return micro_batches
    waiting = stages.processes - stages.place
    return min(micro_batches, waiting if schedule == "1f1b" else waiting + stages.processes)


def stage_memory(
    model: nn.Module, ends: Ends, stages: Stages, args, training, encoded: EncodedRows
) -> MemoryEstimate:
    """The memory that training needs in this process: that of one micro-batch (see
    `estimate_memory`), and what the others that are on their way keep for their backward pass.

    Args:
        model: with what this process holds of it.
        args: a recipe's `schedule` and `micro_batches`.
    """
    order = (-encoded.lengths).argsort()[: training.per_device_train_batch_size]
    labels = encoded.examples.select_columns("labels")
    batch = MicroBatch(
        rows=len(order),
        width=int(encoded.lengths[order[0]]),
        supervised=sum(
            label != IGNORED for row in order for label in labels[int(row)]["labels"][1:]
        ),
        padded=len({*encoded.lengths[order].tolist()}) > 1,
    )
    names = ("bf16", "fp16", "device", "optim", "optim_args")
    names += ("activation_checkpointing", "activation_checkpointing_kwargs")
    # Other processes hold other weights: there are no copies of gradients for them.
    alone = {"world_size": 1, "gradient_accumulation_steps": args.micro_batches}
    alone = SimpleNamespace(**alone, **{name: getattr(training, name) for name in names})
    saved: dict[int, int] = {}
    loss = _fake_loss(ends, stages, saved) if stages.mesh is not None else None
    one = estimate_memory(model, alone, batch, loss, Sharding())
    others = in_flight(stages, args.schedule, args.micro_batches) - 1
    return replace(one, activations=one.activations + others * sum(saved.values()))


def _fake_loss(ends: Ends, stages: Stages, saved: dict[int, int]):
    """A stand-in for the loss of a micro-batch on shapes, which tell nothing of which tokens are
    supervised, but how many.

    Args:
        saved: is filled with the bytes of each tensor that the backward pass needs.
    """

    def loss(model: nn.Module, training, batch: MicroBatch) -> torch.Tensor:
        bare, device = bare_model(model), training.device
        own = {weight.untyped_storage()._cdata for weight in model.parameters()}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                saved[storage._cdata] = storage.nbytes()
            return tensor

        mask = torch.ones(batch.rows, batch.width, dtype=torch.long, device=device)
        picked = torch.zeros(batch.supervised, dtype=torch.long, device=device)
        halved = torch.float16 if training.fp16 else torch.bfloat16
        total = torch.zeros((), device=device, requires_grad=True)
        for stage in views(bare, ends, stages):
            inputs = {"attention_mask": mask, "use_cache": False}
            if stage.first:
                inputs["input_ids"] = mask
            else:
                shape = (*mask.shape, bare.config.hidden_size)
                states = torch.zeros(shape, dtype=bare.dtype, device=device)
                inputs["inputs_embeds"] = states.requires_grad_()
            with (
                torch.autocast(device.type, halved, enabled=training.bf16 or training.fp16),
                torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            ):
                if not stage.last:
                    total = total + stage.model.base_model(**inputs).last_hidden_state.sum()
                    continue
                with logits_at(stage.model, torch.stack([picked, picked], 1), batch.width):
                    logits = stage.model(**inputs).logits[0]
            total = total + F.cross_entropy(logits.float(), picked, reduction="sum")
        return total

    return loss


def show_stages(model: nn.Module, stages: Stages, args, estimated: MemoryEstimate) -> None:
    """Print what each process of a pipeline holds, and the bubble; all of them have to call this.

    Args:
        model: with what this process holds of it.
        args: a recipe's `schedule` and `micro_batches`.
        estimated: the memory of this process.
    """
    held = sum(weight.numel() for weight in model.parameters())
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    every = stages.from_all((held, trained, estimated.total))
    rows = {
        f"process {place}": f"{_layers(stages, place)}: {held / 1e6:,.1f} M parameters, "
        f"{trained / 1e6:,.1f} M trained; {gib(size)} GiB"
        for place, (held, trained, size) in enumerate(every)
    }
    if stages.processes == 1:
        rows["more stages"] = (
            "accelerate launch --config_file accelerate_configs/pipeline.yaml --num_processes 2 ..."
        )
    waiting, count = stages.processes - 1, args.micro_batches * len(stages.own)
    rows["bubble"] = (
        f"{bubble(stages, args.micro_batches):.0%} of each step = {waiting} / ({count} + {waiting})"
    )
    beside = f", {stages.pipelines} side by side" if stages.pipelines > 1 else ""
    print_table(f"Stages, {args.schedule}, {args.micro_batches} micro-batches{beside}", rows)


def _layers(stages: Stages, place: int) -> str:
    parts: Sequence[range] = [stages.cut[number] for number in stages.of_process(place)]
    named = " and ".join(
        f"{part.start}" if len(part) == 1 else f"{part.start}-{part.stop - 1}" for part in parts
    )
    front = "embeddings, " if place == 0 else ""
    back = ", head" if place == stages.processes - 1 else ""
    return f"{front}layers {named}{back}"
