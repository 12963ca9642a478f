"""A model whose stages stand in several processes, as trainers and scores see it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import psutil
import torch
from peft import PeftModel, get_peft_model
from torch import distributed, nn
from torch.nn.utils.rnn import pad_sequence

from recipelib.inference import (
    CPU_PASS_TOKENS,
    CutModel,
    gather_results,
    join_scores,
    plan_padded,
    split_requests,
)
from recipelib.models import bare_model
from recipelib.pipeline.schedule import Batch, Schedule
from recipelib.pipeline.stage import Tied
from recipelib.runtime import UserError, gib, progress_bar


class Pipeline(CutModel, nn.Module):
    """A model whose stages stand in several processes.

    Args:
        model: with what this process holds of it, under its own names.
        schedule: that runs its stages.
        tied: a weight that stands in the first and in the last stage, in those.
        load: loads the whole model without adapters.
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: Schedule,
        tied: Tied | None,
        load: Callable[[], nn.Module],
    ):
        super().__init__()
        self.model, self.own = model, nn.ModuleList(schedule.own)  # which change modes together
        self.schedule, self.stages = schedule, schedule.stages
        self.tied, self._load = tied, load
        self.seconds = self.busy = 0.0  # of training steps, and of them computing

    # Training ---------------------------------------------------------------------------------

    def train_step(self, batch: Batch, tokens: torch.Tensor) -> torch.Tensor:
        """The forward and backward pass of a step, after which every process has the whole
        gradient of what it holds.

        Args:
            batch, tokens: as in `Schedule.train`.
        Returns:
            The loss of the step, in every process.
        """
        start, busy = time.perf_counter(), self.schedule.watch.seconds
        loss = self.schedule.train(batch, tokens)
        if self.stages.mesh is not None:
            self._sum_gradients()
            distributed.all_reduce(loss)  # with which all processes end the step
        self.busy += self.schedule.watch.seconds - busy
        self.seconds += time.perf_counter() - start
        return loss

    def _sum_gradients(self) -> None:
        """Add up what was computed of the same weights elsewhere."""
        if self.tied is not None:
            self._sum_tied(self.tied.weight.grad)
        if self.stages.pipelines > 1:
            group = self.stages.group("pipelines")
            works = []
            for weight in self.trained().values():
                if weight.grad is None:
                    weight.grad = torch.zeros_like(weight)
                works.append(distributed.all_reduce(weight.grad, group=group, async_op=True))
            for work in works:
                work.wait()

    def _sum_tied(self, gradient: torch.Tensor) -> None:
        """Add the gradient of the other end of the tied weight."""
        peer = {
            "group": self.stages.group("stages"),
            "group_peer": self.stages.processes - 1 if self.stages.is_first else 0,
        }
        other = torch.empty_like(gradient)
        ends = [(distributed.isend, gradient), (distributed.irecv, other)]
        operations = [distributed.P2POp(way, tensor, **peer) for way, tensor in ends]
        for work in distributed.batch_isend_irecv(operations):
            work.wait()
        gradient += other

    def clip(self, most: float) -> torch.Tensor:
        """Scale the gradients of all stages down to a norm of at most this; gives the norm that
        they had.
        """
        own = self.trained(once=True).values()
        norm = nn.utils.get_total_norm([weight.grad for weight in own if weight.grad is not None])
        norm = norm.to(self.schedule.device)
        if self.stages.mesh is not None:
            square = norm.square()
            distributed.all_reduce(square, group=self.stages.group("stages"))
            norm = square.sqrt()
        nn.utils.clip_grads_with_norm_(self.trained().values(), most, norm)
        return norm

    def trained(self, *, once: bool = False) -> dict[str, nn.Parameter]:
        """What this process trains, by the names of the uncut model.

        Args:
            once: a weight that stands in the first and in the last stage only in the first.
        """
        tied = self.tied.weight if self.tied else None
        return {
            self.tied.name if weight is tied else name: weight
            for name, weight in self.model.named_parameters()
            if weight.requires_grad and not (once and weight is tied and self.stages.is_last)
        }

    # Weights ----------------------------------------------------------------------------------

    def every_weight(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All weights that are trained in any stage, one after the other, sent by the process that
        holds them to the others of its pipeline; all have to go through to the end. Of a weight
        that is tied there is one.
        """
        own = self.trained(once=True)
        shapes = self.stages.from_all(
            [(name, weight.shape, weight.dtype) for name, weight in own.items()]
        )
        for place, held in enumerate(shapes):
            for name, shape, dtype in held:
                if name in own:
                    tensor = own[name].detach()
                else:
                    tensor = torch.empty(shape, dtype=dtype, device=self.schedule.device)
                if self.stages.mesh is not None:
                    distributed.broadcast(
                        tensor, group=self.stages.group("stages"), group_src=place
                    )
                yield name, tensor

    @contextmanager
    def gathered(self) -> Iterator[nn.Module]:
        """A context that gives the whole model to each process, to write texts with.

        Raises:
            UserError: it does not fit beside the stages.
        """
        if self.stages.processes == 1:
            yield self.model
            return
        bare = bare_model(self.model)
        shapes = self.stages.from_all(
            sum(weight.numel() * weight.element_size() for weight in self.model.parameters())
        )
        self._check_room(sum(shapes))
        whole = self._load().to(bare.dtype)
        if isinstance(self.model, PeftModel):
            whole = get_peft_model(whole, self.model.active_peft_config)
        places = dict(whole.named_parameters())
        for name, tensor in self.every_weight():
            with torch.no_grad():
                places[name].copy_(tensor)
        yield whole.to(self.schedule.device).eval()

    def _check_room(self, size: int) -> None:
        if self.schedule.device.type == "cuda":
            free = torch.cuda.mem_get_info(self.schedule.device)[0]
        else:
            free = psutil.virtual_memory().available // self.stages.mesh.size()
        if max(self.stages.from_all(size > free)):
            raise UserError(
                f"texts are written by the whole model, which takes {gib(size)} GiB in each "
                f"process and {gib(free)} are free; choose a template with label words or "
                "metric: loss, or --max_eval_samples 0"
            )

    # Scores -----------------------------------------------------------------------------------

    def log_likelihoods(
        self,
        requests: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]],
        *,
        batch_tokens: int,
        description: str | None,
    ) -> list[list[float]]:
        """The log-probability (nats, summed over tokens) of each continuation of each prompt; the
        pipelines share the prompts.
        """
        parts, places = split_requests(requests)
        if self.schedule.device.type == "cpu":
            batch_tokens = min(batch_tokens, CPU_PASS_TOKENS)
        rows = [[*prompt, *continuations[0][:-1]] for prompt, continuations in parts]
        passes = plan_padded([*map(len, rows)], batch_tokens * self.schedule.micro_batches)
        results: dict[int, list[float]] = {}
        own = passes[self.stages.pipeline :: self.stages.pipelines]
        with progress_bar(description, sum(len(each.members) for each in own)) as bar:
            for each in own:
                members = each.members
                asked = [_asked(*parts[at]) for at in members]
                batch = {
                    "input_ids": _padded([rows[at] for at in members], 0),
                    "attention_mask": _padded([[1] * len(rows[at]) for at in members], 0),
                    "columns": _padded([[column for column, _ in pairs] for pairs in asked], -1),
                    "tokens": _padded([[token for _, token in pairs] for pairs in asked], 0),
                }
                device = self.schedule.device
                found = self.schedule.evaluate({key: it.to(device) for key, it in batch.items()})
                if found is not None:
                    for at, values in zip(members, found.tolist(), strict=True):
                        results[at] = _sums(parts[at], values)
                bar.update(len(members))
        return join_scores(requests, places, gather_results(results))


def _asked(prompt: Sequence[int], continuations: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """The columns and tokens of what is asked: what continuations share, then their last tokens."""
    *shared, _ = continuations[0]
    end = len(prompt) - 1
    last = [(end + len(shared), continuation[-1]) for continuation in continuations]
    return [*enumerate(shared, end), *last]


def _sums(request: tuple[Sequence[int], Sequence[Sequence[int]]], values: list[float]):
    """Sums of continuations, from the values of what `_asked` gave."""
    _, continuations = request
    shared = len(continuations[0]) - 1
    beginning = sum(values[:shared])
    return [beginning + values[shared + at] for at in range(len(continuations))]


def _padded(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    tensors = [torch.tensor(row) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=value)
