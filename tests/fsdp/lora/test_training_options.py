"""Noise, lines of rows, early stopping and samples are over two processes under FSDP2 as in one."""

from pathlib import Path

import pytest
import with_options
from run_files import read_json
from stopping import assert_stopped_alike

pytestmark = pytest.mark.slow

KINDS = list(with_options.RATES)
HOW = list(with_options.OPTIONS)


@pytest.fixture(scope="module")
def folders(root, two) -> tuple[Path, Path]:
    """What two processes found, and what one process does."""
    return root / "two_options", with_options.here(root / "alone_options")


@pytest.fixture
def results(folders, kind):
    """Of one kind: two processes' and one's, by how they were trained."""

    def read(how: str) -> tuple[dict, dict]:
        two, alone = (read_json(folder / f"{kind}-{how}.json") for folder in folders)
        return two, alone

    return read


@pytest.mark.parametrize("kind", KINDS)
def test_noise_is_in_the_training_loss_and_nowhere_else(results, kind):
    two, alone = results("noise")
    plain = results("packed")[0]["losses"][0]  # the same first step, without noise
    for found in (two, alone):
        assert abs(found["losses"][0] - plain) > 1e-2
        assert not found["noisy"]
        for loss in (found["before"], found["after"]):
            assert loss == pytest.approx(alone["before"], abs=1e-5)
        assert found["evaluated"] == pytest.approx(alone["evaluated"][:1] * 2, abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_lines_of_rows_are_trained_as_in_one_process(results, kind):
    two, alone = results("packed")
    assert two["rows_apart"] is alone["rows_apart"] is True
    assert two["padding"] == alone["padding"] == 0
    assert two["losses"] == pytest.approx(alone["losses"], abs=1e-4)
    assert alone["losses"][0] - alone["losses"][-1] > 0.1
    assert two["after"] == pytest.approx(alone["after"], abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_training_stops_and_goes_back_as_in_one_process(folders, kind):
    assert_stopped_alike(*folders, kind)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("kind", KINDS)
def test_samples_are_those_of_one_process(results, kind, how):
    two, alone = results(how)
    assert two["samples"] == alone["samples"]
    assert len(alone["samples"]) >= 6
    assert two["whole"] == 0 < alone["whole"]  # every parameter is a shard again
