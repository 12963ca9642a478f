"""Forward passes of several processes: who runs what, in step where they share a sharded model, and
what happens when memory runs out.

A sharded model (FSDP) gathers its weights layer by layer from all processes, so all have to make
equally many passes. Before each pass they agree that some process still has work; one that has none
runs a dummy pass. A layer that runs out of memory must not leave the pass either: it hands its
input on, the pass ends in step with the others, and is reported as failed afterwards.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

T = TypeVar("T")


class OutOfMemory(Exception):
    """A forward pass did not fit into memory; a smaller one may."""


def process_group() -> tuple[int, int]:
    """This process's rank, and how many processes there are."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def own_share(items: Sequence[T], cost: Callable[[T], int]) -> list[T]:
    """This process's part of `items`: neighbors stay together, costs are shared evenly."""
    rank, world = process_group()
    total, done, share = sum(map(cost, items)), 0, []
    for item in items:
        middle = done + cost(item) / 2
        if rank <= middle * world / total < rank + 1:
            share.append(item)
        done += cost(item)
    return share


def gather_results(results: dict[int, Any]) -> dict[int, Any]:
    """The results of all processes together."""
    _, world = process_group()
    if world == 1:
        return results
    shares: list = [None] * world
    torch.distributed.all_gather_object(shares, results)
    return {index: value for share in shares for index, value in share.items()}


def from_main_process(make: Callable[[], T]) -> T:
    """What `make` returns in the main process, in all of them."""
    rank, world = process_group()
    made: list = [make() if rank == 0 else None]
    if world > 1:
        torch.distributed.broadcast_object_list(made)
    return made[0]


class Lockstep:
    """Makes the forward passes of one model, in step with the other processes if it is sharded.

    As a context it lets each process make a different number of passes: leaving it waits until all
    have made theirs. Outside of it all have to make equally many.
    """

    def __init__(self, model):
        self.model = model
        self.device = next(model.parameters()).device
        sharded = (FSDPModule, FullyShardedDataParallel)
        modules = model.modules() if isinstance(model, torch.nn.Module) else ()
        self._blocks = [
            module for module in modules if isinstance(module, sharded) and module is not model
        ]
        self.sharded = process_group()[1] > 1 and (bool(self._blocks) or isinstance(model, sharded))
        self._entered = False

    def __enter__(self) -> Lockstep:
        self._entered = True
        return self

    def __exit__(self, kind, error, trace) -> None:
        self._entered = False
        # After an error the launcher ends the others too.
        while kind is None and self.sharded and self._anybody_works(False):
            token = torch.zeros(1, 1, dtype=torch.long, device=self.device)
            self.model(input_ids=token, attention_mask=torch.ones_like(token), use_cache=False)

    def __call__(self, **inputs: Any) -> Any:
        """One forward pass.

        Raises:
            OutOfMemory: it does not fit into memory. Keys and values that it added to a KV cache
                are still there, in some layers or in all.
        """
        if self.sharded and self._entered:
            self._anybody_works(True)
        try:
            with self._kept_in_step():
                return self.model(**inputs)
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
        # Outside of the except clause: the error no longer holds what was computed.
        gc.collect()
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()
        raise OutOfMemory

    def _anybody_works(self, works: bool) -> bool:
        flag = torch.tensor(int(works), device=self.device)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
        return bool(flag)

    @contextmanager
    def _kept_in_step(self) -> Iterator[None]:
        """A context in which a layer that runs out of memory lets the pass go on, to fail after the
        last layer.
        """
        if not self.sharded:
            yield
            return
        failed: list[RuntimeError] = []

        def guarded(forward: Callable) -> Callable:
            def run(*args, **kwargs):
                if not failed:
                    try:
                        return forward(*args, **kwargs)
                    except RuntimeError as error:
                        if not should_reduce_batch_size(error):
                            raise
                        failed.append(RuntimeError(*error.args))
                return args[0] if args else kwargs["hidden_states"]

            return run

        plain = [block.forward for block in self._blocks]
        for block, forward in zip(self._blocks, plain, strict=True):
            block.forward = guarded(forward)
        try:
            yield
        finally:
            for block, forward in zip(self._blocks, plain, strict=True):
                block.forward = forward
        if failed:
            raise failed[0]
