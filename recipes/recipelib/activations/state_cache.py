"""What frozen layers compute of the training examples, kept on disk in shards.

A shard is a safetensors file with the states of a few examples, one after the other and without
padding, and a checksum of them. It gets its name when it is whole, so a run that is killed leaves
shards with which the next one goes on; and because its content follows from its name, two runs that
write the same one do no harm.
"""

from __future__ import annotations

import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.nn.utils.rnn import pad_sequence

from recipelib.activations.folder import ACTIVATIONS, write_kept
from recipelib.activations.frozen import FrozenLayers
from recipelib.activations.layer_list import ending_at
from recipelib.inference import (
    CPU_PASS_TOKENS,
    Lockstep,
    OutOfMemory,
    plan_padded,
    process_group,
)
from recipelib.models import bare_model, logits_at
from recipelib.runtime import UserError, digest, megabytes, progress_bar, say

if TYPE_CHECKING:
    from datasets import Dataset

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
STATES = "states"  # of a shard, and of a batch
_SHARD_BYTES = 32 * 2**20
_LEAST_SHARDS = 16  # so that several processes have work, and little is lost to a kill
_PASSES = 4  # of the budget's tokens that are planned together
_CURE = "point --cache_dir at a folder with room, pass --cache_dtype bfloat16, or --cache false"


class StateCache:
    """The states of examples behind the frozen layers: `cache[place]` are those of an example,
    [tokens, width], in the order of its `input_ids`.

    Args:
        frozen: the model's layers.
        examples: each with `input_ids` and their number, `length`; where an example is several
            sequences, with their `lengths`.
        root: the folder of this and other caches.
        dtype: of the states on disk.
        computed: in what precision they are computed, such as "bf16, cuda"; for the key.
    """

    def __init__(
        self,
        frozen: FrozenLayers,
        examples: Dataset,
        root: Path,
        dtype: torch.dtype,
        computed: str = "no",
    ):
        columns = [name for name in ("input_ids", "lengths") if name in examples.column_names]
        self._examples = examples.select_columns(columns)
        self.frozen, self.root, self.dtype = frozen, root, dtype
        lengths = examples.with_format("numpy")["length"][:].astype(np.int64)
        self._ends = lengths.cumsum()
        self._starts = self._ends - lengths
        self.key = digest(
            frozen.key, frozen.boundary, str(dtype), computed, memoryview(lengths), *self._tokens()
        )
        self.folder = root / f"{ACTIVATIONS}{self.key}"
        # An example is in the shard in which its first token falls.
        most = max(1, _SHARD_BYTES // self.bytes_per_token)
        most = min(most, -(-self.tokens // _LEAST_SHARDS))
        self._shard_of = self._starts // most
        self.shards: list[int] = np.unique(self._shard_of).tolist()
        self._open: dict[int, torch.Tensor] = {}
        self.relative_error = 0.0
        self.seconds = 0.0

    def _tokens(self) -> list[memoryview]:
        """All tokens, and the lengths of the sequences, for the key."""
        arrow, parts = self._examples.with_format("arrow"), []
        for start in range(0, len(arrow), 10_000):
            table = arrow[start : start + 10_000]
            for column in table.columns:
                parts += [memoryview(chunk.flatten().to_numpy()) for chunk in column.chunks]
        return parts

    @property
    def tokens(self) -> int:
        """The tokens of all examples."""
        return int(self._ends[-1])

    @property
    def bytes_per_token(self) -> int:
        """What a token takes on disk."""
        return self.frozen.width * self.dtype.itemsize

    def path(self, shard: int) -> Path:
        """The file of a shard."""
        return self.folder / f"states-{shard:05}.safetensors"

    def _places(self, shard: int) -> range:
        return range(*np.searchsorted(self._shard_of, [shard, shard + 1]).tolist())

    def _size(self, shard: int) -> int:
        """The tokens of a shard."""
        places = self._places(shard)
        return int(self._ends[places.stop - 1] - self._starts[places.start])

    @property
    def figures(self) -> dict[str, float]:
        """What metrics.json holds of the cache."""
        return {
            "layers_computed_once": self.frozen.boundary,
            "cache_bytes": self.tokens * self.bytes_per_token,
            "cache_seconds": self.seconds,
            "cache_relative_error": self.relative_error,
        }

    # Reading ------------------------------------------------------------------------------------

    def __getitem__(self, place: int) -> torch.Tensor:
        shard = int(self._shard_of[place])
        if shard not in self._open:
            with safe_open(self.path(shard), framework="pt") as file:
                self._open[shard] = file.get_tensor(STATES)  # mapped into memory, not read
        before = self._starts[self._places(shard).start]
        return self._open[shard][self._starts[place] - before : self._ends[place] - before]

    def is_there(self) -> bool:
        """Whether all shards are there; `fill` looks whether they are undamaged."""
        return all(self.path(shard).exists() for shard in self.shards)

    def _is_whole(self, shard: int) -> bool:
        """Whether a shard is there and holds what was written."""
        path = self.path(shard)
        if not path.exists():
            return False
        try:
            with safe_open(path, framework="pt") as file:
                states, said = file.get_tensor(STATES), file.metadata() or {}
        except (SafetensorError, OSError):
            return False
        shape = (self._size(shard), self.frozen.width)
        fits = states.shape == shape and states.dtype == self.dtype
        return fits and said.get("checksum") == _checksum(states)

    # Making -------------------------------------------------------------------------------------

    def fill(self, model, *, batch_tokens: int = 4096, description: str | None = None) -> None:
        """Compute the shards that are not there or damaged, all processes side by side; all have to
        call it.

        Args:
            model: on its device, or sharded.
            batch_tokens: tokens in one forward pass at most, padding included.
            description: of the progress bar.
        Raises:
            UserError: the disk has no room, cannot be written to, or a state does not fit into the
                dtype; a single row does not fit into memory.
        """
        start = time.perf_counter()
        rank, world = process_group()
        local = int(os.environ.get("LOCAL_RANK", "0"))
        beside = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        host = socket.gethostname()
        own = [shard for shard in self.shards[local::beside] if not self._is_whole(shard)]
        missing = _of_machines(own)
        self._check_room(missing[host])
        # All processes make what is missing on any machine; then, where machines do not share the
        # folder, those of each machine make what is still missing there.
        anywhere = sorted({shard for shards in missing.values() for shard in shards})
        if anywhere:
            self._make(model, anywhere[rank::world], batch_tokens, description)
            own = [shard for shard in missing[host] if not self._is_whole(shard)]
            missing = _of_machines(own if local == 0 else [])
            if any(missing.values()):
                self._make(model, missing[host][local::beside], batch_tokens, description)
                _of_machines([])  # nobody goes on before all are done
        error = square = 0.0
        for shard in self.shards:
            with safe_open(self.path(shard), framework="pt") as file:
                said = file.metadata()
            error, square = error + float(said["error"]), square + float(said["square"])
        self.relative_error = (error / square) ** 0.5 if square else 0.0
        if self.relative_error:
            kind = str(self.dtype).removeprefix("torch.")
            say(f"kept in {kind}: states differ from those computed by {self.relative_error:.2%}")
        self.seconds = time.perf_counter() - start

    def _check_room(self, missing: Sequence[int]) -> None:
        needed = sum(map(self._size, missing)) * self.bytes_per_token
        if not needed:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.folder).free
        except OSError as error:
            raise UserError(f"{self.folder}: {error.strerror or error}; {_CURE}") from None
        if needed > free:
            raise UserError(
                f"{self.root}: the states of the frozen layers need {megabytes(needed)}, "
                f"{megabytes(free)} are free; {_CURE}"
            )

    def _make(
        self, model, shards: Sequence[int], batch_tokens: int, description: str | None
    ) -> None:
        """Compute and write these shards, in step with the other processes."""
        model.eval()
        total = sum(len(self._places(shard)) for shard in shards)
        # Where processes make unequally many passes, the idle ones run these layers, too.
        shortened = ending_at(self.frozen.layers, self.frozen.boundary)
        with (
            torch.no_grad(),
            shortened as kept,
            Lockstep(model) as run,
            progress_bar(description, total) as bar,
        ):
            if run.device.type == "cpu":
                batch_tokens = min(batch_tokens, CPU_PASS_TOKENS)
            for together in self._together(shards, _PASSES * batch_tokens):
                places = [place for shard in together for place in self._places(shard)]
                states = self._compute(run, kept, places, batch_tokens)
                own = states.split([self._size(shard) for shard in together])
                for shard, part in zip(together, own, strict=True):
                    self._write(shard, part)
                bar.update(len(places))

    def _together(self, shards: Sequence[int], tokens: int) -> Iterator[list[int]]:
        """Shards of so many tokens, whose rows are run together: small ones alone would make small
        passes.
        """
        group: list[int] = []
        for shard in shards:
            group.append(shard)
            if sum(map(self._size, group)) >= tokens:
                yield group
                group = []
        if group:
            yield group

    def _compute(
        self, run: Lockstep, kept: list[torch.Tensor], places: Sequence[int], budget: int
    ) -> torch.Tensor:
        """[tokens, width] the states of examples, one after the other, as they are computed.

        Args:
            kept: where each pass leaves them.
        """
        examples = self._examples[places]
        sequences: list[list[int]] = []
        for number, ids in enumerate(examples["input_ids"]):
            lengths = examples["lengths"][number] if "lengths" in examples else [len(ids)]
            sequences += [ids[end - size : end] for size, end in _ends(lengths)]
        states: list[torch.Tensor | None] = [None] * len(sequences)
        plan = plan_padded([len(ids) for ids in sequences], budget)
        waiting = [pass_.members for pass_ in reversed(plan)]
        while waiting:
            members = waiting.pop()
            try:
                computed = self._run(run, kept, [sequences[member] for member in members])
            except OutOfMemory:
                if len(members) == 1:
                    raise UserError(
                        f"out of memory with a single row of {len(sequences[members[0]]):,} tokens;"
                        " lower --max_length, or take more processes under FSDP"
                    ) from None
                half = len(members) // 2
                waiting += [members[half:], members[:half]]
                continue
            for member, own in zip(members, computed, strict=True):
                states[member] = own
        return torch.cat(states)

    def _run(
        self, run: Lockstep, kept: list[torch.Tensor], sequences: Sequence[Sequence[int]]
    ) -> list[torch.Tensor]:
        """[tokens, width] of each sequence, as they are computed."""
        ids = pad_sequence([torch.tensor(row) for row in sequences], batch_first=True)
        mask = pad_sequence([torch.ones(len(row)) for row in sequences], batch_first=True).long()
        ids, mask = ids.to(run.device), mask.to(run.device)
        # The head, if it has a vocabulary, sees one state only.
        place = torch.zeros(1, 2, dtype=torch.long, device=run.device)
        has_head = bare_model(run.model).get_output_embeddings() is not None
        head = logits_at(run.model, place, ids.shape[1]) if has_head else nullcontext()
        kept.clear()
        with head:
            run(input_ids=ids, attention_mask=mask, use_cache=False)
        return [states[: len(row)] for states, row in zip(kept[-1].cpu(), sequences, strict=True)]

    def _write(self, shard: int, states: torch.Tensor) -> None:
        kept = states.to(self.dtype)
        if not torch.isfinite(kept).all():
            raise UserError(
                f"--cache_dtype {str(self.dtype).removeprefix('torch.')}: the largest state is "
                f"{states.abs().max():.3g}, which does not fit; pass bfloat16 or float32"
            )
        lost = (kept.float() - states.float()).square().sum(dtype=torch.float64).item()
        said = {
            "checksum": _checksum(kept),
            "error": repr(lost),
            "square": repr(states.float().square().sum(dtype=torch.float64).item()),
        }
        write_kept(
            self.path(shard), lambda path: save_file({STATES: kept.contiguous()}, path, said), _CURE
        )


def _ends(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Each length with the sum of those up to it."""
    return list(zip(lengths, np.cumsum(lengths).tolist(), strict=True))


def _checksum(states: torch.Tensor) -> str:
    return digest(memoryview(states.contiguous().flatten().view(torch.uint8).numpy()))


def _of_machines(own: Sequence[int]) -> dict[str, list[int]]:
    """For each machine the shards that its processes name. All have to call this."""
    _, world = process_group()
    said: list = [(socket.gethostname(), [*own])]
    if world > 1:
        said, mine = [None] * world, said[0]
        torch.distributed.all_gather_object(said, mine)
    found: dict[str, set[int]] = {}
    for host, shards in said:
        found.setdefault(host, set()).update(shards)
    return {host: sorted(shards) for host, shards in found.items()}


class WithStates:
    """Puts the states of a batch's examples beside what another collator makes of them.

    Args:
        collate: of the examples, of which those that are trained have their `place` in the cache.
    """

    def __init__(self, collate: Callable[[list[Mapping]], dict[str, torch.Tensor]], cache):
        self.collate, self.cache = collate, cache

    def __call__(self, examples: list[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """The batch, with `states`: [rows, tokens, width], zero where there is padding."""
        if "place" not in examples[0]:  # held-out rows, for which all layers are run
            return self.collate(examples)
        places = [example["place"] for example in examples]
        batch = self.collate([{**example} for example in examples])
        rows, width = batch["input_ids"].shape
        pieces: list[torch.Tensor] = []
        for place, example in zip(places, examples, strict=True):
            states = self.cache[place]
            pieces += states.split(example["lengths"]) if "lengths" in example else [states]
        if rows == 1 < len(pieces):  # packed: laid end to end
            pieces = [torch.cat(pieces)]
        padded = torch.zeros(rows, width, self.cache.frozen.width, dtype=self.cache.dtype)
        for row, states in zip(padded, pieces, strict=True):
            row[: len(states)] = states
        return {**batch, STATES: padded}
