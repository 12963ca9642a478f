"""Who computes what: the stages of a model, the processes they stand in, and their weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from transformers import AutoConfig, set_seed
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from recipelib.encoding import Counts
from recipelib.models import (
    find_layers,
    hub_errors_in_one_line,
    load_pretrained,
    resolve_model,
    stored_config,
)
from recipelib.planning import cut_layers, layer_costs, skeleton
from recipelib.runtime import UserError, uses_fsdp

# Models whose forward pass takes the states of another process as `inputs_embeds` and does nothing
# to them but run the layers. Granite, for one, multiplies them first.
FAMILIES = ("gemma", "gemma2", "gemma3_text", "gpt2", "llama", "mistral", "qwen2", "qwen3")
VIRTUAL = 2  # stages that stand in each process when they are interleaved

# Options of the trainer that a pipeline cannot follow: the value it can, and why.
_CANNOT = {
    "gradient_accumulation_steps": (1, "--micro_batches says into how many parts a step is cut"),
    "packing": (False, "micro-batches in a pipeline have one shape"),
    "fp16": (False, "scales the loss by what one process sees; --bf16 true needs no scaling"),
    "neftune_noise_alpha": (None, "the noise would depend on the number of stages"),
    "use_liger_kernel": (False, "replaces the loss, which stands in another stage"),
    "torch_compile": (False, "is not used on stages"),
    "auto_find_batch_size": (False, "only one of the processes would run out of memory"),
    "activation_offloading": (False, "is not done in stages; see --activation_checkpointing"),
    "torch_empty_cache_steps": (None, "is not done in stages"),
    "dataloader_persistent_workers": (False, "the workers of a pipeline end with each pass"),
    "dataloader_prefetch_factor": (None, "is not passed on in a pipeline"),
    "dataloader_multiprocessing_context": (None, "is not passed on in a pipeline"),
}
_SAMPLING = ("group_by_length", "random", "sequential")


@dataclass(frozen=True)
class Stages:
    """The stages of a model and the processes that compute them, the first ones the first stage.

    With more processes than stages there are several pipelines side by side (data parallel), whose
    gradients are summed; neighboring processes hold the same stage. Interleaved, each process
    computes two stages (Narayanan et al. 2021, arXiv:2104.04473, section 2.2).

    Attributes:
        cut: the layers of each stage.
        processes: of one pipeline.
        mesh: of `stages` and `pipelines`; None for a single process.
    """

    cut: Sequence[range]
    processes: int
    mesh: DeviceMesh | None

    @classmethod
    def of(cls, args, training, counts: Counts) -> Stages:
        """Cut the model that a recipe's arguments name, without loading it.

        Args:
            args: a recipe's `stages` and `schedule`, and those that name its model.
            training: its `RecipeConfig`, which has set up the processes.
            counts: of the training tokens, since only supervised ones go through the head.
        Raises:
            UserError: a model of another family, or one with fewer layers than stages.
        """
        world, processes = training.world_size, args.stages or training.world_size
        _, config = _model_class(args)
        mesh = None
        if world > 1:
            # Neighbors hold the same stage: whole gradients stay within a node, if it has room.
            shape, names = (processes, world // processes), ("stages", "pipelines")
            mesh = init_device_mesh(training.device.type, shape, mesh_dim_names=names)
        supervised = counts.supervised_tokens / counts.tokens
        costs = layer_costs(skeleton(config, torch.float32), supervised)
        return cls(cut_layers(*costs, _count(args, processes)), processes, mesh)

    @property
    def pipelines(self) -> int:
        """How many pipelines there are side by side."""
        return 1 if self.mesh is None else self.mesh["pipelines"].size()

    @property
    def pipeline(self) -> int:
        """The number of this process's pipeline."""
        return 0 if self.mesh is None else self.mesh.get_local_rank("pipelines")

    @property
    def place(self) -> int:
        """This process's place in its pipeline."""
        return 0 if self.mesh is None else self.mesh.get_local_rank("stages")

    @property
    def own(self) -> range:
        """The numbers of the stages that this process computes."""
        return self.of_process(self.place)

    def of_process(self, place: int) -> range:
        """The numbers of the stages that the process at a place of a pipeline computes."""
        return range(place, len(self.cut), self.processes)

    @property
    def own_layers(self) -> set[int]:
        """The layers that this process computes."""
        return {layer for stage in self.own for layer in self.cut[stage]}

    @property
    def is_first(self) -> bool:
        """Whether this process holds the first stage, to which the tokens go."""
        return self.place == 0

    @property
    def is_last(self) -> bool:
        """Whether this process holds the last stage, which has the loss."""
        return self.place == self.processes - 1

    def from_all(self, found: Any) -> list:
        """What each process of this pipeline has found, in their order; all have to call."""
        every = [found]
        if self.mesh is not None:
            every = [None] * self.processes
            distributed.all_gather_object(every, found, group=self.group("stages"))
        return every

    def group(self, dimension: str) -> distributed.ProcessGroup | None:
        """The processes along a dimension of the mesh, `pipelines` or `stages`."""
        return None if self.mesh is None else self.mesh.get_group(dimension)


def check_pipeline(args, training) -> None:
    """Refuse what a pipeline cannot do, before rows are prepared.

    Args:
        args: a recipe's `stages`, `schedule`, `micro_batches`, and those that name its model.
        training: its `RecipeConfig`.
    Raises:
        UserError: an option of the trainer that cannot be followed, a model of another family, or
            numbers of stages or micro-batches that do not fit.
    """
    for name, (value, why) in _CANNOT.items():
        if (getattr(training, name) or value) != value:
            raise UserError(f"--{name}: {why}; leave it out")
    if args.streaming:
        raise UserError("--streaming: each process would read other rows; leave it out")
    if training.train_sampling_strategy not in _SAMPLING:
        raise UserError(
            f"--train_sampling_strategy {training.train_sampling_strategy}: the parts of a step "
            f"have one length in a pipeline; take {', '.join(_SAMPLING)}"
        )
    if uses_fsdp():
        raise UserError(
            "the accelerate config asks for FSDP, whose place a pipeline takes; launch with "
            "accelerate_configs/pipeline.yaml"
        )
    processes, parts = args.stages or training.world_size, args.micro_batches
    if training.world_size % processes:
        raise UserError(
            f"--stages {processes}: the number of started processes, {training.world_size}, is no "
            "multiple; start as many as stages, or two or three times as many"
        )
    if args.schedule == "1f1b" and parts < processes:
        raise UserError(
            "--schedule 1f1b: needs as many micro-batches as stages; raise --micro_batches to "
            f"{processes}, or take gpipe"
        )
    rounds = max(1, parts // processes)
    if args.schedule == "interleaved" and parts % rounds:
        raise UserError(
            f"--schedule interleaved: --micro_batches {parts} is no multiple of {rounds}; take "
            f"{parts // rounds * rounds}"
        )
    _, config = _model_class(args)
    cut_layers([1.0] * config.num_hidden_layers, 0.0, 0.0, _count(args, processes))


def _count(args, processes: int) -> int:
    """How many stages there are, those that stand in the same process included."""
    return processes * (VIRTUAL if args.schedule == "interleaved" and processes > 1 else 1)


def _model_class(args) -> tuple[type, Any]:
    """The class of the model that a recipe's arguments name, and its configuration.

    Raises:
        UserError: a model that is not cut here.
    """
    name = args.model_name_or_path
    kind = stored_config(name, revision=args.revision).get("model_type")
    if kind not in FAMILIES:
        raise UserError(
            f"--model_name_or_path {name}: models of type {kind} are not cut into stages here; "
            f"take one of {', '.join(FAMILIES)}, or another recipe with "
            "accelerate_configs/fsdp2.yaml"
        )
    source = resolve_model(name)
    with hub_errors_in_one_line(name or "the bundled model", source, args.revision):
        config = AutoConfig.from_pretrained(source, revision=args.revision or "main")
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], config


def load_part(args, training, stages: Stages, *, float32: bool = False):
    """The model of a recipe's arguments with the weights of this process's layers; the others are
    only shapes, on the meta device. Then the seed is set. What is drawn next for all layers, such
    as adapters, is the same in each process and whatever the number of stages.

    Args:
        float32: as in `load_model`.
    Raises:
        UserError: as `load_pretrained`.
    """
    kind, _ = _model_class(args)
    others: dict[int, nn.Module] = {}

    def make(self, config, *rest, **options) -> None:
        kind.__init__(self, config, *rest, **options)
        layers = find_layers(self).layers
        for number in {*range(len(layers))} - stages.own_layers:
            others[number], layers[number] = layers[number], nn.Identity()

    # transformers reads what the model has room for, and takes the rest of a file as unexpected.
    part = type(
        kind.__name__,
        (kind,),
        {
            "__init__": make,
            "__module__": kind.__module__,
            "_keys_to_ignore_on_load_unexpected": [".*"],
        },
    )
    model = load_pretrained(
        args.model_name_or_path,
        dtype=torch.float32 if float32 else training.model_dtype[0],
        revision=args.revision,
        attn_implementation=args.attn_implementation,
        model_class=part,
    )
    model.__class__ = kind
    layers = find_layers(model).layers
    for number, layer in others.items():
        layers[number] = layer
    set_seed(training.seed)
    return model
