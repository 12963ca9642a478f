"""The versions of the libraries that a result depends on."""

from __future__ import annotations

import importlib.metadata
import platform
from contextlib import suppress


def versions() -> dict[str, str]:
    """The version of Python, and of each library that decides a result and is installed."""
    installed = {"python": platform.python_version()}
    packages = ["torch", "transformers", "trl", "peft", "accelerate", "datasets", "evaluate"]
    for package in [*packages, "bitsandbytes"]:
        with suppress(importlib.metadata.PackageNotFoundError):
            installed[package] = importlib.metadata.version(package)
    return installed
