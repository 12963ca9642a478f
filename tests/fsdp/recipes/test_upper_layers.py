"""Layers above frozen ones, trained by two processes under FSDP2 on states that both have computed,
learn what they learn in one.
"""

import pytest
import torch
import transfer_learning
import watched_cache
from comparing import ADAPTER, MODEL, assert_equal_losses, assert_equal_updates
from launching import assert_sharded_over_two, records
from run_files import losses, read_json
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM

pytestmark = pytest.mark.slow

LOST = f"upper{watched_cache.LOSES}"
FILES = {"upper_masked": MODEL, "upper_head": ADAPTER}


@pytest.fixture(scope="module")
def single(alone):
    """The same in one process that computes the lower layer in every pass."""
    options = {"train_layers": 1, "max_steps": 6, "cache": False}
    return alone("single_upper_uncached", transfer_learning, **options)


@pytest.fixture(scope="module")
def written(root, two):
    """Gives the shards that each process of a run has written, in their order."""

    def of(run: str) -> list[list[int]]:
        files = [root / "states" / f"{run}-{rank}" for rank in (0, 1)]
        return [[*map(int, file.read_text().split())] if file.exists() else [] for file in files]

    return of


@pytest.mark.parametrize("name", ["upper", "upper_again", LOST])
def test_each_step_and_what_is_learned_are_those_of_one_process_without_a_cache(
    root, two, single, name
):
    assert_sharded_over_two(two.said[f"two_{name}"])
    assert_equal_losses(root / f"two_{name}", single, 6)
    assert_equal_updates(root / f"two_{name}", single, root / "model", MODEL)
    found, wanted = (read_json(run / "metrics.json") for run in (root / f"two_{name}", single))
    assert found["layers_computed_once"] == 1
    for key in ("score", "base_score", "train_tokens", "trainable_parameters"):
        assert found[key] == wanted[key], key


def test_each_of_two_processes_computes_half_of_the_shards(written):
    first, second = written("two_upper")
    assert len(first) == len(second) == 8
    assert sorted([*first, *second]) == [*range(16)]


def test_the_next_run_computes_nothing_and_one_that_lost_a_shard_only_that(written, two):
    assert written("two_upper_again") == [[], []]
    assert written(f"two_{LOST}") == [[5], []]
    assert "there already" in two.said["two_upper_again"]
    assert "there already" not in two.said["two_upper"]


@pytest.mark.parametrize("name", FILES)
def test_one_process_finds_what_two_have_computed_and_learns_the_same(
    both, untrained, written, name
):
    two, one = both(name)
    assert all(written(f"two_{name}"))
    assert written(f"single_{name}") == [[], []]
    assert_equal_losses(two, one, 6)
    found, wanted, before = (
        {
            key: weight
            for key, weight in load_file(folder / FILES[name]).items()
            if "key.bias" not in key  # it has no true gradient
        }
        for folder in (two, one, untrained(name))
    )
    assert found.keys() == wanted.keys() == before.keys()
    difference, update = (
        torch.cat([(ours[key] - theirs[key]).flatten() for key in sorted(found)]).norm()
        for ours, theirs in ((found, wanted), (wanted, before))
    )
    assert update > 0.1
    assert difference <= 1e-3 * update
    kind = "scores" if name == "upper_head" else "log_likelihoods"
    for ours, theirs in zip(records(two), records(one), strict=True):
        assert ours[kind] == pytest.approx(theirs[kind], abs=1e-4)


def test_a_head_of_its_own_is_saved_from_shards_as_plain_transformers_loads_it(both):
    two, one = both("upper_masked")
    ids = torch.arange(10, 30)[None]
    with torch.no_grad():
        found, wanted = (
            AutoModelForMaskedLM.from_pretrained(folder)(ids).logits for folder in (two, one)
        )
    torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-3)
    assert len(losses(two)) == 6
    names = load_file(two / MODEL)
    assert not torch.equal(
        names["cls.predictions.decoder.weight"], names["bert.embeddings.word_embeddings.weight"]
    )


def test_features_of_two_processes_and_what_is_trained_on_them_are_one_s(both):
    two, one = both("features")
    found, wanted = (load_file(folder / "probe.safetensors") for folder in (two, one))
    assert found.keys() == wanted.keys()
    for key in wanted:
        torch.testing.assert_close(found[key], wanted[key], atol=1e-4, rtol=1e-4)
    for ours, theirs in zip(records(two), records(one), strict=True):
        assert ours["scores"] == pytest.approx(theirs["scores"], abs=1e-4)
    found, wanted = (read_json(folder / "metrics.json") for folder in (two, one))
    for key in ("score", "base_score", "layer", "train_tokens", "layer_accuracies"):
        assert found[key] == wanted[key], key
    assert (found["world_size"], wanted["world_size"]) == (2, 1)
