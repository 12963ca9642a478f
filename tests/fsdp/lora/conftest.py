"""Launches of LoRA and of full tuning under FSDP2, and what goes on where they stopped."""

from types import ModuleType

import full_tuning
import lora_sft
import pytest
import with_options
from launching import CONFIGS, SAVING, Launched, command


@pytest.fixture(scope="session")
def two(root, options, launch) -> Launched:
    """Two processes under fsdp2.yaml."""
    sums = {"dataset": root / "sums", "max_steps": 2}
    lora = {
        # Scored, evaluated and saved on the way: each finds the model as the other left it.
        "two": {**SAVING, "eval_strategy": "steps", "eval_steps": 2},
        "two_resumed": {"resume_from_checkpoint": root / "two" / "checkpoint-4"},
        "two_rebalanced": {"train_sampling_strategy": "batch_rebalance"},
        "two_pissa": {"pissa": True, "r": 4},
        "two_further": {"adapter": root / "two", "max_steps": 2},
        "two_recomputed": {"activation_checkpointing": True, "max_steps": 4},
        "two_written": {
            **sums,
            "template": "gsm8k",
            "max_new_tokens": 6,
            "eval_batch_tokens": 200,
        },
        "two_loss": {**sums, "template": root / "questions.yaml", "eval_batch_tokens": 250},
    }
    runs = {name: command(lora_sft, options(name, **changes)) for name, changes in lora.items()}
    runs["two_full"] = command(full_tuning, options("two_full"))
    runs |= with_options.runs(root / "two_options")
    launched = launch(CONFIGS / "fsdp2.yaml", 2, runs)
    assert launched.failed == [], launched.errors
    return launched


@pytest.fixture(scope="session")
def one(root, options, launch, two) -> Launched:
    """One process, going on where two stopped."""
    changes = {
        "gradient_accumulation_steps": 4,
        "resume_from_checkpoint": root / "two" / "checkpoint-4",
        **SAVING,
    }
    runs = {"two_then_one": command(lora_sft, options("two_then_one", **changes))}
    launched = launch(CONFIGS / "fsdp2.yaml", 1, runs)
    assert launched.failed == [], launched.errors
    return launched


@pytest.fixture(scope="session")
def recomputing(root, options, launch, one) -> Launched:
    """Two processes under an fsdp2.yaml that recomputes activations; one run goes on where one
    process stopped.
    """
    config = root / "recomputing.yaml"
    text = (CONFIGS / "fsdp2.yaml").read_text()
    config.write_text(
        text.replace("fsdp_activation_checkpointing: false", "fsdp_activation_checkpointing: true")
        # the other choice that the file offers, on the way
        .replace("fsdp_reshard_after_forward: true", "fsdp_reshard_after_forward: false")
    )
    grown = {"resume_from_checkpoint": root / "two_then_one" / "checkpoint-6"}
    recipes: dict[str, tuple[ModuleType, dict]] = {
        "recomputing": (full_tuning, {"max_steps": 4}),
        "recomputing_lora": (lora_sft, {"max_steps": 4}),
        "one_then_two": (lora_sft, grown),
        "two_owners": (lora_sft, {"activation_checkpointing": True}),
    }
    runs = {
        name: command(recipe, options(name, **changes))
        for name, (recipe, changes) in recipes.items()
    }
    return launch(config, 2, runs)
