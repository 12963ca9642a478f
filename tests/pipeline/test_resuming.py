"""A run goes on from a checkpoint as if nothing had stopped it, with whatever number of stages."""

import pytest
from comparing import ADAPTER, MODEL, assert_equal_losses, assert_equal_updates
from launching import UNSAVED

pytestmark = pytest.mark.slow

FILES = {"full": MODEL, "lora": ADAPTER}
KINDS = list(FILES)


@pytest.fixture(scope="module")
def start(alone, options):
    """Gives the folder with the weights that runs of a kind start from."""

    def of(kind: str):
        if kind == "full":
            return options("start", kind)["model_name_or_path"]
        return alone(kind, "start_of_resumed", learning_rate=0.0, max_steps=1, **UNSAVED)

    return of


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_go_on_by_another_schedule(kind, root, two, start):
    resumed, whole = root / f"two_{kind}_resumed", root / f"two_{kind}"
    assert_equal_losses(resumed, whole)
    assert_equal_updates(resumed, whole, start(kind), FILES[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_go_on_where_one_stopped(kind, root, two, alone, start):
    assert_equal_losses(root / f"one_{kind}_then_two", alone(kind))
    assert_equal_updates(root / f"one_{kind}_then_two", alone(kind), start(kind), FILES[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_one_process_goes_on_where_two_stopped(kind, root, two, alone, start):
    checkpoint = {"resume_from_checkpoint": str(root / f"two_{kind}" / "checkpoint-4")}
    resumed = alone(kind, f"two_{kind}_then_one", **checkpoint)
    assert_equal_losses(resumed, root / f"two_{kind}")
    assert_equal_updates(resumed, root / f"two_{kind}", start(kind), FILES[kind])


def test_of_two_pipelines_one_writes_a_checkpoint(root, four, alone, start):
    checkpoint = root / "four_lora" / "checkpoint-2"
    assert sorted(file.name for file in checkpoint.glob("*.safetensors")) == [
        "optimizer-00001-of-00002.safetensors",
        "optimizer-00002-of-00002.safetensors",
        "stage-00001-of-00002.safetensors",
        "stage-00002-of-00002.safetensors",
    ]
    changes = {"micro_batches": 8, "max_steps": 4, "resume_from_checkpoint": str(checkpoint)}
    resumed = alone("lora", "four_then_one", **changes)
    assert_equal_losses(resumed, root / "four_lora", 4)
    assert_equal_updates(resumed, root / "four_lora", start("lora"))
