"""How much memory training takes: an estimate beforehand, and a meter for what it took."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from recipelib.models import decoder_layers
from recipelib.runtime import fsdp_option, gib, uses_fsdp
from recipelib.training.fake_step import Loss, MicroBatch, heaviest_batch, step_peaks

_BLOCKWISE = 1 + 4 / 256  # bytes: bitsandbytes keeps a float32 for 256 states of 8 bits

# How many states an optimizer keeps of each trained parameter, and the bytes of one; None: of the
# parameter's own dtype. From torch.optim, bitsandbytes.optim and torchao's 8-bit AdamW.
_STATES = {
    "adamw_torch": (2, None),
    "adamw_torch_fused": (2, None),
    "adamw_torch_8bit": (2, _BLOCKWISE),
    "adamw_8bit": (2, _BLOCKWISE),
    "adamw_bnb_8bit": (2, _BLOCKWISE),
    "paged_adamw_8bit": (2, _BLOCKWISE),
    "paged_adamw_32bit": (2, 4),
    "lion_8bit": (1, _BLOCKWISE),
    "lion_32bit": (1, 4),
    "adagrad": (1, None),
    "rmsprop": (1, None),
    "sgd": (0, None),
}
_SMALLEST_8BIT = 4096  # elements; smaller parameters have states of 32 bits


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that one process holds at the moment when it holds the most: in the backward pass or
    in the optimizer's step.

    Attributes:
        parameters: with buffers. Under FSDP the process's share, and what is whole beside it.
        gradients: as many as exist at that moment; under DDP with their copies that are sent.
        optimizer: its states, from the second step on.
        activations: what the forward pass saved, and what the backward pass is computing.
        logits: whatever has the vocabulary as its last dimension: scores, log-probabilities and
            their gradients.
        note: what the estimate could not take into account; "" if nothing.
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
        return sum(self._terms().values())

    def _terms(self) -> dict[str, int]:
        return {name: size for name, size in vars(self).items() if name != "note"}

    def __str__(self) -> str:
        terms = [f"{gib(size)} {name}" for name, size in self._terms().items() if size >= 2**20]
        note = f"; {self.note}" if self.note else ""
        return f"{gib(self.total)} GiB = {' + '.join(terms)} (estimate{note})"


def estimate_memory(
    model: nn.Module, training, examples: Sequence[dict] | MicroBatch, loss: Loss | None = None
) -> MemoryEstimate:
    """What training will need in each process, for the accelerate config that launched it.

    Parameters, gradients and optimizer states are counted; activations and logits are those of a
    fake step (`fake_step.py`) of the largest micro-batch, so that the architecture, its
    attention kernel, adapters, autocast and recomputing count as they are. Takes a second or less.

    FSDP divides parameters, gradients and states by the number of processes. Whole beside them are
    what lies outside the decoder layers (accelerate's `fsdp2_prepare_model` keeps it gathered from
    the forward to the backward pass) and three times the largest layer: the one that is computed,
    the next one, and the buffer through which that arrives.

    Not in it: what an allocator keeps for reuse, buffers of the libraries, the scoring of tasks.

    Args:
        model: a PEFT model or a whole one before it is sharded, on any device, meta included.
        training: the trainer's arguments.
        examples: `input_ids` and `labels` of each; or the largest micro-batch of them.
        loss: of the fake step, if it is not `RecipeTrainer`'s.
    """
    batch = examples
    if not isinstance(batch, MicroBatch):
        batch = heaviest_batch(examples, training)
    sharded = uses_fsdp()
    share = training.world_size if sharded else 1
    halved = sharded and (training.bf16 or training.fp16)
    weights = [*model.parameters()]
    trained = [one for one in weights if one.requires_grad]
    layers = decoder_layers(model)
    inside = {id(one) for layer in layers for one in layer.parameters()}
    outside = [one for one in weights if id(one) not in inside]

    def stored(one: nn.Parameter) -> int:
        # accelerate keeps in float32 what FSDP trains in less.
        return one.numel() * (4 if halved and one.requires_grad else one.element_size())

    def gathered(one: nn.Parameter) -> int:
        packed = hasattr(one, "quant_state")
        return one.numel() * (2 if halved and not packed else one.element_size())

    parameters = sum(map(stored, weights)) / share
    gradients = sum(map(stored, trained)) / share
    states, notes = _optimizer_bytes(trained, training, stored)
    optimizer = states / share
    offloaded = sharded and fsdp_option("OFFLOAD_PARAMS") == "true"
    if offloaded:
        notes.append(f"{gib(parameters + gradients + optimizer)} GiB more in the CPU's memory")
        parameters = gradients = optimizer = 0
    parameters += sum(one.numel() * one.element_size() for one in model.buffers())

    # DistributedDataParallel sends copies of the gradients, and keeps them.
    copies = gradients if training.world_size > 1 and not sharded else 0
    accumulated = training.gradient_accumulation_steps > 1
    earlier = gradients if accumulated else 0
    whole = sent = 0
    if sharded:
        largest = max((sum(map(gathered, one.parameters())) for one in layers), default=0)
        whole = sum(map(gathered, outside)) + 3 * largest
        if fsdp_option("RESHARD_AFTER_FORWARD") == "false":
            whole = sum(map(gathered, weights))
        # The gradients outside the layers are complete last, and are copied to be sent.
        sent = sum(gathered(one) for one in outside if one.requires_grad)
    # What stays of a new gradient: nothing where it is added to an earlier one or sent to the CPU.
    stays = 0 if accumulated or offloaded else 1 / share
    parts = {id(one): 1 if sharded and id(one) not in inside else stays for one in trained}

    step = Counter(parameters=parameters, gradients=gradients + copies, optimizer=optimizer)
    moments = [step]
    logging.disable(logging.ERROR)  # torch logs what it raises
    try:
        peaks = step_peaks(model, training, batch, parts, loss)
    except Exception as error:  # a model's own code may do anything, and an estimate ends no run
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:80]
        notes.append(f"without activations, for the fake step failed: {reason}")
        peaks = [Counter()]
    finally:
        logging.disable(logging.NOTSET)
    for number, peak in enumerate(reversed(peaks)):
        peak["parameters"] += parameters + whole
        peak["gradients"] += earlier + copies + (sent if number == 0 else 0)
        peak["optimizer"] += optimizer
        moments.append(peak)
    highest = max(moments, key=Counter.total)
    terms = [name for name in MemoryEstimate.__annotations__ if name != "note"]
    return MemoryEstimate(**{name: round(highest[name]) for name in terms}, note="; ".join(notes))


def _optimizer_bytes(
    trained: Sequence[nn.Parameter], training, stored: Callable[[nn.Parameter], int]
) -> tuple[float, list[str]]:
    """The size of the optimizer's states, and a note where it is a guess."""
    name = getattr(training.optim, "value", training.optim)
    if name == "adafactor":  # a row and a column for each matrix (Shazeer and Stern 2018)
        return sum(
            stored(one) * (1 / one.shape[-1] + 1 / one.shape[-2] if one.dim() > 1 else 1)
            for one in trained
        ), []
    states, size = _STATES.get(name, (2, None))
    if name in ("sgd", "rmsprop") and "momentum" in (training.optim_args or ""):
        states += 1
    total = 0.0
    for one in trained:
        small = size == _BLOCKWISE and one.numel() < _SMALLEST_8BIT
        total += states * (stored(one) if size is None else one.numel() * (4 if small else size))
    return total, [] if name in _STATES else [f"{name} counted as AdamW"]


# The meter ---------------------------------------------------------------------------------------
