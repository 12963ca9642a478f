"""Launches that leave sharded checkpoints, and what goes on from one."""

import full_tuning
import lora_sft
import pytest
import with_options
from launching import CONFIGS, SAVING, Launched, command


@pytest.fixture(scope="session")
def sharded(root, options, launch) -> Launched:
    """Two processes under fsdp2_sharded.yaml."""
    resumed = {"resume_from_checkpoint": root / "sharded" / "checkpoint-4"}
    runs = {
        "sharded": command(lora_sft, options("sharded", **SAVING)),
        "sharded_resumed": command(lora_sft, options("sharded_resumed", **resumed)),
        "sharded_full": command(full_tuning, options("sharded_full", **SAVING)),
        **with_options.runs(root / "sharded_options", ["stopped"]),
    }
    launched = launch(CONFIGS / "fsdp2_sharded.yaml", 2, runs)
    assert launched.failed == [], launched.errors
    return launched


@pytest.fixture(scope="session")
def one(root, options, launch, sharded) -> Launched:
    """One process, going on where two stopped."""
    changes = {
        "gradient_accumulation_steps": 4,
        "resume_from_checkpoint": root / "sharded" / "checkpoint-4",
        **SAVING,
    }
    runs = {"sharded_then_one": command(lora_sft, options("sharded_then_one", **changes))}
    launched = launch(CONFIGS / "fsdp2_sharded.yaml", 1, runs)
    assert launched.failed == [], launched.errors
    return launched
