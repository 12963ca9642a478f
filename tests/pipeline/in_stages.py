"""Trains models in stages and in one piece, side by side, and says how far they are apart.

Launched by test_equality.py in several processes. Each of them trains the whole model by itself,
too, and compares what it holds.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from deep_models import deep
from peft import LoraConfig, get_peft_model
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh

from recipelib.encoding import IGNORED
from recipelib.models import bare_model
from recipelib.pipeline.pipeline import Pipeline
from recipelib.pipeline.schedule import Schedule
from recipelib.pipeline.stage import ends_of, keep_part, views
from recipelib.pipeline.stages import Stages
from recipelib.planning import cut_layers

STEPS, ROWS, LIMIT = 10, 8, 0.05
RATE = 1e-3


def model_of(family: str, tied: bool, lora: list[int] | None) -> nn.Module:
    """A model that learns; with LoRA only in these layers."""
    model = deep(family, "words", tie_word_embeddings=tied)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    if lora is None:
        return model.requires_grad_(True)
    torch.manual_seed(3)
    places = ["q_proj", "v_proj", "up_proj", "down_proj"]
    config = LoraConfig(
        r=2, target_modules=places, layers_to_transform=lora, init_lora_weights=False
    )
    return get_peft_model(model, config)


def batches(vocabulary: int, pipelines: int) -> Iterator[list[dict[str, torch.Tensor]]]:
    """Steps, each with the rows of every pipeline; each step is of another length."""
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
            parts.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
        yield parts


def in_one_piece(model: nn.Module, vocabulary: int, pipelines: int) -> list[float]:
    """Train the way everybody does; the losses."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer, losses = torch.optim.AdamW(weights, lr=RATE), []
    for parts in batches(vocabulary, pipelines):
        tokens = sum((part["labels"][:, 1:] != IGNORED).sum() for part in parts)
        total = 0.0
        for part in parts:
            logits = model(input_ids=part["input_ids"], attention_mask=part["attention_mask"])
            logits = logits.logits[:, :-1].flatten(0, 1)
            loss = F.cross_entropy(logits, part["labels"][:, 1:].flatten(), reduction="sum")
            (loss / tokens).backward()
            total += loss.item() / tokens.item()
        nn.utils.clip_grad_norm_(weights, LIMIT)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


def in_stages(
    model: nn.Module, vocabulary: int, processes: int, schedule: str, micro_batches: int
) -> tuple[list[float], Pipeline]:
    """Train in stages; the losses."""
    world = distributed.get_world_size()
    mesh = init_device_mesh(
        "cpu", (world // processes, processes), mesh_dim_names=("pipelines", "stages")
    )
    count = processes * (2 if schedule == "interleaved" else 1)
    layers = bare_model(model).config.num_hidden_layers
    stages = Stages(cut_layers([1.0] * layers, 0.0, 0.0, count), processes, mesh)
    bare = bare_model(model)
    ends = ends_of(bare)
    tied = keep_part(bare, ends, stages)
    own = views(bare, ends, stages)
    runner = Schedule(
        own,
        stages,
        schedule,
        micro_batches,
        width=bare.config.hidden_size,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    pipeline = Pipeline(model, own, stages, runner, tied, load=lambda: None).train()
    weights = [*pipeline.trained().values()]
    optimizer = torch.optim.AdamW(weights, lr=RATE) if weights else None
    losses = []
    for parts in batches(vocabulary, stages.pipelines):
        tokens = sum((part["labels"][:, 1:] != IGNORED).sum() for part in parts)
        losses.append(pipeline.train_step(parts[stages.pipeline], tokens).item())
        pipeline.clip(LIMIT)
        if optimizer:
            optimizer.step()
            optimizer.zero_grad()
    return losses, pipeline


def apart(case: dict) -> tuple[float, float]:
    """The largest difference between the losses of a step, and between the updates of what this
    process holds, relative to the update.
    """
    chosen = case["family"], case["tied"], case["lora"]
    before = {name: weight.detach() for name, weight in model_of(*chosen).named_parameters()}
    whole = model_of(*chosen)
    vocabulary = bare_model(whole).config.vocab_size
    pipelines = distributed.get_world_size() // case["processes"]
    wanted = in_one_piece(whole, vocabulary, pipelines)
    losses, pipeline = in_stages(
        model_of(*chosen), vocabulary, case["processes"], case["schedule"], case["micro_batches"]
    )
    trained = dict(whole.named_parameters())
    furthest = 0.0
    for name, weight in pipeline.trained().items():
        if name.endswith("k_proj.bias"):  # has no gradient but rounding
            continue
        update, right = weight.detach() - before[name], trained[name].detach() - before[name]
        if name.endswith("c_attn.bias"):  # the same, in its middle
            update, right = (torch.cat([*part.chunk(3)][::2]) for part in (update, right))
        furthest = max(furthest, ((update - right).norm() / right.norm()).item())
    return max(abs(a - b) for a, b in zip(losses, wanted, strict=True)), furthest


def main(cases: str, out: str) -> None:
    """Compare all cases and write what all processes found."""
    if not distributed.is_initialized():
        distributed.init_process_group("gloo")
    found = []
    for case in json.loads(Path(cases).read_text()):
        shares: list = [None] * distributed.get_world_size()
        distributed.all_gather_object(shares, apart(case))
        loss, update = (max(values) for values in zip(*shares, strict=True))
        found.append({**case, "loss": loss, "update": update})
        if distributed.get_rank() == 0:
            print(found[-1], flush=True)
    if distributed.get_rank() == 0:
        Path(out).write_text(json.dumps(found))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
