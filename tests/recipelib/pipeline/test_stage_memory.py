"""The memory that a stage is said to need."""

from types import SimpleNamespace

import pytest
from fake_stages import evenly, fake_stages
from peft import LoraConfig, get_peft_model
from tiny_llama import tiny_llama
from tiny_task import encoded_from

from recipelib.models import bare_model
from recipelib.pipeline.plan import stage_memory
from recipelib.pipeline.stage import ends_of, keep_part
from recipelib.training import RecipeConfig, estimate_memory

LAYERS, MICRO_BATCHES, WIDTH, ANSWER = 6, 6, 24, 3
EXAMPLES = [
    {"input_ids": [5] * length, "labels": [-100] * (length - ANSWER) + [5] * ANSWER}
    for length in (WIDTH, 9, 12)
]


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("run"))
    options = {"gradient_accumulation_steps": 1, "per_device_train_batch_size": 1}
    return RecipeConfig(output_dir=folder, use_cpu=True, **options)


def small(lora: bool = False):
    model = tiny_llama(300, num_hidden_layers=LAYERS)
    if lora:
        model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    return model


def estimated(training, place: int, *, schedule="gpipe", processes=3, stages=None, lora=False):
    """The memory of a process of a pipeline, and what it holds."""
    model = small(lora)
    bare = bare_model(model)
    ends = ends_of(bare)
    own = fake_stages(evenly(LAYERS, stages or processes), processes, place)
    keep_part(bare, ends, own)
    args = SimpleNamespace(schedule=schedule, micro_batches=MICRO_BATCHES)
    return stage_memory(model, ends, own, args, training, encoded_from(EXAMPLES)), model


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("place", [0, 1, 2], ids=["first", "middle", "last"])
def test_a_stage_counts_what_it_holds_and_what_each_micro_batch_keeps(place, lora, training):
    gpipe, model = estimated(training, place, lora=lora)
    in_turn, _ = estimated(training, place, schedule="1f1b", lora=lora)
    for found in (gpipe, in_turn):
        assert found.note == ""  # where the fake step fails it says so here
        assert found.activations > 0
        weights = [*model.parameters(), *model.buffers()]
        assert found.parameters == sum(one.numel() * one.element_size() for one in weights)
        trained = sum(one.numel() for one in model.parameters() if one.requires_grad)
        assert found.optimizer == 2 * 4 * trained
        assert found.logits == 0 or place == 2
    # All six micro-batches rather than three, two and one.
    assert gpipe.activations > in_turn.activations
    states = 4 * WIDTH * 32
    more = (gpipe.activations - in_turn.activations) / (MICRO_BATCHES - (3 - place))
    assert more > 2 * 4 * states  # of each micro-batch several states of both of its layers


def test_interleaved_a_stage_in_the_middle_counts_too(training):
    found, _ = estimated(training, 1, schedule="interleaved", processes=2, stages=6)
    assert found.note == ""
    gpipe, _ = estimated(training, 1, processes=2)
    assert 0 < found.activations <= 1.2 * gpipe.activations


def test_one_process_needs_what_training_without_stages_needs(training):
    found, _ = estimated(training, 0, processes=1)
    accumulating = RecipeConfig(
        output_dir=training.output_dir,
        use_cpu=True,
        gradient_accumulation_steps=MICRO_BATCHES,
        per_device_train_batch_size=1,
    )
    wanted = estimate_memory(small(), accumulating, encoded_from(EXAMPLES))
    assert found.note == wanted.note == ""
    for name in ("parameters", "gradients", "optimizer", "activations", "logits"):
        assert getattr(found, name) == pytest.approx(getattr(wanted, name), rel=0.05), name
