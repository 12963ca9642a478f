"""Models of several families, of four layers each and with dropout, of which some can be frozen;
and rows to train them on through their answers, label words or a classification head.
"""

import copy
from collections.abc import Collection, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from datasets import Dataset, Features, List, Value
from tiny_models import LLAMA_LIKE, TOKENIZER, VOCABULARY, WINDOW
from tokenizers_for_tests import tokenizer_for
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
)

from recipelib.activations import FrozenLayers, StateCache
from recipelib.encoding.asking import Cloze
from recipelib.encoding.cloze_rows import example_of
from recipelib.encoding.examples import EncodedRows
from recipelib.models import train_only
from recipelib.training.class_trainer import ClassTrainer
from recipelib.training.cloze_trainer import ClozeTrainer
from recipelib.training.config import RecipeConfig
from recipelib.training.trainer import RecipeTrainer

LAYERS = 4
MASKED_TOKENIZER = tokenizer_for("bert")
_LLAMA = {**LLAMA_LIKE, "num_hidden_layers": LAYERS, "attention_dropout": 0.1}
_BERT = {
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
}
CAUSAL = {
    "llama": ("llama", {**_LLAMA, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", _LLAMA),
    "gemma3": (
        "gemma3_text",
        {
            **_LLAMA,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2),
        },
    ),
    "mistral": ("mistral", {**_LLAMA, "sliding_window": WINDOW}),
    "gpt2": ("gpt2", {"n_positions": 128, "n_embd": 32, "n_layer": LAYERS, "n_head": 4}),
    # its layers put out tuples
    "bloom": (
        "bloom",
        {
            "hidden_size": 32,
            "n_layer": LAYERS,
            "n_head": 4,
            "hidden_dropout": 0.1,
            "attention_dropout": 0.1,
        },
    ),
}
MASKED = {"bert": ("bert", _BERT), "roberta": ("roberta", {**_BERT, "pad_token_id": 1})}
FAMILIES = {**CAUSAL, **MASKED}
# Further ones that `deep` makes, which differ from those above in nothing that most tests look at.
MORE = {name: (name, _LLAMA) for name in ("qwen2", "gemma", "gemma2")}
_HEADS = {
    "words": AutoModelForCausalLM,
    "cloze": AutoModelForMaskedLM,
    "classes": AutoModelForSequenceClassification,
}


def deep(family: str, answers: str | None = None, **fields: Any):
    """A model of a family with four layers, always of the same float32 weights, which are so large
    that each token shows in what it computes.

    Args:
        answers: how they are read: as "words", in a "cloze", or by a head for "classes".
        fields: of its configuration, in place of those above.
    """
    answers = answers or ("cloze" if family in MASKED else "words")
    kind, given = {**FAMILIES, **MORE}[family]
    size = len(MASKED_TOKENIZER) if family in MASKED else VOCABULARY
    given = {"vocab_size": size, "pad_token_id": 0, **given, **fields}
    if answers == "classes":
        given["num_labels"] = 3
    torch.manual_seed(0)
    model = _HEADS[answers].from_config(AutoConfig.for_model(kind, **given), dtype=torch.float32)
    with torch.no_grad():
        for weight in model.parameters():
            weight *= 5 if weight.dim() > 1 else 1
    return model


def freeze(
    model,
    layers: Collection[int] = (),
    *,
    names: list[str] | None = None,
    embeddings: bool = False,
    norms: bool = False,
    head: bool = False,
):
    """`train_only` these layers, or what has these names, and what else is named; the model."""
    asked = SimpleNamespace(
        train_modules=names,
        train_embeddings=embeddings,
        train_norms=norms,
        train_head=head,
        head="words",
    )
    train_only(model, layers, asked)
    return model


def causal_rows(count: int, seed: int = 0) -> list[dict]:
    """Rows of 3 to 20 tokens, longer than a window, whose last one to five are supervised."""
    draw = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        length, answer = _drawn(draw, 3, 21), _drawn(draw, 1, 6)
        ids = torch.randint(1, VOCABULARY, (length,), generator=draw).tolist()
        start = max(1, length - answer)
        rows.append({"input_ids": ids, "labels": [-100] * start + ids[start:]})
    return rows


def _drawn(draw: torch.Generator, low: int, high: int) -> int:
    return int(torch.randint(low, high, (1,), generator=draw))


def cloze_rows(count: int, seed: int = 0) -> list[dict]:
    """Rows of two sequences each: a label has a word of one token, the other of two."""
    draw, rows = torch.Generator().manual_seed(seed), []
    for number in range(count):
        length = _drawn(draw, 5, 21)
        ids = torch.randint(10, 200, (length,), generator=draw).tolist()
        request = Cloze(ids, [2, 3], [[11], [12, 13]])
        row = example_of([(request, [("good",), ("bad",)])], ["good", "bad"], "good")
        rows.append({**row, "labels": number % 2, "length": len(row["input_ids"])})
    return rows


def class_rows(count: int, seed: int = 0) -> list[dict]:
    """Rows of one of three classes."""
    rows = causal_rows(count, seed)
    return [
        {
            "input_ids": [token % 200 + 10 for token in row["input_ids"]],
            "length": len(row["input_ids"]),
            "labels": number % 3,
        }
        for number, row in enumerate(rows)
    ]


def examples_of(lengths: Sequence[int | Sequence[int]], seed: int = 0) -> Dataset:
    """Examples of random tokens with these lengths; several in one: of its sequences."""
    draw = torch.Generator().manual_seed(seed)
    several = any(not isinstance(one, int) for one in lengths)
    totals = [one if isinstance(one, int) else sum(one) for one in lengths]
    columns = {
        "input_ids": [torch.randint(1, 200, (n,), generator=draw).tolist() for n in totals],
        "length": totals,
    }
    features = {"input_ids": List(Value("int32")), "length": Value("int32")}
    if several:
        columns["lengths"] = [[one] if isinstance(one, int) else [*one] for one in lengths]
        features["lengths"] = List(Value("int32"))
    return Dataset.from_dict(columns, Features(features))


_TRAINERS = {
    "words": (RecipeTrainer, causal_rows),
    "cloze": (ClozeTrainer, cloze_rows),
    "classes": (ClassTrainer, class_rows),
}


def train_above(folder, model, answers: str, *, cached: bool, callbacks=None, **options: Any):
    """Train what `requires_grad` on 16 rows, 8 a step in two micro-batches, for two passes.

    Args:
        answers: see `deep`.
        cached: whether what the frozen layers compute is kept.
        callbacks: made of the model's frozen layers and the trainer's arguments.
    Returns:
        The trainer afterwards; its `losses` are those of the steps.
    """
    kind, make = _TRAINERS[answers]
    defaults = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 2,
        "learning_rate": 0.05,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    rates = options.pop("rates", None)
    rows = make(16)
    if answers == "words":
        rows = [{**row, "length": len(row["input_ids"])} for row in rows]
    encoded = EncodedRows(Dataset.from_list(rows), torch.arange(len(rows)).numpy())
    task = SimpleNamespace(
        encoded=encoded,
        tokenizer=copy.deepcopy(TOKENIZER if answers == "words" else MASKED_TOKENIZER),
        checkpoint=None,
        memory=None,
        model_name="a tiny model",
        sources={},
        facts={"combine": "logsumexp"},
        trained_as={},
    )
    frozen = FrozenLayers.of(model)
    cache = StateCache(frozen, encoded.examples, folder, torch.float32) if cached else None
    training = RecipeConfig(**{**defaults, **options})
    trainer = kind(
        model,
        training,
        task,
        rates=rates,
        cache=cache,
        callbacks=callbacks(frozen, training) if callbacks else None,
    )
    trainer.train()
    trainer.losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return trainer
