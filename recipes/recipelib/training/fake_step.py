"""A training step without values: what is alive at the same time, before anything is trained."""

from __future__ import annotations

import copy
import heapq
import itertools
import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import masking_utils

from recipelib.encoding import IGNORED, EncodedRows
from recipelib.models import decoder_layers, logits_at
from recipelib.runtime import fsdp_option
from recipelib.training.batches import micro_batches
from recipelib.training.packing import RowsApart

_LOOKED_AT = 16  # of the widest micro-batches the labels are read; to read all would take long


@dataclass(frozen=True)
class MicroBatch:
    """The shape of one forward pass.

    Attributes:
        rows: examples; with packing the one line that they stand in.
        width: tokens of each row, padding included.
        supervised: tokens that have a loss, and so are projected onto the vocabulary.
        padded: whether there is padding.
        lengths: tokens of each example in the line; empty without packing.
    """

    rows: int
    width: int
    supervised: int
    padded: bool
    lengths: tuple[int, ...] = ()


class Count(NamedTuple):
    """From one moment of a step on, a storage counts as so many bytes.

    Attributes:
        phase: 0; 1 once the backward pass has left the last layer, 2 the second.
        storage: its number.
        kind: `activations`, `logits` or `gradients`.
        size: bytes; 0 once nothing refers to it.
        made: whether it has just been made.
        weight: id of a trained parameter whose gradient it is: it counts with the share that stays.
    """

    phase: int
    storage: int
    kind: str
    size: int
    made: bool = False
    weight: int | None = None


Loss = Callable[[nn.Module, Any, MicroBatch], torch.Tensor]
# Model, micro-batch, how many layers are computed, whether these are all -> what was counted.
Steps = dict[tuple[nn.Module, MicroBatch, int, bool], list[Count]]


def heaviest_batch(encoded: EncodedRows, training) -> MicroBatch:
    """The largest of the forward passes that training will make.

    Args:
        encoded: the training examples.
        training: the trainer's arguments.
    """
    lengths, labels = encoded.lengths.tolist(), encoded.examples.select_columns("labels")
    batches = micro_batches(lengths, training)
    if training.max_steps > 0:
        groups = training.gradient_accumulation_steps * training.world_size
        batches = batches[: training.max_steps * groups]

    def shape(batch: list[int]) -> tuple[int, int]:
        if training.packing:
            return 1, sum(lengths[index] for index in batch)
        return len(batch), max(lengths[index] for index in batch)

    widest = heapq.nlargest(_LOOKED_AT, batches, key=lambda batch: math.prod(shape(batch)))
    most = max(
        sum(label != IGNORED for index in batch for label in labels[index]["labels"][1:])
        for batch in widest
    )
    rows, width = shape(widest[0])
    together = tuple(lengths[index] for index in widest[0])
    return MicroBatch(
        rows=rows,
        width=width,
        supervised=most,
        padded=len({*together}) > 1 and not training.packing,
        lengths=together if training.packing else (),
    )


def step_peaks(
    model: nn.Module,
    training,
    batch: MicroBatch,
    weights: Mapping[int, float],
    loss: Loss | None = None,
    steps: Steps | None = None,
) -> list[Counter]:
    """The highest sums of what is alive in a training step besides parameters and optimizer.

    A copy of the model whose tensors are only shapes (torch's FakeTensorMode) makes the forward and
    backward pass of `RecipeTrainer`. A tensor counts from the operator that makes it to the moment
    when nothing refers to it any more, as in `torch.cuda.max_memory_allocated`. Where the decoder
    layers are all alike, models of two and of three of them are computed, and the difference is
    added once for each further layer, which is exact.

    Args:
        model: whole, on any device.
        training: the trainer's arguments.
        batch: the shape of the forward pass.
        weights: id of a trained parameter -> the share of its gradient that counts once it is
            computed: 1 where all of it stays in this process.
        loss: a function of a model, the trainer's arguments and a batch; by default
            `RecipeTrainer`'s loss.
        steps: those of earlier calls, whose `training` and `loss` were the same: what is among them
            is not computed again, be it for other weights or for a model that has got fewer layers
            since, and what is not is added.

    Returns:
        Bytes of `activations`, `logits` and `gradients` at two moments: when the backward pass is
        in the head or the last layer, and when it is in the first. In between each layer frees the
        same activations and adds the same gradients, so no sum is higher. Where the layers differ,
        only the highest sum.
    """
    steps = {} if steps is None else steps
    alike = _list_of_equals(model)

    def peaks(depth: int) -> list[Counter]:
        key = (model, batch, depth, alike is None)
        if key not in steps:
            shortened = None if alike is None else (alike, depth)
            steps[key] = _step(model, shortened, training, batch, loss)
        return _highest_sums(steps[key], weights)

    if alike is None:
        return peaks(len(decoder_layers(model)))[:1]
    two, three = (peaks(depth)[::2] for depth in (2, 3))
    more = len(alike) - 2
    return [
        Counter(
            {
                kind: at_two[kind] + more * (at_three[kind] - at_two[kind])
                for kind in {*at_two, *at_three}
            }
        )
        for at_two, at_three in zip(two, three, strict=True)
    ]


def _list_of_equals(model: nn.Module) -> nn.ModuleList | None:
    """The list of the decoder layers, if they stand in one list of more than three, all alike."""
    layers = decoder_layers(model)
    lists = [
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and [*module] == layers
    ]
    weights = {
        tuple(
            (name, parameter.shape, parameter.dtype, parameter.requires_grad)
            for name, parameter in layer.named_parameters()
        )
        for layer in layers
    }
    attention = {*(getattr(model.config, "layer_types", None) or ())}
    same = len(layers) > 3 and len(weights) == 1 and len(attention) <= 1
    return lists[0] if lists and same else None


def _highest_sums(counts: Iterable[Count], weights: Mapping[int, float]) -> list[Counter]:
    """Of each of the three phases of a step, by kind."""
    peaks = [Counter(), Counter(), Counter()]
    alive: Counter = Counter()
    counted: dict[int, tuple[str, float]] = {}
    for count in counts:
        kind, before = counted.pop(count.storage, (count.kind, 0))
        share = 1 if count.weight is None else weights[count.weight]
        counted[count.storage] = count.kind, count.size * share
        alive[kind] -= before
        alive[count.kind] += count.size * share
        if count.made and alive.total() > peaks[count.phase].total():
            peaks[count.phase] = alive.copy()
    return peaks


class _Recorder(TorchDispatchMode):
    """Writes down what is made, and when nothing refers to it any more."""

    def __init__(self, vocabulary: torch.Size, padded: bool):
        super().__init__()
        self.vocabulary, self.padded = vocabulary, padded
        self.phase = 0
        self.counts: list[Count] = []
        # Of each storage: itself or a weak reference, and its number.
        self.storages: dict[int, tuple[Any, int]] = {}
        self.numbers = itertools.count()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            return not self.padded  # all that models ask of values: is no token padding?
        if func is torch.ops.prim.device.default:
            return args[0].device  # autograd asks thousands of times: spare the dispatch below
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out) if func.namespace == "aten" else ():
            if isinstance(leaf, torch.Tensor):
                self._add(leaf)
        return out

    def ignore(self, tensor: torch.Tensor) -> None:
        """Do not count a tensor: it is a parameter or buffer."""
        storage = tensor.untyped_storage()
        self.storages[storage._cdata] = storage, next(self.numbers)

    def finished(self, gradient: torch.Tensor, weight: int) -> None:
        """Count a parameter's gradient from now on with the share of it that stays.

        Args:
            weight: the parameter's id.
        """
        storage = gradient.untyped_storage()
        number = self.storages[storage._cdata][1]
        self._count(number, "gradients", storage.nbytes(), weight=weight)

    def _add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.storages:
            return
        kind = "logits" if tensor.shape[-1:] == self.vocabulary[:1] else "activations"
        if tensor.shape == self.vocabulary:  # the gradient of the head's weights
            kind = "gradients"
        number = next(self.numbers)
        self.storages[key] = weakref.ref(storage, lambda _: self._drop(key)), number
        self._count(number, kind, storage.nbytes(), made=True)

    def _drop(self, key: int) -> None:
        _, number = self.storages.pop(key)
        self._count(number, "activations", 0)

    def _count(self, *what, **more) -> None:
        self.counts.append(Count(self.phase, *what, **more))


def _step(
    model: nn.Module,
    shortened: tuple[nn.ModuleList, int] | None,
    training,
    batch: MicroBatch,
    loss: Loss | None,
) -> list[Count]:
    """What is counted in one step. `shortened`: the list of the layers, and how many to keep."""
    head = model.get_output_embeddings()
    weight = getattr(head, "weight", None)  # another process may hold it
    recorder = _Recorder(torch.Size() if weight is None else weight.shape, batch.padded)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    stand_ins: dict[int, Any] = {}  # id of a tensor or module -> what the copy has in its place

    def watch(parameter: nn.Parameter, weight: int) -> None:
        def finish(parameter: nn.Parameter) -> None:
            recorder.finished(parameter.grad, weight)

        parameter.register_post_accumulate_grad_hook(finish)

    whole, depth = ([], 0) if shortened is None else shortened
    kept, dropped = [*whole][:depth], [*whole][depth:]
    # Without those of dropped layers, for making a shape takes as long as an operator.
    modules = [module for _, module in model.named_modules(memo={*dropped} - {*kept})]
    tensors = {
        id(tensor): tensor
        for module in modules
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))
    }
    with fake:
        for key, tensor in tensors.items():
            shape = torch.empty(tensor.shape, dtype=tensor.dtype, device=training.device)
            recorder.ignore(shape)
            if isinstance(tensor, nn.Parameter):
                shape = nn.Parameter(shape, requires_grad=tensor.requires_grad)
            if tensor.requires_grad:
                watch(shape, key)
            stand_ins[key] = shape
    for module in modules:
        if (state := getattr(module, "quant_state", None)) is not None:
            stand_ins[id(module)] = _Unpacking(state.shape, state.dtype, training.device)
    if shortened is not None:
        layers = nn.ModuleList(copy.deepcopy(layer, stand_ins) for layer in kept)
        layers[-1].register_forward_pre_hook(_on_gradient(recorder, 1), with_kwargs=True)
        layers[1].register_forward_pre_hook(_on_gradient(recorder, 2), with_kwargs=True)
        stand_ins[id(whole)] = layers
    copied = copy.deepcopy(model, stand_ins).train()
    for module in copied.modules():
        module.__dict__.pop("forward", None)  # that of TRL's fused head would run the original
    recomputed = fsdp_option("ACTIVATION_CHECKPOINTING") == "true"
    if training.activation_checkpointing or recomputed:
        copied.activation_checkpointing_enable(training.activation_checkpointing_kwargs)
    # transformers takes fake tensors for tracing: it would ask no values and always make masks.
    asking = mock.patch.object(masking_utils, "is_tracing", return_value=False)
    with asking, RowsApart(batch.lengths) if batch.lengths else nullcontext(), fake, recorder:
        (loss or _loss)(copied, training, batch).backward()
    return recorder.counts


def _on_gradient(recorder: _Recorder, phase: int):
    """A hook on a layer that begins a phase once the gradient of the layer's input is there."""

    def begin(gradient: torch.Tensor) -> None:
        recorder.phase = phase

    def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
        inputs = [value for value in [*args, *kwargs.values()] if isinstance(value, torch.Tensor)]
        next(tensor for tensor in inputs if tensor.requires_grad).register_hook(begin)

    return hook


def _loss(model: nn.Module, training, batch: MicroBatch) -> torch.Tensor:
    """`RecipeTrainer.compute_loss` for shapes. A mask picks as many elements as its values say, and
    there are no values, so indices pick as many as the batch says.
    """
    device, halved = training.device, training.bf16 or training.fp16
    tokens = torch.zeros(batch.rows, batch.width, dtype=torch.long, device=device)
    picked = torch.zeros(batch.supervised, dtype=torch.long, device=device)
    dtype = torch.float16 if training.fp16 else torch.bfloat16
    with (
        torch.autocast(device.type, dtype, enabled=halved),
        logits_at(model, torch.stack([picked, picked], 1), batch.width),
    ):
        logits = model(
            input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False
        ).logits
    if halved:
        logits = logits.float()  # as accelerate does with what comes out of autocast
    return F.cross_entropy(logits[0].float(), picked, reduction="sum")


class _Unpacked(torch.autograd.Function):
    """A product with frozen weights, [out, in], that exist only while it is computed."""

    @staticmethod
    def forward(ctx, inputs, shape, dtype):
        ctx.shape, ctx.dtype = shape, dtype
        return inputs @ torch.empty(shape, dtype=dtype, device=inputs.device).t()

    @staticmethod
    def backward(ctx, gradient):
        weight = torch.empty(ctx.shape, dtype=ctx.dtype, device=gradient.device)
        return gradient @ weight, None, None


class _Unpacking(nn.Module):
    """Stands in for a 4-bit layer of bitsandbytes, whose kernels need values."""

    bias = None  # no part of the memory that counts

    def __init__(self, shape: torch.Size, dtype: torch.dtype, device: torch.device):
        super().__init__()
        self.shape, self.dtype, self.device = shape, dtype, device

    @property
    def weight(self) -> torch.Tensor:
        """The weights, unpacked, which DoRA asks for."""
        return torch.empty(self.shape, dtype=self.dtype, device=self.device)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return _Unpacked.apply(inputs.to(self.dtype), self.shape, self.dtype)
