"""What scoring needs of a model whose layers stand in several processes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any


class CutModel(ABC):
    """A model that no process holds as a whole; all processes have to call its methods."""

    @abstractmethod
    def log_likelihoods(
        self,
        requests: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]],
        *,
        batch_tokens: int,
        description: str | None,
    ) -> list[list[float]]:
        """As `scoring.log_likelihoods`."""

    @abstractmethod
    def gathered(self) -> AbstractContextManager[Any]:
        """A context that gives the whole model to each process.

        Raises:
            UserError: it does not fit.
        """


def whole_model(model) -> AbstractContextManager[Any]:
    """A context that gives a model in one piece, as texts are written by it.

    Raises:
        UserError: it is cut, and as a whole does not fit into a process.
    """
    return model.gathered() if isinstance(model, CutModel) else nullcontext(model)
