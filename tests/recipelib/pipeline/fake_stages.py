"""Stages of processes that are not there."""

import math
from collections.abc import Mapping, Sequence

from recipelib.pipeline.stages import Stages


class Mesh:
    """The place of a process among those of several pipelines, as torch's mesh tells it."""

    def __init__(self, sizes: Mapping[str, int], places: Mapping[str, int]):
        self.sizes, self.places = sizes, places

    def __getitem__(self, name: str) -> "Mesh":
        return Mesh({name: self.sizes[name]}, {name: self.places[name]})

    def size(self) -> int:
        """How many processes there are."""
        return math.prod(self.sizes.values())

    def get_local_rank(self, name: str) -> int:
        """The place along a dimension."""
        return self.places[name]


def fake_stages(
    cut: Sequence[range], processes: int, place: int = 0, *, pipelines: int = 1, pipeline: int = 0
) -> Stages:
    """What the process at a place of a pipeline knows of its stages."""
    sizes = {"stages": processes, "pipelines": pipelines}
    mesh = Mesh(sizes, {"stages": place, "pipelines": pipeline})
    return Stages(cut, processes, mesh if mesh.size() > 1 else None)


def evenly(layers: int, stages: int) -> list[range]:
    """Stages of as many layers each."""
    each = layers // stages
    return [range(each * number, each * (number + 1)) for number in range(stages)]
