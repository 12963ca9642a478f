"""Trains models in stages and in one piece, and says how far they are apart.

Launched in the tests, by as many processes as a number in CASES: each of them trains some of the
models as a whole, and all of them its stages. What they find goes to OUT.

    in_stages.py OUT
"""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from deep_models import LAYERS, deep
from peft import LoraConfig, get_peft_model
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh

from recipelib.encoding import IGNORED
from recipelib.models import bare_model
from recipelib.pipeline.pipeline import Pipeline
from recipelib.pipeline.schedule import Schedule
from recipelib.pipeline.stage import ends_of, keep_part, views
from recipelib.pipeline.stages import VIRTUAL, Stages
from recipelib.planning import cut_layers

STEPS, ROWS, RATE = 10, 8, 1e-3
CLIPPED = 0.05  # a norm that the gradients of all steps exceed


class Case(NamedTuple):
    """A model and how it is cut.

    Attributes:
        family: as `deep` knows it.
        tied: whether the head is the embeddings.
        lora: the layers that LoRA is trained in; all parameters are if None.
        stages: the processes of a pipeline.
        schedule, micro_batches: as the recipe has them.
        layers: of the model.
        without: what is left out on purpose: "sum" of the gradients of a tied weight's copies,
            or the "norm" of the other stages' gradients in clipping.
    """

    family: str = "llama"
    tied: bool = True
    lora: list[int] | None = None
    stages: int = 2
    schedule: str = "gpipe"
    micro_batches: int = 4
    layers: int = LAYERS
    without: str = ""


ALL = [*range(LAYERS)]
# By the number of processes. 8 rows of a step do not divide by 3, nor by 5, where one micro-batch
# has only what it was filled up with.
CASES = {
    2: {
        "one micro-batch": Case(micro_batches=1),
        "tied": Case(micro_batches=8),
        "untied": Case(tied=False, schedule="1f1b", micro_batches=3),
        "tied, interleaved": Case(schedule="interleaved", micro_batches=4),
        "qwen3": Case("qwen3", micro_batches=2),
        "gemma2": Case("gemma2", schedule="interleaved", micro_batches=6),
        "gemma3": Case("gemma3", micro_batches=3),
        "gpt2": Case("gpt2", schedule="1f1b", micro_batches=4),
        "lora, interleaved": Case("qwen3", lora=ALL, schedule="interleaved", micro_batches=4),
        "lora on top, interleaved": Case(lora=[3], schedule="interleaved", micro_batches=2),
        "lora below": Case("mistral", lora=[0], micro_batches=5),
        "tied gradients are not summed": Case(without="sum"),
        "stages are clipped apart": Case(without="norm"),
    },
    4: {
        "four stages": Case(stages=4, micro_batches=8),
        "four stages, in turn": Case("gpt2", stages=4, schedule="1f1b", micro_batches=5),
        "eight stages": Case(stages=4, schedule="interleaved", micro_batches=4, layers=8),
        "lora in the middle": Case("qwen3", tied=False, lora=[1], stages=4, micro_batches=2),
        "two pipelines": Case(micro_batches=4),
        "two pipelines, in turn": Case("mistral", tied=False, schedule="1f1b", micro_batches=3),
        "two pipelines, lora": Case(
            "qwen2", lora=[2, 3], schedule="interleaved", micro_batches=2
        ),
    },
}  # fmt: skip


def model_of(case: Case) -> nn.Module:
    """The model of a case, without dropout, ready to be trained."""
    depth = "n_layer" if case.family == "gpt2" else "num_hidden_layers"
    fields = {"tie_word_embeddings": case.tied, depth: case.layers}
    model = deep(case.family, "words", **fields)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    if case.lora is None:
        return model.requires_grad_(True)
    torch.manual_seed(3)
    lora = LoraConfig(
        r=2,
        target_modules=["q_proj", "v_proj", "up_proj", "down_proj"],
        layers_to_transform=case.lora,
        init_lora_weights=False,
    )
    return get_peft_model(model, lora)


def batches(vocabulary: int, pipelines: int) -> Iterator[list[dict[str, torch.Tensor]]]:
    """Steps, each with the rows of every pipeline; each step is of another length than the one
    before, and in every other one no token of the first rows is supervised.
    """
    draw = torch.Generator().manual_seed(1)
    for step in range(STEPS):
        parts = []
        for _ in range(pipelines):
            width = 12 + 3 * (step % 4)
            lengths = torch.randint(4, width + 1, (ROWS // pipelines,), generator=draw)
            ids = torch.randint(3, vocabulary, (len(lengths), width), generator=draw)
            mask = (torch.arange(width)[None] < lengths[:, None]).long()
            answers = torch.randint(1, 4, (len(lengths),), generator=draw)
            answered = torch.arange(width)[None] >= (lengths - answers)[:, None]
            labels = ids.masked_fill((mask == 0) | ~answered, IGNORED)
            labels[: len(labels) // 2 * (step % 2)] = IGNORED
            parts.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
        yield parts


def supervised(parts: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """The tokens of a step that have a loss."""
    return sum((part["labels"][:, 1:] != IGNORED).sum() for part in parts)


def in_one_piece(model: nn.Module, vocabulary: int, pipelines: int) -> list[float]:
    """Train the way everybody does; the losses."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer, losses = torch.optim.AdamW(weights, lr=RATE), []
    for parts in batches(vocabulary, pipelines):
        total = 0.0
        for part in parts:
            logits = model(input_ids=part["input_ids"], attention_mask=part["attention_mask"])
            logits = logits.logits[:, :-1].flatten(0, 1)
            loss = F.cross_entropy(logits, part["labels"][:, 1:].flatten(), reduction="sum")
            loss = loss / supervised(parts)
            loss.backward()
            total += loss.item()
        norm = nn.utils.clip_grad_norm_(weights, CLIPPED)
        assert norm > CLIPPED
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


def in_stages(model: nn.Module, vocabulary: int, case: Case) -> tuple[list[float], Pipeline]:
    """Train in stages; the losses, and the stages of this process."""
    pipelines = distributed.get_world_size() // case.stages
    mesh = init_device_mesh("cpu", (case.stages, pipelines), mesh_dim_names=("stages", "pipelines"))
    count = case.stages * (VIRTUAL if case.schedule == "interleaved" else 1)
    stages = Stages(cut_layers([1.0] * case.layers, 0.0, 0.0, count), case.stages, mesh)
    bare = bare_model(model)
    ends = ends_of(bare)
    tied = keep_part(bare, ends, stages)
    own = views(bare, ends, stages)
    schedule = Schedule(
        own,
        stages,
        case.schedule,
        case.micro_batches,
        width=bare.config.hidden_size,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    pipeline = Pipeline(model, schedule, tied, load=lambda: None).train()
    weights = [*pipeline.trained().values()]
    optimizer = torch.optim.AdamW(weights, lr=RATE) if weights else None
    step, clip = _leaving_out(case.without, pipeline)
    losses = []
    for parts in batches(vocabulary, stages.pipelines):
        losses.append(step(parts[stages.pipeline], supervised(parts)).item())
        clip(CLIPPED)
        if optimizer:
            optimizer.step()
            optimizer.zero_grad()
    return losses, pipeline


def _leaving_out(what: str, pipeline: Pipeline) -> tuple[Callable, Callable]:
    """How a pipeline makes a step and clips its gradients, without what a case leaves out."""

    def unsummed_step(*args) -> torch.Tensor:
        tied, pipeline.tied = pipeline.tied, None
        loss = pipeline.train_step(*args)
        pipeline.tied = tied
        return loss

    def clip_apart(most: float) -> None:
        nn.utils.clip_grad_norm_([*pipeline.trained().values()], most)

    return (
        unsummed_step if what == "sum" else pipeline.train_step,
        clip_apart if what == "norm" else pipeline.clip,
    )


Trained = tuple[list[float], dict[str, torch.Tensor]]


def whole(case: Case) -> Trained:
    """The losses of a model in one piece, and what it trains in the end."""
    model = model_of(case)
    pipelines = distributed.get_world_size() // case.stages
    losses = in_one_piece(model, bare_model(model).config.vocab_size, pipelines)
    named = model.named_parameters()
    return losses, {name: weight.detach() for name, weight in named if weight.requires_grad}


def apart(case: Case, wanted: Trained) -> dict[str, float]:
    """How far this process's stages are from what they are in one piece: the largest difference
    between the `loss` of a step and between the `update` of a weight, relative to it; and the
    smallest update, by which a weight has `moved`.
    """
    model = model_of(case)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    losses, pipeline = in_stages(model, bare_model(model).config.vocab_size, case)
    updates, moved = [0.0], [1.0]
    for name, weight in pipeline.trained().items():
        if name.endswith("k_proj.bias"):  # has no gradient but rounding
            continue
        update, right = weight.detach() - before[name], wanted[1][name] - before[name]
        if name.endswith("c_attn.bias"):  # the same, in its middle
            update, right = (torch.cat([*part.chunk(3)][::2]) for part in (update, right))
        updates.append(((update - right).norm() / right.norm()).item())
        moved.append(right.norm().item())
    differences = [abs(ours - theirs) for ours, theirs in zip(losses, wanted[0], strict=True)]
    return {"loss": max(differences), "update": max(updates), "moved": min(moved)}


def main(out: str) -> None:
    """Compare all cases and write what all processes found."""
    if not distributed.is_initialized():
        distributed.init_process_group("gloo")
    rank, world = distributed.get_rank(), distributed.get_world_size()
    cases, parts = CASES[world], [{} for _ in range(world)]
    # The whole models are shared out: each takes as long as its stages together.
    own = {name: whole(case) for name, case in [*cases.items()][rank::world]}
    distributed.all_gather_object(parts, own)
    wanted = {name: trained for part in parts for name, trained in part.items()}
    found = {}
    for name, case in cases.items():
        distributed.all_gather_object(parts, apart(case, wanted[name]))
        choose = {"loss": max, "update": max, "moved": min}
        found[name] = {key: pick([part[key] for part in parts]) for key, pick in choose.items()}
    if rank == 0:
        Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
