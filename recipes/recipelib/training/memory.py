"""How much memory training will take: an estimate beforehand."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from recipelib.encoding import EncodedRows
from recipelib.models import decoder_layers
from recipelib.runtime import fsdp_option, gib, uses_fsdp
from recipelib.training.fake_step import Loss, MicroBatch, Steps, heaviest_batch, step_peaks

_BLOCKWISE = 1 + 4 / 256  # bytes: bitsandbytes keeps a float32 for every 256 states of 8 bits

# How many states an optimizer keeps for each trained parameter, and the bytes of one; None: as many
# as the parameter's dtype has. From torch.optim, bitsandbytes.optim and torchao's 8-bit AdamW.
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
_SMALLEST_8BIT = 4096  # elements; states of smaller parameters have 32 bits


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that one process holds at the moment when it holds the most: in the backward pass or
    in the optimizer's step.

    Attributes:
        parameters: with buffers. Under FSDP the process's share, and what is gathered beside it.
        gradients: those that exist at that moment; under DDP with the copies that are sent.
        optimizer: its states, which exist from the second step on.
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


class Sharding(NamedTuple):
    """Whether FSDP divides what the processes hold, and how.

    Attributes:
        sharded: whether it does.
        offloaded: whether the shards stand in the CPU's memory.
        resharded: whether a layer is divided again after its forward pass.
    """

    sharded: bool = False
    offloaded: bool = False
    resharded: bool = True

    @classmethod
    def launched(cls) -> Sharding:
        """That of the accelerate config which launched this process."""
        return cls(
            sharded=uses_fsdp(),
            offloaded=fsdp_option("OFFLOAD_PARAMS") == "true",
            resharded=fsdp_option("RESHARD_AFTER_FORWARD") != "false",
        )


def estimate_memory(
    model: nn.Module,
    training,
    encoded: EncodedRows | MicroBatch,
    loss: Loss | None = None,
    sharding: Sharding | None = None,
    steps: Steps | None = None,
) -> MemoryEstimate:
    """What training will need in each process.

    Parameters, gradients and optimizer states are counted; activations and logits are those of a
    fake step (`fake_step.py`) with the largest micro-batch, so that architecture, attention kernel,
    adapters, autocast and recomputing count as they are. It takes about a second.

    FSDP divides parameters, gradients and states by the number of processes. Whole beside these are
    what lies outside the decoder layers (accelerate's `fsdp2_prepare_model` keeps it gathered from
    the forward to the backward pass) and three times the largest layer: the one that is computed,
    the next one, and the buffer through which that one arrives.

    Not counted: what the allocator keeps for reuse, the libraries' buffers, the scoring of tasks.

    Args:
        model: a PEFT model or a whole one before it is sharded, on any device, meta included.
        training: the trainer's arguments.
        encoded: the training examples; or the largest micro-batch of them.
        loss: the fake step's, if it is not `RecipeTrainer`'s.
        sharding: that of the accelerate config which launched this process, by default.
        steps: earlier fake steps, see `step_peaks`.
    """
    sharding = Sharding.launched() if sharding is None else sharding
    batch = encoded if isinstance(encoded, MicroBatch) else heaviest_batch(encoded, training)
    sharded = sharding.sharded
    share = training.world_size if sharded else 1
    halved = sharded and (training.bf16 or training.fp16)
    weights = [*model.parameters()]
    trained = [weight for weight in weights if weight.requires_grad]
    layers = decoder_layers(model)
    inside = {id(weight) for layer in layers for weight in layer.parameters()}
    outside = [weight for weight in weights if id(weight) not in inside]

    def stored(weight: nn.Parameter) -> int:
        # accelerate keeps in float32 what FSDP trains in 16 bits.
        return weight.numel() * (4 if halved and weight.requires_grad else weight.element_size())

    def gathered(weight: nn.Parameter) -> int:
        packed = hasattr(weight, "quant_state")
        return weight.numel() * (2 if halved and not packed else weight.element_size())

    parameters = sum(map(stored, weights)) / share
    gradients = sum(map(stored, trained)) / share
    states, notes = optimizer_bytes(trained, training, stored)
    optimizer = states / share
    offloaded = sharded and sharding.offloaded
    if offloaded:
        notes.append(f"{gib(parameters + gradients + optimizer)} GiB more in the CPU's memory")
        parameters = gradients = optimizer = 0
    parameters += sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())

    # DistributedDataParallel sends copies of the gradients, and keeps them.
    copies = gradients if training.world_size > 1 and not sharded else 0
    accumulated = training.gradient_accumulation_steps > 1
    earlier = gradients if accumulated else 0
    whole = sent = 0
    if sharded:
        largest = max((sum(map(gathered, layer.parameters())) for layer in layers), default=0)
        whole = sum(map(gathered, outside)) + 3 * largest
        if not sharding.resharded:
            whole = sum(map(gathered, weights))
        # The gradients outside the layers are complete last, and are copied to be sent.
        sent = sum(gathered(weight) for weight in outside if weight.requires_grad)
    # The share of a new gradient that stays: none where it is added to an earlier one or sent to
    # the CPU.
    stays = 0 if accumulated or offloaded else 1 / share
    shares = {
        id(weight): 1 if sharded and id(weight) not in inside else stays for weight in trained
    }

    step = Counter(parameters=parameters, gradients=gradients + copies, optimizer=optimizer)
    moments = [step]
    logging.disable(logging.ERROR)  # torch logs what it raises
    try:
        peaks = step_peaks(model, training, batch, shares, loss, steps)
    except Exception as error:  # a model's own code may do anything; an estimate must not end a run
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


def optimizer_bytes(
    trained: Sequence[nn.Parameter], training, stored: Callable[[nn.Parameter], int]
) -> tuple[float, list[str]]:
    """The bytes of the optimizer's states, and a note if they are a guess.

    Args:
        trained: the parameters that it updates.
        training: the trainer's `optim` and `optim_args`.
        stored: the bytes of a parameter as the optimizer holds it.
    """
    name = getattr(training.optim, "value", training.optim)
    if name == "adafactor":  # a row and a column for each matrix (Shazeer and Stern 2018)
        return sum(
            stored(weight)
            * (1 / weight.shape[-1] + 1 / weight.shape[-2] if weight.dim() > 1 else 1)
            for weight in trained
        ), []
    states, size = _STATES.get(name, (2, None))
    if name in ("sgd", "rmsprop") and "momentum" in (training.optim_args or ""):
        states += 1
    total = 0.0
    for weight in trained:
        if size is None:
            state_bytes = stored(weight)
        elif size == _BLOCKWISE and weight.numel() < _SMALLEST_8BIT:
            state_bytes = 4 * weight.numel()
        else:
            state_bytes = size * weight.numel()
        total += states * state_bytes
    return total, [] if name in _STATES else [f"{name} counted as AdamW"]
