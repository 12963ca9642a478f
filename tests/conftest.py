"""What all tests share: hypothesis finds the same examples on every machine, and the files are
shared out among the workers.
"""

import os

import pytest
from hypothesis import HealthCheck, settings

if "PYTEST_XDIST_WORKER" in os.environ:  # as many workers as cores: a thread for each
    os.environ.setdefault("OMP_NUM_THREADS", "1")

settings.register_profile(
    "suite",
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("suite")


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items):
    """A file's tests stay together, for they share fixtures; those of tests/fsdp all share one
    folder of runs. These take longest and come first.
    """
    for item in items:
        launched = item.path.parent.name == "fsdp"
        item.add_marker(pytest.mark.xdist_group("fsdp" if launched else item.path.name))
    items.sort(key=lambda item: item.path.parent.name != "fsdp")
