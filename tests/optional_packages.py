"""Packages that a user without a GPU need not have: the tests that need them are skipped."""

from importlib.util import find_spec

import pytest

HAS_BITSANDBYTES = find_spec("bitsandbytes") is not None
needs_bitsandbytes = pytest.mark.skipif(
    not HAS_BITSANDBYTES,
    reason="bitsandbytes is not installed (requirements-gpu.txt)",
)
