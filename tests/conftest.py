"""What all tests share: hypothesis finds the same examples on every machine, and the files are
shared out among the workers.
"""

import atexit
import gc
import os
import shutil
import tempfile

import pytest
from hypothesis import HealthCheck, settings

pytest_plugins = ["recipe_runs"]

# bitsandbytes, which PEFT imports, else loads torch's compiler: seconds in every process.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # as many workers as cores: a thread for each
    os.environ.setdefault("OMP_NUM_THREADS", "1")

else:  # what recipes prepare is kept for the other tests, and goes with the last one
    os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="recipes-tests-")
    atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)

settings.register_profile(
    "suite",
    max_examples=14,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("suite")


@pytest.fixture(autouse=True, scope="module")
def _as_in_a_new_process():
    """What the libraries hold by now is left out of garbage collection, which accelerate asks for
    after each training and which took a tenth of a recipe's run; and what --predict tells
    transformers by the environment does not outlive a file.
    """
    gc.collect()
    gc.freeze()
    yield
    os.environ.pop("FSDP_CPU_RAM_EFFICIENT_LOADING", None)


def pytest_xdist_make_scheduler(config, log):
    """A file's tests stay together, for they share fixtures; so do those of tests/pipeline and of
    a folder below tests/fsdp, which share launches.
    """
    from xdist.scheduler import LoadFileScheduling

    class Files(LoadFileScheduling):
        def _split_scope(self, nodeid):
            file = super()._split_scope(nodeid)
            launched = "tests/fsdp/" in file or "tests/pipeline/" in file
            return file.rpartition("/")[0] if launched else file

    return Files(config, log)


# What takes longest, so that no worker is left alone with it: folders of launches, then files.
FIRST = ["lora", "recipes", "pipeline", "launches", "sharded"]
FIRST += ["test_prompt_tuning.py", "test_recipe_matrix.py", "test_icl_eval.py"]


def pytest_collection_modifyitems(items):
    """What takes long comes first."""
    places = {name: place for place, name in enumerate(FIRST)}

    def place(item) -> int:
        folder = item.path.parent
        name = folder.name if folder.parent.name in ("fsdp", "tests") else item.path.name
        return places.get(name, len(FIRST))

    items.sort(key=place)
