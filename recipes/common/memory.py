"""How much memory training takes: an estimate before it starts, and a meter for what it took."""

from __future__ import annotations

import copy
import ctypes
import heapq
import os
import threading
import time
import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import masking_utils

from common.batches import micro_batches
from common.encoding import IGNORED
from common.launch import fsdp_option, uses_fsdp

# Optimizer states per trained parameter and bytes of each, None: as many as the parameter itself.
# torch's docs and bitsandbytes' (whose 8-bit states have a float32 for each block of 256).
_STATES = {
    "adamw_torch": (2, None),
    "adamw_torch_fused": (2, None),
    "adamw_torch_8bit": (2, 1),
    "adamw_bnb_8bit": (2, 1 + 4 / 256),
    "adamw_8bit": (2, 1 + 4 / 256),
    "paged_adamw_8bit": (2, 1 + 4 / 256),
    "paged_adamw_32bit": (2, 4),
    "lion_8bit": (1, 1 + 4 / 256),
    "lion_32bit": (1, 4),
    "adagrad": (1, None),
    "rmsprop": (1, None),
    "sgd": (0, None),
}
_SMALLEST_8BIT = 4096  # elements; bitsandbytes keeps the states of smaller parameters in float32


@dataclass(frozen=True)
class MicroBatch:
    """The shape of one forward pass.

    Attributes:
        rows: examples.
        width: tokens of each, padding included.
        columns: positions that are projected onto the vocabulary, in every row.
        supervised: tokens that have a loss.
        padded: whether there is padding.
    """

    rows: int
    width: int
    columns: int
    supervised: int
    padded: bool


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes in one process at the moment when it holds the most.

    Attributes:
        parameters: with buffers; under FSDP this process's share and the layers that are whole at
            the same time.
        gradients: of the trained parameters, as far as they exist at that moment; with DDP also
            its buckets.
        optimizer: what the optimizer keeps from step to step.
        activations: what the forward pass saved for the backward pass, and what is being computed.
        logits: the projected positions over the vocabulary: scores, log-probabilities, gradients.
        note: what could not be taken into account; "" if nothing.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    note: str = ""

    @property
    def total(self) -> int:
        """The sum of the terms."""
        return self.parameters + self.gradients + self.optimizer + self.activations + self.logits

    def __str__(self) -> str:
        terms = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "note"}
        shown = " + ".join(f"{gib(value)} {name}" for name, value in terms.items() if value)
        return f"{gib(self.total)} GiB = {shown}" + f" ({self.note})" * bool(self.note)


def gib(size: int) -> str:
    """Bytes as GiB with two digits after the point, without the unit."""
    return f"{size / 2**30:.2f}"


def heaviest_batch(examples: Sequence[dict], training) -> MicroBatch:
    """The largest of the forward passes that training will make.

    Args:
        examples: `input_ids` and `labels` of each.
        training: the trainer's arguments.
    """
    lengths = [len(one["input_ids"]) for one in examples]
    batches = micro_batches(lengths, training)
    if training.max_steps > 0:
        groups = training.gradient_accumulation_steps * training.world_size
        batches = batches[: training.max_steps * groups]

    def slots(batch: list[int]) -> int:
        return len(batch) * max(lengths[index] for index in batch)

    # Equally wide ones differ in what is supervised; to look at all labels would take long.
    widest = heapq.nlargest(16, batches, key=slots)
    targets = [[examples[index]["labels"][1:] for index in batch] for batch in widest]
    positions = [
        [place for row in batch for place, label in enumerate(row) if label != IGNORED]
        for batch in targets
    ]
    rows, width = len(widest[0]), max(lengths[index] for index in widest[0])
    return MicroBatch(
        rows,
        width,
        columns=max(len(set(batch)) for batch in positions),
        supervised=max(map(len, positions)),
        padded=sum(lengths[index] for index in widest[0]) < rows * width,
    )


def estimate_memory(
    model: nn.Module,
    training,
    examples: Sequence[dict],
    *,
    processes: int | None = None,
) -> MemoryEstimate:
    """What one process will hold when it holds the most: in the backward pass or in the optimizer's
    step.

    Parameters, gradients and optimizer states are counted. Activations and logits come from a
    rehearsal: the model's own forward and backward pass with the loss of `RecipeTrainer`, in
    torch's FakeTensorMode, in which tensors have shapes but no memory; whatever is alive at the
    same time is added up, as torch.cuda.max_memory_allocated would. So the architecture, the
    attention kernel, adapters, autocast and recomputing count as they are. Of layers that are all
    alike two and three are rehearsed, the others added.

    Not in it: what an allocator keeps for reuse, the libraries' own buffers, and scoring.

    Args:
        model: before it is sharded; a PEFT model or a whole one, on any device, meta included.
        training: the trainer's arguments.
        examples: `input_ids` and `labels` of each, as they will be trained on.
        processes: how many share the work; `training.world_size` by default.
    """
    count = training.world_size if processes is None else processes
    sharded, offloaded = uses_fsdp(), fsdp_option("OFFLOAD_PARAMS") == "true"
    accumulated = training.gradient_accumulation_steps > 1
    layers = _layers(model)
    in_layers = {id(one) for layer in layers for one in layer.parameters()}
    trained = [one for one in model.parameters() if one.requires_grad]
    compute = {True: torch.bfloat16}.get(training.bf16, torch.float16 if training.fp16 else None)

    def stored(one: torch.Tensor) -> int:
        # accelerate's FSDP2 keeps what is trained in float32 where it computes in less.
        upcast = sharded and compute and one.requires_grad
        return one.numel() * (4 if upcast else one.element_size())

    def gathered(one: torch.Tensor) -> int:
        floating = compute and one.is_floating_point() and not hasattr(one, "quant_state")
        return one.numel() * (compute.itemsize if floating else one.element_size())

    share = count if sharded else 1
    parameters = sum(map(stored, model.parameters())) / share
    parameters += sum(one.numel() * one.element_size() for one in model.buffers())
    gradients = sum(map(stored, trained)) / share
    state, note = _optimizer_bytes(trained, training, stored)
    optimizer = state / share
    whole = buckets = scattered = 0
    if sharded and count > 1:
        # accelerate (`fsdp2_prepare_model`) never frees between forward and backward what is
        # outside the layers; of the layers one is computed while the next arrives, in a buffer
        # from which it is copied. Their gradients, too, are copied to be sent.
        outside = [one for one in model.parameters() if id(one) not in in_layers]
        largest = max((sum(map(gathered, layer.parameters())) for layer in layers), default=0)
        whole = sum(map(gathered, outside)) + 3 * largest
        if fsdp_option("RESHARD_AFTER_FORWARD") == "false":
            whole = sum(map(gathered, model.parameters()))
        scattered = sum(gathered(one) for one in outside if one.requires_grad)
    elif count > 1:
        buckets = gradients  # DistributedDataParallel sends copies
    if offloaded:
        note += f"; {gib(parameters + gradients + optimizer)} GiB more in the CPU's memory"
        parameters = gradients = optimizer = 0

    # What a gradient takes once it is computed: nothing where it is added to one of the step's
    # earlier ones; its share as soon as its layer's are distributed.
    weight = 0 if accumulated or offloaded else 1 / share
    weights = {id(one): weight if id(one) in in_layers or share == 1 else 1 for one in trained}
    before = gradients if accumulated else 0
    moments = [Counter(parameters=parameters, optimizer=optimizer, gradients=gradients + buckets)]
    try:
        peaks = _rehearse(model, training, heaviest_batch(examples, training), weights)
    except Exception as error:  # a model's own code may do anything that needs values
        reason = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:80]
        note += f"; without activations, which could not be rehearsed: {reason}"
        peaks = []
    for last, peak in enumerate(peaks):
        peak["parameters"] += parameters + whole
        peak["optimizer"] += optimizer
        peak["gradients"] += before + buckets + scattered * last
        moments.append(peak)
    highest = max(moments, key=Counter.total)
    return MemoryEstimate(**{name: round(size) for name, size in highest.items()}, note=note[2:])


def _optimizer_bytes(trained: list[nn.Parameter], training, stored) -> tuple[float, str]:
    """The size of the optimizer's states, and a note where it is a guess."""
    name = getattr(training.optim, "value", training.optim)
    if name == "adafactor":  # a row and a column in place of a matrix (Shazeer and Stern 2018)
        shapes = [(one.shape, stored(one) / max(one.numel(), 1)) for one in trained]
        return sum(
            size * (shape.numel() * (1 / shape[-1] + 1 / shape[-2]) if len(shape) > 1 else shape[0])
            for shape, size in shapes
        ), ""
    note = "" if name in _STATES else f"; the states of {name} taken to be AdamW's"
    states, size = _STATES.get(name, (2, None))
    states += name in ("sgd", "rmsprop") and "momentum" in (training.optim_args or "")
    small = _SMALLEST_8BIT if size and size < 2 else 0
    return states * sum(
        stored(one) if size is None else one.numel() * (4 if one.numel() < small else size)
        for one in trained
    ), note


# The rehearsal -----------------------------------------------------------------------------------


def _layers(model: nn.Module) -> list[nn.Module]:
    """The decoder layers: what FSDP wraps and activation checkpointing recomputes."""
    names = getattr(model, "_no_split_modules", None) or ()
    return [one for one in model.modules() if type(one).__name__ in names]


def _list_of_equals(model: nn.Module) -> nn.ModuleList | None:
    """The list that holds the layers, if there is one such list of more than three, all alike."""
    layers = _layers(model)
    lists = [one for one in model.modules() if isinstance(one, nn.ModuleList)]
    found = [one for one in lists if [*one] == layers]
    kinds = {
        tuple(
            (name, weight.shape, weight.dtype, weight.requires_grad)
            for name, weight in layer.named_parameters()
        )
        for layer in layers
    } | {*(getattr(model.config, "layer_types", None) or ())}
    mixed = len({*(getattr(model.config, "layer_types", None) or ())}) > 1
    return found[0] if found and len(layers) > 3 and len(kinds) == 1 and not mixed else None


def _rehearse(
    model: nn.Module, training, batch: MicroBatch, weights: dict[int, float]
) -> list[Counter]:
    """The largest sums of what is alive in a training step besides parameters and optimizer.

    Args:
        weights: what the finished gradient of a parameter (by its id) counts.

    Returns:
        Bytes of `activations`, `logits` and `gradients` at two moments: when the backward pass
        has reached the last layer at most, and when it has reached the first. In between, each
        layer exchanges the same activations for the same gradients, so nothing is larger.
    """
    alike = _list_of_equals(model)
    if alike is None:
        return _step(model, None, training, batch, weights, 0)
    two, three = (_step(model, alike, training, batch, weights, depth) for depth in (2, 3))
    more = len(alike) - 2
    return [
        Counter({kind: a[kind] + more * (b[kind] - a[kind]) for kind in {*a, *b}})
        for a, b in zip(two, three, strict=True)
    ]


class _Recorder(TorchDispatchMode):
    """Adds up what is alive, by kind, and keeps the highest sums: one before `phase` is 1, one
    when it is 2.
    """

    def __init__(self, vocabulary: torch.Size, padded: bool):
        super().__init__()
        self.vocabulary, self.padded = vocabulary, padded
        self.phase = 0
        self.peaks = [Counter(), Counter(), Counter()]
        self.alive: Counter = Counter()
        self.storages: dict[int, list] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            return not self.padded  # what a model asks of values: "are all tokens real?"
        out = func(*args, **(kwargs or {}))
        if func.namespace != "prim":
            for one in tree_leaves(out):
                if isinstance(one, torch.Tensor):
                    self._add(one)
        return out

    def ignore(self, tensor: torch.Tensor) -> None:
        """Do not count what was there before."""
        storage = tensor.untyped_storage()
        self.storages[storage._cdata] = [storage, None, 0]

    def finished(self, tensor: torch.Tensor, weight: float) -> None:
        """Count this tensor as the gradient that it now is."""
        entry = self.storages[tensor.untyped_storage()._cdata]
        self.alive[entry[1]] -= entry[2]
        entry[1:] = "gradients", tensor.untyped_storage().nbytes() * weight
        self.alive["gradients"] += entry[2]

    def _add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.storages:
            return
        kind = "logits" if tensor.shape[-1:] == self.vocabulary[:1] else "activations"
        if tensor.shape == self.vocabulary:  # of the head's weights, until it is finished
            kind = "gradients"
        self.storages[key] = [
            weakref.ref(storage, lambda _: self._drop(key)),
            kind,
            storage.nbytes(),
        ]
        self.alive[kind] += storage.nbytes()
        if self.alive.total() > self.peaks[self.phase].total():
            self.peaks[self.phase] = self.alive.copy()

    def _drop(self, key: int) -> None:
        _, kind, size = self.storages.pop(key)
        self.alive[kind] -= size


def _step(
    model: nn.Module,
    alike: nn.ModuleList | None,
    training,
    batch: MicroBatch,
    weights: dict[int, float],
    depth: int,
) -> list[Counter]:
    """The peaks of one training step of a hollow copy, with `depth` of the layers in `alike`."""
    device = training.device
    head = model.get_output_embeddings()
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    recorder = _Recorder(head.weight.shape if head is not None else torch.Size(), batch.padded)
    memo: dict = {}
    with fake:
        for one in [*model.parameters(), *model.buffers()]:
            hollow = torch.empty(one.shape, dtype=one.dtype, device=device)
            recorder.ignore(hollow)
            if isinstance(one, nn.Parameter):
                hollow = nn.Parameter(hollow, requires_grad=one.requires_grad)
                if one.requires_grad:
                    hollow.register_post_accumulate_grad_hook(
                        lambda weight, size=weights[id(one)]: recorder.finished(weight.grad, size)
                    )
            memo[id(one)] = hollow
    for module in model.modules():
        if (state := getattr(module, "quant_state", None)) is not None:
            memo[id(module)] = _Unpacking(state.shape, state.dtype, module.bias)
    if alike is not None:
        memo[id(alike)] = nn.ModuleList(copy.deepcopy(one, memo) for one in alike[:depth])
    copied = copy.deepcopy(model, memo).train()
    recomputed = fsdp_option("ACTIVATION_CHECKPOINTING") == "true"
    if training.activation_checkpointing or recomputed:
        copied.activation_checkpointing_enable(training.activation_checkpointing_kwargs)

    def mark(phase: int):
        def reached(gradient) -> None:
            recorder.phase = phase

        def hook(module, args, kwargs) -> None:
            for one in [*args, *kwargs.values()]:
                if isinstance(one, torch.Tensor) and one.requires_grad:
                    one.register_hook(reached)
                    return

        return hook

    if alike is not None:
        layers = memo[id(alike)]
        layers[-1].register_forward_pre_hook(mark(1), with_kwargs=True)
        layers[1].register_forward_pre_hook(mark(2), with_kwargs=True)
    # The mask functions would not ask a fake tensor for its values, and would never skip a mask.
    asking = mock.patch.object(masking_utils, "is_tracing", lambda *_: False)
    with asking, fake, recorder:
        _loss(copied, training, batch, device).backward()
    return [recorder.peaks[0], recorder.peaks[2]] if alike is not None else recorder.peaks[:1]


def _loss(model: nn.Module, training, batch: MicroBatch, device: torch.device) -> torch.Tensor:
    """`RecipeTrainer.compute_loss` for shapes: indices take the place of masks, whose number of
    elements depends on values.
    """
    dtype = torch.bfloat16 if training.bf16 else torch.float16
    tokens = torch.zeros(batch.rows, batch.width, dtype=torch.long, device=device)
    picked = torch.zeros(batch.supervised, dtype=torch.long, device=device)
    with torch.autocast(device.type, dtype, enabled=training.bf16 or training.fp16):
        logits = model(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            logits_to_keep=torch.arange(batch.columns, device=device),
            use_cache=False,
        ).logits
    if training.bf16 or training.fp16:
        logits = logits.float()  # as accelerate does with what a model returns
    return F.cross_entropy(logits[picked, picked].float(), picked, reduction="sum")


class _Unpacked(torch.autograd.Function):
    """A matrix product that unpacks its frozen weights for as long as it needs them."""

    @staticmethod
    def forward(ctx, inputs, shape, dtype):
        ctx.shape, ctx.dtype = shape, dtype
        return inputs @ torch.empty(shape, dtype=dtype, device=inputs.device).t()

    @staticmethod
    def backward(ctx, gradient):
        return (
            gradient @ torch.empty(ctx.shape, dtype=ctx.dtype, device=gradient.device),
            None,
            None,
        )


class _Unpacking(nn.Module):
    """Stands for bitsandbytes' 4-bit layer, whose kernels need values."""

    def __init__(self, shape: torch.Size, dtype: torch.dtype, bias: nn.Parameter | None):
        super().__init__()
        self.shape, self.dtype, self.has_bias = shape, dtype, bias is not None

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return _Unpacked.apply(inputs.to(self.dtype), self.shape, self.dtype)


# The meter ---------------------------------------------------------------------------------------


class _Mallinfo(ctypes.Structure):
    """glibc's `struct mallinfo2`."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
        ).split()
    ]


class MemoryMeter:
    """The memory that training takes beyond what the process held when the meter was made.

    Make it before the model is loaded, and `restart` it when training starts. On a GPU it reports
    `torch.cuda.max_memory_allocated` over all devices of this process. On CPU a thread samples the
    resident memory, less what glibc's heap holds free: as on a GPU, what is in use and not what is
    kept for reuse. In a heap that allocates aligned blocks, as torch's does, free holes of many
    shapes add up to as much again as is in use; how much depends on the order of everything before.
    """

    def __init__(self) -> None:
        import psutil

        self._process = psutil.Process()
        try:
            self._mallinfo = ctypes.CDLL(None).mallinfo2
            self._mallinfo.restype = _Mallinfo
        except (AttributeError, OSError, TypeError):  # another C library: the holes count
            self._mallinfo = None
        self._start = self._now()
        self.restart()
        self._stopped = threading.Event()
        threading.Thread(target=self._watch, name="memory meter", daemon=True).start()

    def restart(self) -> None:
        """Forget the peak so far; the level of the start stays."""
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            for device in range(torch.cuda.device_count()):
                torch.cuda.reset_peak_memory_stats(device)
        self._peak = self._start

    def _now(self) -> int:
        resident = self._process.memory_info().rss
        return resident - (self._mallinfo().fordblks if self._mallinfo else 0)

    def _watch(self) -> None:
        pause = 0.05
        while not self._stopped.wait(pause):
            start = time.thread_time()
            self._peak = max(self._peak, self._now())
            # glibc walks all holes, milliseconds in a heap that has many: a hundredth of the time.
            pause = max(0.05, 100 * (time.thread_time() - start))

    def stop(self) -> int:
        """End the sampling and return the peak in bytes."""
        self._stopped.set()
        if torch.cuda.is_available():
            return sum(map(torch.cuda.max_memory_allocated, range(torch.cuda.device_count())))
        return max(self._peak, self._now()) - self._start
