"""Which versions of what a result depends on."""

from __future__ import annotations

import importlib.metadata
import platform
from contextlib import suppress


def versions() -> dict[str, str]:
    """Python's version and those of the libraries that decide a result, as far as installed."""
    found = {"python": platform.python_version()}
    packages = ["torch", "transformers", "trl", "peft", "accelerate", "datasets", "evaluate"]
    for package in [*packages, "bitsandbytes"]:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found
