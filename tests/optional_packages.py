"""Packages that a user without a GPU need not have: the tests that need them are skipped."""

from importlib.util import find_spec

import pytest

needs_bitsandbytes = pytest.mark.skipif(
    find_spec("bitsandbytes") is None,
    reason="bitsandbytes is not installed (requirements-gpu.txt)",
)
