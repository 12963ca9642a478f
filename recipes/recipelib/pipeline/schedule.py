"""Micro-batches on their way through the stages, forward and back."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
)

from recipelib.encoding import IGNORED
from recipelib.pipeline.stage import Stage
from recipelib.pipeline.stages import Stages

Batch = Mapping[str, torch.Tensor]


class Stopwatch:
    """How long this process computes, by the GPU's own clock if it has one."""

    def __init__(self, device: torch.device):
        self.device, self._seconds = device, 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """A context whose time counts."""
        if self.device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self._events.append((start, end))
        else:
            began = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - began

    @property
    def seconds(self) -> float:
        """The time so far."""
        if self._events:
            torch.cuda.synchronize(self.device)
            self._seconds += sum(start.elapsed_time(end) for start, end in self._events) / 1000
            self._events.clear()
        return self._seconds


class _WatchedStage(PipelineStage):
    """torch's stage, which computes by the watch: waiting for other processes does not count."""

    def __init__(self, *args, watch: Stopwatch, **options):
        super().__init__(*args, **options)
        self._watch = watch

    def forward_one_chunk(self, *args, **options):
        with self._watch.running():
            return super().forward_one_chunk(*args, **options)

    def backward_one_chunk(self, *args, **options):
        # A backward pass computes in the precision that the forward pass has chosen.
        with self._watch.running(), torch.autocast(self.device.type, enabled=False):
            return super().backward_one_chunk(*args, **options)


class Schedule:
    """Runs batches through the stages of a pipeline's processes, which all have to call.

    torch fixes the shape of what stages send when a schedule is first used, and fails at another
    one. So each shape gets a schedule of its own, which is told the shapes beforehand.

    Args:
        own: this process's stages.
        stages: all of them.
        kind: gpipe, 1f1b or interleaved.
        micro_batches: into which a batch is cut, with equally many rows each.
        width, dtype: of the states that are sent.
        device: where the stages are.
        precision: makes the context in which they compute. It lasts for a whole step, so that all
            micro-batches share one copy of the weights in 16 bits.
    """

    def __init__(
        self,
        own: Sequence[Stage],
        stages: Stages,
        kind: str,
        micro_batches: int,
        *,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        precision: Callable[[], AbstractContextManager] = nullcontext,
    ):
        self.own, self.stages, self.kind, self.micro_batches = own, stages, kind, micro_batches
        self.width, self.dtype, self.device, self.precision = width, dtype, device, precision
        self.watch = Stopwatch(device)
        self._tokens = torch.ones((), device=device)  # by which the loss of a step is divided
        self._made: tuple[tuple, object] | None = None
        # Where nothing is trained in a stage nor before it, no gradient is sent back.
        trained = {
            stage.number: any(weight.requires_grad for weight in stage.parameters())
            for stage in own
        }
        found = stages.from_all(trained)
        known = {number: learns for share in found for number, learns in share.items()}
        self._learning = [any(known[at] for at in range(number + 1)) for number in sorted(known)]

    def train(self, batch: Batch, tokens: torch.Tensor) -> torch.Tensor:
        """The forward and backward pass of a step; gradients are added to.

        Args:
            batch: [rows, length] `input_ids`, `attention_mask` and `labels`, the same in all
                processes of the pipeline.
            tokens: supervised ones of the whole step, of all pipelines.
        Returns:
            This process's part of the step's loss: in the last stage that of its rows, else 0.
        """
        self._tokens, batch, losses = tokens, self._filled(batch), []
        if self.stages.mesh is None:
            (stage,) = self.own
            for part in self._parts(batch):
                with self.watch.running():
                    with self.precision():
                        loss = self._share(stage(part.pop("input_ids"), **part))
                    loss.backward()
                losses.append(loss)
        else:
            schedule = self._schedule(batch, trains=True)
            inputs = (batch.pop("input_ids"),)
            with self.precision():
                schedule.step(
                    *(inputs if self.stages.is_first else ()),
                    target=batch["labels"],
                    losses=losses,
                    return_outputs=False,
                    **batch,
                )
        return sum((loss.detach() for loss in losses), torch.zeros((), device=self.device))

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> torch.Tensor | None:
        """The forward pass of a batch: what the last stage gives (see `Stage.forward`), of the
        losses one for each micro-batch; None in processes without it.
        """
        rows = len(batch["input_ids"])
        batch = self._filled(batch)
        if self.stages.mesh is None:
            (stage,) = self.own
            with self.precision():
                parts = [stage(part.pop("input_ids"), **part) for part in self._parts(batch)]
            found = torch.cat(parts)
        else:
            schedule = self._schedule(batch, trains=False)
            inputs = (batch.pop("input_ids"),)
            with self.precision():
                found = schedule.step(*(inputs if self.stages.is_first else ()), **batch)
        return found if found is None or "labels" in batch else found[:rows]

    def _share(self, loss: torch.Tensor, _=None) -> torch.Tensor:
        return loss.sum() / self._tokens

    def _filled(self, batch: Batch) -> dict[str, torch.Tensor]:
        """The batch with so many rows that micro-batches have equally many: the first row again,
        with nothing that is asked of it.
        """
        missing = -len(batch["input_ids"]) % self.micro_batches
        if not missing:
            return dict(batch)
        nothing = {"labels": IGNORED, "columns": -1}
        return {
            name: torch.cat(
                [
                    rows,
                    rows.new_full((missing, *rows.shape[1:]), nothing[name])
                    if name in nothing
                    else rows[:1].expand(missing, *rows.shape[1:]),
                ]
            )
            for name, rows in batch.items()
        }

    def _parts(self, batch: Batch) -> Iterator[dict[str, torch.Tensor]]:
        """The micro-batches."""
        cut = {name: rows.chunk(self.micro_batches) for name, rows in batch.items()}
        for number in range(self.micro_batches):
            yield {name: parts[number] for name, parts in cut.items()}

    def _schedule(self, batch: Batch, *, trains: bool):
        """torch's schedule for batches of this shape."""
        rows, length = batch["input_ids"].shape
        shape = (rows // self.micro_batches, length, trains)
        if self._made is None or self._made[0] != shape:
            self._made = shape, self._make(*shape)
        return self._made[1]

    def _make(self, rows: int, length: int, trains: bool):
        def outline(*shape: int, learns: bool = False, dtype: torch.dtype = self.dtype):
            return torch.empty(shape, dtype=dtype, device="meta", requires_grad=learns)

        made = []
        for stage in self.own:
            at = stage.number
            tokens, states = outline(rows, length, dtype=torch.long), (rows, length, self.width)
            made.append(
                _WatchedStage(
                    stage,
                    at,
                    len(self.stages.cut),
                    self.device,
                    input_args=tokens
                    if stage.first
                    else outline(*states, learns=self._learning[at - 1]),
                    output_args=outline(1)
                    if stage.last
                    else outline(*states, learns=self._learning[at]),
                    group=self.stages.group("stages"),
                    watch=self.watch,
                )
            )
        loss = self._share if trains else None
        options = {"n_microbatches": self.micro_batches, "loss_fn": loss, "scale_grads": False}
        if self.kind == "interleaved":
            return ScheduleInterleaved1F1B(made, **options)
        kind = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}[self.kind]
        return kind(made[0], **options)
