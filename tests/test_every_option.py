"""Every option of every recipe changes something, or one line refuses it.

A table names for each option a value, and where it shows that it is not the default: in what
--preview prints, in what libraries and the trainer are given by a run that trains and scores
nothing, in a line that refuses it.
"""

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
from option_watch import Line, Watch, answers, command, preview, start
from quick_runs import (
    RECIPES,
    REVIEWS,
    SUMS,
    TRAINING,
    make_place,
    module_of,
    write_rows,
)
from recipe_runs import without_slow_parts
from transformers import AutoTokenizer

from recipelib.prompts import PromptTemplate

SEARCH = "search_label_words"
ALL = [*RECIPES, SEARCH]
CHAT_TEMPLATE = (
    "{{ mood|default('calm') }}{% for turn in messages %}[{{ turn.role }}] {{ turn.content }}</s>"
    "{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)


# What is asked and trained on -------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Models and rows; beside the reviews and the sums others, to tell options by: splits `more`,
    a column `other`, another template, a bad row.
    """
    root = tmp_path_factory.mktemp("place")
    with without_slow_parts():
        place = make_place(root)
        tokenizer = AutoTokenizer.from_pretrained(place.model)
        tokenizer.chat_template = CHAT_TEMPLATE
        tokenizer.save_pretrained(place.model)
        kinds = {"reviews": ("sentence", REVIEWS), "sums": ("question", SUMS)}
        for kind, (column, rows) in kinds.items():
            rows = [{**row, "other": f"other {number}"} for number, row in enumerate(rows)]
            splits = {"train": rows[:-3], "validation": rows[-3:], "more": rows[2:4]}
            for split, part in splits.items():
                write_rows(root / kind / f"{split}.jsonl", part)
                others = [{**row, column: f"not {row[column]}"} for row in part]
                write_rows(root / "others" / kind / f"{split}.jsonl", others)
                write_rows(root / "bad" / kind / f"{split}.jsonl", [{column: 1}, *part])
            name = {"reviews": "movie_reviews", "sums": "word_problems"}[kind]
            template = PromptTemplate.load(name)
            fields = {**template.fields, "prompt": f"Well. {template.fields['prompt']}"}
            PromptTemplate(fields, template.path).save(root / f"{kind}.yaml")
        write_rows(root / "questions.jsonl", [{"sentence": "fine", "question": "1 and 1?"}])
        yield place


# The table --------------------------------------------------------------------------------------


class Case(NamedTuple):
    """A value that is not the default, how that shows, and the other options meanwhile.

    `refuses` names what ends in a line: with the "value", or "without" it; neither by default.
    """

    value: Any
    how: Callable
    read: Callable[[Any], Any] = lambda seen: seen
    given: Mapping[str, Any] = MappingProxyType({})
    refuses: str = ""
    says: str = ""


def shown(value: Any, **given: Any) -> Case:
    """In what --preview prints."""
    return Case(value, preview, given=given)


def started(value: Any, read: Callable[[dict], Any], **given: Any) -> Case:
    """In what libraries and trainer are given."""
    return Case(value, start, read, given)


def answered(value: Any) -> Case:
    """In the answers to a file of questions."""
    return Case(value, answers)


def refused(value: Any, says: str, **given: Any) -> Case:
    """By the line that refuses it."""
    return Case(value, preview, given=given, refuses="value", says=says)


def allowed(value: Any, says: str, **given: Any) -> Case:
    """By the line that comes without it."""
    return Case(value, preview, given=given, refuses="without", says=says)


def load(name: str) -> Callable[[dict], Any]:
    """How the model is loaded."""
    return lambda seen: [options.get(name, "left out") for options in seen["loaded"]]


def score(name: str) -> Callable[[dict], Any]:
    """What scoring is told."""
    return lambda seen: [options.get(name) for options in seen["scored"]]


def peft(name: str) -> Callable[[dict], Any]:
    """What PEFT is told."""
    return lambda seen: seen["peft"][name]


def leave(name: str) -> Callable[[dict], Any]:
    """What stands in metrics.json, or what a function that writes is given."""
    return lambda seen: [written.get(name) for written in seen["left"]]


def kept(seen: dict) -> tuple | None:
    """Where what frozen layers compute is kept, and in what precision."""
    return seen["cache"]


def examples(seen: dict) -> int:
    """How many examples are trained."""
    return seen["examples"]


def parameters(seen: dict) -> set[str]:
    """Which parameters are trained."""
    return {*seen["trained"]}


def values(seen: dict) -> list[float]:
    """Where training starts."""
    return [*seen["trained"].values()]


def has_adapter(seen: dict) -> bool:
    """Whether PEFT is told anything."""
    return seen["peft"] is not None


MASKED_REFUSED = {"model_name_or_path": refused("<masked>", "is a masked language model, which")}
COMMON = {
    "model_name_or_path": shown("<masked>"),
    "revision": started("v1", load("revision")),
    "attn_implementation": started("eager", load("attn_implementation")),
    "template": shown("<template>"),
    "dataset": shown("<others>"),
    "columns": shown(["text=other"]),
    "train_split": shown("more"),
    "eval_split": started("more", score("rows")),
    "field": refused("data", "no key 'data'; its keys: "),
    "encoding": refused("utf-61", "--encoding utf-61: no encoding that Python knows"),
    "max_train_samples": started(2, examples),
    "max_eval_samples": started(1, score("rows")),
    "skip_bad_rows": allowed(True, "train.jsonl:1", dataset="<bad>"),
    "rendering": shown("chat"),
    "chat_template_kwargs": shown('{"mood": "glad"}', rendering="chat"),
    "max_new_tokens": started(7, score("max_new_tokens")),
    "eval_batch_tokens": started(100, score("batch_tokens")),
    # What it does with Parquet files stands in test_streaming.py.
    "streaming": refused(True, "--streaming true reads the hub and Parquet files", max_steps=2),
    "preview": shown(2),
    "predict": Case("rows.jsonl", command),
}
NOT_STREAMED = {"streaming": refused(True, "--streaming: nothing is trained")}
LORA = {"r": started(2, peft("r")), "alpha": started(2, peft("lora_alpha"))}
# What it does with one that is there stands in test_further.py.
ADAPTER = {"adapter": refused("<root>/none", "no such folder")}
LOSS = {"loss": started("dft", leave("loss"))}
FOUR_BITS = {"load_in_4bit": started(True, load("quantization_config"))}
CLOZE = {
    # What is shown are the rows that are scored.
    "train_split": started("more", examples),
    # Labels are chosen, but --predict answers with any recipe's run.
    "max_new_tokens": answered(2),
    "cloze": shown(True),
    "combine": started("max", score("combine")),
    "soft_verbalizer": started(True, parameters),
    "calibrate": started(True, score("calibrate")),
    "per_class": started(1, examples),
    "draws": started(2, lambda seen: seen["runs"], per_class=1),
}
TWO_TASKS = ["movie_reviews=<rows>", "word_problems=<sums>"]
CASES = {
    "lora_sft": {
        **COMMON,
        **MASKED_REFUSED,
        **LORA,
        **ADAPTER,
        "lora_dropout": started(0.5, peft("lora_dropout")),
        "target_modules": started(["q_proj"], parameters),
        "rslora": started(True, peft("use_rslora")),
        "dora": started(True, peft("use_dora")),
        "pissa": started(True, peft("init_lora_weights")),
        "loraplus_ratio": started(4.0, lambda seen: {*seen["rates"].values()}),
        **FOUR_BITS,
    },
    "adapter_sft": {
        **COMMON,
        **MASKED_REFUSED,
        **ADAPTER,
        "bottleneck_size": started(2, peft("bottleneck_size")),
        "placement": started("ffn", parameters),
        "adapter_input": started("input", peft("adapter_input")),
        "act": started("relu", peft("act")),
        "scaling": started("learned", parameters),
        "adapter_dropout": started(0.5, peft("dropout")),
        "init_weights": started("identity", values),
        "train_norms": started(True, parameters),
        "top_layers": started(1, parameters),
        "target_modules": started(["o_proj"], parameters),
        "adapterhub": started("<root>", leave("adapterhub")),
        "drop_adapters_below": started(1, leave("save_without_adapters_below")),
        **FOUR_BITS,
    },
    "prompt_tuning": {
        **COMMON,
        **CLOZE,
        **ADAPTER,
        "tune": started("prefix", peft("peft_type")),
        "virtual_tokens": started(2, peft("num_virtual_tokens")),
        "init": started("words", values),
        "prompt_encoder": started("lstm", parameters, tune="p_tuning"),
    },
    "cloze_sft": {
        **COMMON,
        **CLOZE,
        "soft_prompt": started(True, parameters),
        "virtual_tokens": started(2, peft("num_virtual_tokens"), soft_prompt=True),
        "init": started("words", values, soft_prompt=True),
        "score_only": started(True, lambda seen: seen["runs"]),
    },
    "instruction_sft": {
        **COMMON,
        **MASKED_REFUSED,
        "template": shown(["<template>=<rows>"]),
        "dataset": shown("<others>", template=["movie_reviews"]),
        "skip_bad_rows": allowed(True, "train.jsonl:1", template=["movie_reviews=<bad>"]),
        "rendering": shown("text"),
        "heldout_template": started(["word_problems=<sums>"], score("rows")),
        "mixing": started("equal", leave("mixture"), template=TWO_TASKS, max_train_samples=11),
        **LOSS,
        "lora": started(True, has_adapter),
        "r": started(2, peft("r"), lora=True),
        "alpha": started(2, peft("lora_alpha"), lora=True),
        "early_stopping_patience": started(
            1, lambda seen: seen["callbacks"].get("EarlyStopping"), save_strategy="steps"
        ),
        "sample_steps": started(2, lambda seen: seen["callbacks"].get("SampleWriter")),
    },
    "cot_sft": {
        **COMMON,
        **MASKED_REFUSED,
        **LORA,
        **LOSS,
        "columns": shown(["question=other"]),
        "target": shown("answer_only"),
        "rationale_instruction": shown("Think.", target="mixed"),
        "answer_instruction": shown("Say.", target="mixed"),
        "samples": started(3, score("samples")),
        "temperature": started(0.5, score("temperature"), samples=2),
        "full": started(True, has_adapter),
    },
    "transfer_learning": {
        **COMMON,
        "mode": shown("features"),
        "train_layers": started(2, parameters),
        "freeze_layers": started(0, parameters),
        "train_modules": started(["mlp"], parameters),
        "train_embeddings": started(True, parameters),
        "train_norms": started(True, parameters),
        "train_head": started(True, parameters),
        "layer_decay": started(0.5, lambda seen: seen["rates"], train_layers=2),
        "unfreeze_every": started(2, lambda seen: seen["callbacks"].get("GradualUnfreezing")),
        "peft": started("lora", has_adapter),
        "head": shown("classifier"),
        "cache": started(False, kept, max_steps=8),
        "cache_dtype": started("bfloat16", kept, max_steps=8),
        "cache_dir": started("<root>/cache", kept, max_steps=8),
        "clear_cache": started(True, lambda seen: "cleared" in seen["out"], max_steps=8),
        "layer": started("1", leave("layers"), mode="features"),
        "pooling": started("max", leave("pooling"), mode="features"),
        "probe": started("svm", leave("kind"), mode="features"),
    },
    "gpipe_sft": {
        **COMMON,
        "streaming": refused(True, "--streaming: each process would read other rows"),
        "model_name_or_path": refused("<masked>", "models of type bert are not cut into stages"),
        "stages": refused(2, "--stages 2: the number of started processes, 1"),
        "micro_batches": started(3, leave("micro_batches")),
        "schedule": started("1f1b", leave("schedule")),
        "peft": started("lora", has_adapter),
        "r": started(2, peft("r"), peft="lora"),
        "alpha": started(2, peft("lora_alpha"), peft="lora"),
    },
    "icl_eval": {
        **COMMON,
        **NOT_STREAMED,
        "max_train_samples": shown(1),
        "max_new_tokens": answered(2),
        "predict": answered("<root>/others/sums/more.jsonl"),
        "shots": shown(2),
        "sampler": shown("first", shots=2),
        "nearest_by": started("embedding", leave("embedded"), sampler="nearest"),
        "draws": started(3, score("draws")),
        "score": started("calibrated", score("score")),
        "reasoning": shown("none", template="word_problems", dataset="<sums>"),
        "trigger": started("So.", score("trigger"), reasoning="trigger", shots=0),
        "samples": started(3, score("samples"), template="word_problems", dataset="<sums>"),
        "temperature": started(
            0.5, score("temperature"), template="word_problems", dataset="<sums>"
        ),
        "adapter": refused("<root>/none", "no such folder"),
        "resume": started(True, lambda seen: "resuming" in seen["out"]),
    },
    SEARCH: {
        **COMMON,
        **NOT_STREAMED,
        "train_split": started("more", score("train")),
        "max_train_samples": started(2, score("train")),
        "max_new_tokens": refused(7, "--max_new_tokens: a search answers no rows"),
        "predict": refused("rows.jsonl", "--predict: a search answers no rows"),
        "cloze": shown(True),
    },
}
TABLE = [(recipe, option) for recipe, cases in CASES.items() for option in cases]


@pytest.fixture(scope="module")
def watch(place, tmp_path_factory):
    return Watch(place, tmp_path_factory.mktemp("watch"))


@pytest.mark.parametrize("recipe", ALL)
def test_the_table_has_every_option(recipe):
    kind = module_of(recipe).main.__annotations__["args"]
    assert {field.name for field in dataclasses.fields(kind)} == CASES[recipe].keys()


@pytest.mark.parametrize(("recipe", "option"), TABLE, ids=map("-".join, TABLE))
def test_every_option_changes_something_or_one_line_refuses_it(recipe, option, watch):
    case = CASES[recipe][option]
    without = watch.once(case.how, recipe, {**case.given})
    seen = watch.once(case.how, recipe, {**case.given, option: case.value})
    for name, found in (("without", without), ("value", seen)):
        assert isinstance(found, Line) == (case.refuses == name), found
        assert not isinstance(found, Line) or case.says in found
    if not case.refuses:
        assert case.read(without) != case.read(seen)


# Options together -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "options", "says"),
    [
        (
            "adapter_sft",
            {"placement": "ffn", "target_modules": ["o_proj"]},
            "--placement: --target_modules names the places; leave one of them out",
        ),
        *(
            (recipe, options, f"--{[*options][-1]}: changes nothing without {needs}")
            for recipe, options, needs in (
                ("cot_sft", {"full": True, "r": 2}, "--full false"),
                ("cot_sft", {"full": True, "alpha": 2}, "--full false"),
                ("cot_sft", {"answer_instruction": "Say."}, "--target mixed"),
                ("cot_sft", {"rationale_instruction": "Think."}, "--target mixed"),
                ("cot_sft", {"temperature": 0.5}, "--samples 2 or more"),
                ("cot_sft", {"loss": "dft", "label_smoothing_factor": 0.1}, "--loss nll"),
                ("instruction_sft", {"r": 2}, "--lora true"),
                ("instruction_sft", {"alpha": 2}, "--lora true"),
                ("gpipe_sft", {"r": 2}, "--peft lora"),
                ("gpipe_sft", {"alpha": 2}, "--peft lora"),
                ("prompt_tuning", {"prompt_encoder": "lstm"}, "--tune p_tuning"),
                ("prompt_tuning", {"tune": "p_tuning", "init": "words"}, "--tune soft_prompt or"),
                ("cloze_sft", {"virtual_tokens": 2}, "--soft_prompt true"),
                ("cloze_sft", {"init": "words"}, "--soft_prompt true"),
                ("icl_eval", {"trigger": "So."}, "--reasoning trigger"),
                ("transfer_learning", {"mode": "features", "peft": "lora"}, "--mode freeze"),
                ("transfer_learning", {"layer": "1"}, "--mode features"),
                ("icl_eval", {"nearest_by": "embedding"}, "--sampler nearest"),
                ("lora_sft", {"chat_template_kwargs": '{"mood": "glad"}'}, "--rendering chat"),
            )
        ),
        *(
            ("transfer_learning", options, says)
            for options, says in (
                ({"train_layers": 1, "freeze_layers": 1}, "--freeze_layers: --train_layers says"),
                ({"train_modules": ["mlp"], "train_layers": 1}, "--train_modules: --train_layers"),
                ({"peft": "lora", "train_head": True}, "--train_head: with --peft adapters are"),
                (
                    {"cache": False, "cache_dtype": "bfloat16"},
                    "--cache false: nothing is kept, --c",
                ),
                ({"mode": "features", "layer": "3"}, "--layer 3: pass a number from 0 to 2, or"),
                ({"train_layers": 3}, "--train_layers 3: the model has 2 layers"),
                (
                    {"train_modules": ["mpl"]},
                    "--train_modules mpl: no parameter has it",
                ),
                ({"train_modules": ["model"]}, "--train_modules: everything is trained"),
                ({"train_layers": 0}, "--train_layers: nothing is trained"),
                ({"head": "classifier", "packing": True}, "--packing: texts of which a class"),
            )
        ),
        ("icl_eval", {"shots": 0, "draws": 2}, "--draws: changes nothing without demonstrations"),
        ("icl_eval", {"shots": 0, "sampler": "first"}, "--sampler: changes nothing without dem"),
        (
            "icl_eval",
            {"shots": 2, "reasoning": "trigger"},
            "--shots 2: --reasoning trigger has none",
        ),
        *(
            (recipe, options, f"--{[*options][-1]}: is for training, and nothing is trained; leave")
            for recipe, options in (
                ("icl_eval", {"num_train_epochs": 2}),
                (SEARCH, {"learning_rate": 0.1}),
                ("cloze_sft", {"score_only": True, "optim": "sgd"}),
                ("transfer_learning", {"mode": "features", "save_steps": 7}),
            )
        ),
        ("icl_eval", {"push_to_hub": True}, "--push_to_hub: nothing is trained; leave it out"),
        ("prompt_tuning", {"neftune_noise_alpha": 5.0}, "--neftune_noise_alpha: is for training a"),
        ("cloze_sft", {"pad_to_multiple_of": 8}, "--pad_to_multiple_of: is for training to write"),
        ("lora_sft", {"pad_token": "<none>"}, "--pad_token <none>: is not in the tokenizer's voca"),
        ("lora_sft", {"router_aux_loss_coef": 0.1}, "has no experts whose load it could balance"),
        ("gpipe_sft", {"activation_offloading": True}, "--activation_offloading: needs a GPU"),
        ("icl_eval", {"samples": 3}, "--samples 3: movie_reviews is answered by the likeliest"),
        ("icl_eval", {"temperature": 0.5}, "--temperature 0.5: movie_reviews is answered by the"),
        *(
            ("icl_eval", {"template": "conversations", "dataset": "<chats>", **options}, says)
            for options, says in (
                ({"samples": 3}, "--samples 3: conversations is scored by the loss"),
                ({"temperature": 0.5}, "--temperature 0.5: conversations is scored by the loss"),
                ({"reasoning": "trigger"}, "--reasoning trigger: conversations is scored by the"),
                ({"score": "pmi"}, "--score pmi: answers of conversations are written"),
            )
        ),
    ],
)
def test_what_would_be_passed_over_is_refused(recipe, options, says, watch):
    line = watch.once(start, recipe, options | ({"shots": 0} if "template" in options else {}))
    assert isinstance(line, Line)
    assert says in line


def test_a_preview_shows_so_many_examples_of_each_task(watch):
    seen = watch.once(preview, "instruction_sft", {"template": TWO_TASKS, "preview": 2})
    for task in ("movie_reviews", "word_problems"):
        for number in (1, 2):
            assert f"{task}, example {number}: " in seen
    assert seen.count("example") == 4


def test_a_preview_shows_so_many_examples_of_each_text_that_is_trained_on_a_row(watch):
    seen = watch.once(preview, "cot_sft", {"target": "mixed", "preview": 2})
    assert seen.count("Solve the task step by step.") == 2
    assert seen.count("Give only the answer.") == 2


def test_at_a_ratio_of_zero_the_b_of_lora_stands_still(watch):
    rates = watch.once(start, "lora_sft", {"loraplus_ratio": 0.0})["rates"]
    assert {rate for name, rate in rates.items() if "lora_B" in name} == {0.0}


@pytest.mark.parametrize(
    ("recipe", "options", "other"),
    [
        *((recipe, {}, {}) for recipe in TRAINING),
        ("lora_sft", {"loraplus_ratio": 4.0}, {"lora_B": 0.04}),
        ("lora_sft", {"loraplus_ratio": 4.0, "optim": "adafactor"}, {"lora_B": 0.04}),
        ("prompt_tuning", {"tune": "prefix"}, {}),
        ("instruction_sft", {"lora": True}, {}),
        ("gpipe_sft", {"peft": "lora"}, {}),
        ("cot_sft", {"full": True}, {}),
        ("prompt_tuning", {"soft_verbalizer": True}, {"soft_verbalizer": 1e-3 / 3}),
        ("cloze_sft", {"soft_verbalizer": True}, {"soft_verbalizer": 0.2}),
        ("cloze_sft", {"soft_prompt": True}, {"prompt_encoder": 6.0}),
    ],
)
def test_the_learning_rate_reaches_all_that_is_trained(recipe, options, other, watch):
    first, second = (
        watch.once(start, recipe, {**options, **rate}) for rate in ({}, {"learning_rate": 0.02})
    )
    assert first["optimizer"] == second["optimizer"] == options.get("optim", "adamw").lower()
    for name, rate in first["rates"].items():
        own = [value for word, value in other.items() if word in name]
        assert rate == pytest.approx(own[0] if own else 0.01)
        assert second["rates"][name] == pytest.approx(2 * rate)
    assert all(any(word in name for name in first["rates"]) for word in other)
