"""One launch of everything else that trains, and the same in one process."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType

import adapter_sft
import cloze_sft
import cot_sft
import instruction_sft
import lora_sft
import prompt_tuning
import pytest
import search_label_words
import transfer_learning
import watched_cache
from datasets import Dataset
from launching import CONFIGS, SAVING, UNSAVED, UNTRAINED, Launched, command
from optional_packages import HAS_BITSANDBYTES
from tiny_llama import save_tiny_llama

Runs = dict[str, tuple[ModuleType, dict]]


@pytest.fixture(scope="session")
def recipe_runs(root) -> Runs:
    """Recipes and what they are told, by the names of their runs."""
    return {
        **_text_runs(root),
        **_adapter_runs(),
        **_prompt_runs(root),
        **_upper_runs(root),
        **_packed_runs(root),
    }


def _text_runs(root: Path) -> Runs:
    """The recipes that tune the model's text behavior."""
    cot = {
        "template": "gsm8k",
        "dataset": root / "sums",
        "target": "mixed",
        "samples": 2,
        "max_new_tokens": 6,
        "max_steps": 6,
    }
    instruction = {
        "dataset": None,
        "template": [f"movie_reviews={root / 'reviews'}", f"gsm8k={root / 'sums'}"],
        "mixing": "equal",
        "max_train_samples": 80,
        "max_new_tokens": 6,
        "max_length": 160,
        "max_steps": 6,
        "learning_rate": 1e-3,
        "packing": True,
        "sample_steps": 3,
    }
    chats = {
        "dataset": _chats(root),
        "template": None,
        "max_train_samples": -1,
        "max_eval_samples": 4,
        "dataset_num_proc": 2,
        "max_length": 160,
        "max_steps": 2,
        "learning_rate": 1e-3,
    }
    stream = {"dataset": _parquet(root), "streaming": True, "max_steps": 4}
    return {
        "cot": (cot_sft, cot),
        "instruction": (instruction_sft, instruction),
        "chats": (instruction_sft, chats),
        "stream": (lora_sft, stream),
    }


def _chats(root: Path) -> Path:
    """As many conversations as several processes prepare."""
    rows = [
        {
            "messages": [
                {"role": role, "content": f"{word} {n}"}
                for word in ("one", "two")
                for role in ("user", "assistant")
            ]
        }
        for n in range(800)
    ]
    path = root / "chats.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def _parquet(root: Path) -> Path:
    """Reviews as Parquet files: one to train on, so that both processes read it."""
    folder = root / "parquet"
    folder.mkdir()
    rows = [
        {"sentence": f"a {word} film, number {n}", "label": label}
        for n in range(60)
        for word, label in (("fine", "positive"), ("dull", "negative"))
    ]
    Dataset.from_list(rows).to_parquet(folder / "train.parquet")
    Dataset.from_list(rows[:4]).to_parquet(folder / "validation.parquet")
    return folder


def _adapter_runs() -> Runs:
    """All that adapters train, and those that read the residual, with activations recomputed."""
    shared = {"max_steps": 6, "bottleneck_size": 8}
    everything = {"scaling": "learned", "train_norms": True, "drop_adapters_below": 1}
    top = {"adapter_input": "residual", "top_layers": 1, "activation_checkpointing": True}
    return {
        "adapter": (adapter_sft, {**shared, **everything}),
        "adapter_top": (adapter_sft, {**shared, **top}),
    }


def _prompt_runs(root: Path) -> Runs:
    """Every kind of weights that is trained through label words."""
    shared = {"max_steps": 6, "max_length": 100, "learning_rate": None}
    soft = {**shared, "virtual_tokens": 5}
    masked = {"model_name_or_path": root / "masked"}
    network = {**soft, **masked, "tune": "p_tuning", "learning_rate": 1e-3}
    resumed = {"resume_from_checkpoint": root / "two_masked_p_tuning" / "checkpoint-3"}
    whole = {**shared, "learning_rate": 1e-3}
    few = {"per_class": 4, "draws": 2, "max_steps": -1, "num_train_epochs": 3}
    return {
        "soft_prompt": (prompt_tuning, {**soft, "soft_verbalizer": True}),
        "prompt_model": (cloze_sft, whole),
        "masked_p_tuning": (prompt_tuning, {**network, "save_strategy": "steps", "save_steps": 3}),
        "masked_both": (
            cloze_sft,
            {**whole, **masked, "soft_prompt": True, "virtual_tokens": 5, "combine": "mean"},
        ),
        "masked_resumed": (prompt_tuning, {**network, **resumed}),
        "few_shot": (prompt_tuning, {**soft, **masked, **few}),
        "searched": (search_label_words, {**masked, "max_length": 100, **UNTRAINED}),
    }


def _upper_runs(root: Path) -> Runs:
    """The upper one of two layers, on what the lower one puts out once; and the same cache again,
    whole and without a shard.
    """
    upper = {"train_layers": 1, "max_steps": 6, "cache_dir": root / "states"}
    masked = {"model_name_or_path": root / "masked", "max_length": 100}
    head = {"head": "classifier"}
    return {
        "upper": (watched_cache, upper),
        "upper_again": (watched_cache, upper),
        f"upper{watched_cache.LOSES}": (watched_cache, upper),
        "upper_masked": (watched_cache, {**upper, **masked, "train_head": True}),
        "upper_head": (watched_cache, {**upper, **masked, **head, "peft": "lora"}),
        "features": (transfer_learning, {"mode": "features", "cache": False, **UNTRAINED}),
    }


def _packed_runs(root: Path) -> Runs:
    """LoRA on a base in 4 bits."""
    if not HAS_BITSANDBYTES:
        return {}
    wide = save_tiny_llama(root / "wide", hidden_size=64)
    packed = {"model_name_or_path": wide, "load_in_4bit": True}
    resumed = {"resume_from_checkpoint": root / "two_packed" / "checkpoint-4"}
    return {
        "packed": (lora_sft, {**packed, **SAVING}),
        "packed_resumed": (lora_sft, {**packed, **resumed}),
    }


@pytest.fixture(scope="session")
def two(options, launch, recipe_runs) -> Launched:
    """Two processes under fsdp2.yaml; the run `NAME` leaves `two_NAME`."""
    runs = {
        f"two_{name}": command(recipe, options(f"two_{name}", **changes))
        for name, (recipe, changes) in recipe_runs.items()
    }
    launched = launch(CONFIGS / "fsdp2.yaml", 2, runs)
    assert launched.failed == [], launched.errors
    return launched


@pytest.fixture(scope="session")
def both(root, two, alone, recipe_runs) -> Callable[[str], tuple[Path, Path]]:
    """Gives the folders of a run over two processes, and of the same in one."""

    @cache
    def run(name: str) -> tuple[Path, Path]:
        recipe, changes = recipe_runs[name]
        return root / f"two_{name}", alone(f"single_{name}", recipe, **changes)

    return run


@pytest.fixture(scope="session")
def untrained(alone, recipe_runs) -> Callable[[str], Path]:
    """Gives the folder of a run in which nothing is learned: what the others start from."""

    def run(name: str) -> Path:
        recipe, changes = recipe_runs[name]
        still = {"learning_rate": 0.0, "max_steps": 1, **UNSAVED}
        if recipe is adapter_sft:
            still["drop_adapters_below"] = None
        return alone(f"start_{name}", recipe, **{**changes, **still})

    return run
