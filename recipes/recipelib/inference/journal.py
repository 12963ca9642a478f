"""Results kept on disk as they come, so that an interrupted run can be resumed."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recipelib.inference.lockstep import gather_results, process_group
from recipelib.models import weights_identity
from recipelib.runtime import UserError, say


class Journal:
    """A folder of JSON lines, one file per process: the hash of a request, and its result. All
    processes open it together.

    Args:
        folder: made with the first result.
        identity: what decides a result besides the request: the model, its dtype, ... Results under
            another identity are not found.
    Raises:
        UserError: a file that is no journal.
    """

    def __init__(self, folder: Path | str, identity: Mapping[str, Any]):
        self.folder = Path(folder)
        self._identity = json.dumps(identity, sort_keys=True, default=str)
        self._known: dict[str, Any] = {}
        for path in sorted(self.folder.glob("*.jsonl")):
            whole = path.read_bytes().rpartition(b"\n")[0]  # without a line that was cut off
            for number, line in enumerate(whole.split(b"\n") if whole else [], 1):
                try:
                    key, value = json.loads(line)
                except ValueError:
                    raise UserError(
                        f"{path}:{number}: not a line that a run has written; delete {self.folder}"
                    ) from None
                self._known[key] = value
        gather_results({})  # a barrier: all read before anyone writes, so all know the same

    @classmethod
    def of_run(cls, training, args, adapter: Path | None) -> Journal:
        """The journal in the folder of a run: continued with `args.resume`, emptied without.

        Args:
            training: the trainer's arguments.
            args: the recipe's, which name the model.
            adapter: the folder of the adapter on it.
        """
        identity = {
            "model": weights_identity(args.model_name_or_path, args.revision),
            "adapter": adapter and weights_identity(str(adapter)),
            "dtype": str(training.model_dtype[0]),
        }
        journal = cls(f"{training.output_dir}/partial", identity)
        if args.resume:
            say(f"resuming: {len(journal):,} results are there")
        else:
            journal.discard()
        return journal

    def __len__(self) -> int:
        return len(self._known)

    def within(self, identity: Mapping[str, Any]) -> Journal:
        """The same journal for results that depend on this too, besides its identity."""
        inner = copy.copy(self)
        inner._identity += json.dumps(identity, sort_keys=True, default=str)
        return inner

    def _key(self, request: Any) -> str:
        text = json.dumps([self._identity, request])
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def load(self, requests: Sequence[Any]) -> dict[int, Any]:
        """The known results of requests, by index."""
        keys = map(self._key, requests) if self._known else ()
        return {index: self._known[key] for index, key in enumerate(keys) if key in self._known}

    def add(self, requests: Sequence[Any], results: Sequence[Any]) -> None:
        """Append results; they are on disk when this returns."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"process-{process_group()[0]}.jsonl"
        lines = [
            json.dumps([self._key(request), result]) + "\n"
            for request, result in zip(requests, results, strict=True)
        ]
        with path.open("ab+") as file:
            if end := file.tell():  # half a line of an interrupted run is cut off
                file.seek(end - 1)
                torn = file.read(1) != b"\n"
                if torn:
                    file.seek(0)
                    file.truncate(file.read().rfind(b"\n") + 1)
            file.write("".join(lines).encode())
            file.flush()
            os.fsync(file.fileno())

    def discard(self) -> None:
        """Forget everything: the run is done, or starts anew. All processes have to call it."""
        if process_group()[0] == 0:
            shutil.rmtree(self.folder, ignore_errors=True)
        self._known = {}
        gather_results({})
