"""Whether what frozen layers compute is kept, and why not; rates that fall with depth; layers that
thaw one by one.
"""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from deep_models import FAMILIES, LAYERS, deep, examples_of, freeze, train_above
from transformers import TrainerCallback

from recipelib.activations import FrozenLayers
from recipelib.adapters import adapt_layers
from recipelib.runtime import Store, UserError
from recipelib.task import ClassTask, ClozeTask, Task
from recipelib.training import (
    ClassTrainer,
    ClozeTrainer,
    GradualUnfreezing,
    RecipeConfig,
    RecipeTrainer,
    keep_states,
    rates_by_depth,
    trainer_of,
)
from recipelib.training.frozen import passes

EXAMPLES = examples_of([5] * 40)
PASSES = {"num_train_epochs": 3, "max_steps": -1, "per_device_train_batch_size": 2}
PASSES |= {"gradient_accumulation_steps": 2, "world_size": 2}


def training_of(**changes) -> SimpleNamespace:
    device = torch.device("cpu")
    plain = {"torch_compile": False, "mixed_precision": "no", "device": device}
    plain["neftune_noise_alpha"] = None
    return SimpleNamespace(**{**PASSES, **plain, **changes})


def asked(folder, **changes) -> SimpleNamespace:
    """The recipe's options."""
    plain = {"cache": True, "cache_dir": str(folder), "cache_dtype": None, "clear_cache": False}
    return SimpleNamespace(**{**plain, **changes})


def keep(folder, *, layers=(2, 3), stream=None, model=None, training=None, **changes):
    """What is kept of a model's states, and the model."""
    model = freeze(model or deep("llama"), [*layers])
    encoded = SimpleNamespace(examples=EXAMPLES, stream=stream)
    task = SimpleNamespace(encoded=encoded, store=Store(1, folder / "rows"))
    frozen = FrozenLayers.of(model)
    args = asked(folder, **changes)
    return keep_states(frozen, model, task, args, training or training_of()), model


def said(capsys) -> str:
    """What was printed, on one line."""
    return " ".join(capsys.readouterr().out.replace("│", " ").split())


# Whether states are kept -----------------------------------------------------------------------


def test_over_several_passes_they_are_kept_and_it_is_said_how_much_and_where(tmp_path, capsys):
    cache, _ = keep(tmp_path)
    assert cache.frozen.boundary == 2
    assert cache.folder.parent == tmp_path
    line = said(capsys)
    assert "computed once: 2 of 4 200 tokens x 128 bytes = 0.0 MB in" in line
    assert "layers 0 to 1 frozen" in line
    assert "layers 2 to 3 trained" in line
    assert "there already" not in line


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"cache": False, "cache_dir": None}, "--cache false"),
        ({"layers": range(LAYERS)}, "nothing is frozen below what is trained"),
        ({"stream": "rows"}, "a stream is met once"),
        ({"training": training_of(num_train_epochs=1)}, "each row is met at most once"),
        ({"training": training_of(max_steps=5)}, "each row is met at most once"),
    ],
)
def test_where_that_does_not_pay_it_is_said_why_not(changes, why, tmp_path, capsys):
    cache, _ = keep(tmp_path, **changes)
    assert cache is None
    line = said(capsys)
    assert f"their states not kept ({why}): the frozen layers are computed in each pass" in line
    assert "computed once" not in line


def test_a_single_pass_takes_them_where_they_are_there_whole(tmp_path, capsys):
    once = training_of(num_train_epochs=1)
    first, model = keep(tmp_path)
    first.fill(model)
    capsys.readouterr()
    cache, _ = keep(tmp_path, training=once)
    assert cache.key == first.key
    assert "there already" in said(capsys)
    cache.path(cache.shards[3]).unlink()
    assert keep(tmp_path, training=once)[0] is None


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 3),
        ({"num_train_epochs": 0.5}, 0.5),
        ({"max_steps": 5}, 1),  # of 8 rows each
        ({"max_steps": 8}, 1.6),
        ({"max_steps": 8, "world_size": 1}, 0.8),
        ({"max_steps": 10, "num_train_epochs": 1}, 2),
        ({"max_steps": 7, "gradient_accumulation_steps": 3}, 1.75),  # of 12 rows, the last of 4
    ],
)
def test_a_row_is_met_as_often_as_the_steps_go_over_all_rows(changes, expected):
    assert passes(40, training_of(**changes)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("cache_dtype", "model_dtype", "expected"),
    [
        (None, torch.float32, torch.float32),
        (None, torch.bfloat16, torch.bfloat16),
        ("float16", torch.float32, torch.float16),
        ("bfloat16", torch.float32, torch.bfloat16),
        ("float32", torch.bfloat16, torch.float32),
    ],
)
def test_they_have_the_models_precision_unless_another_is_asked_for(
    cache_dtype, model_dtype, expected, tmp_path
):
    model = deep("llama").to(model_dtype)
    cache, _ = keep(tmp_path, model=model, cache_dtype=cache_dtype)
    assert cache.dtype == expected


def test_what_is_computed_in_another_precision_or_elsewhere_is_kept_apart(tmp_path):
    caches = [
        keep(tmp_path, training=training_of(**other))[0]
        for other in ({}, {"mixed_precision": "bf16"}, {"device": torch.device("cuda")})
    ]
    assert len({cache.folder for cache in caches}) == 3


def test_without_a_folder_they_lie_beside_prepared_rows(tmp_path):
    assert keep(tmp_path, cache_dir=None)[0].root == tmp_path / "rows"


def test_those_of_all_runs_are_deleted_if_that_is_asked_for(tmp_path, capsys):
    first, model = keep(tmp_path)
    first.fill(model)
    assert keep(tmp_path, clear_cache=True)[0].is_there() is False
    assert f"of what frozen layers have computed in {tmp_path}" in said(capsys)
    assert not first.folder.exists()


def test_a_compiled_model_is_refused_in_one_line(tmp_path):
    with pytest.raises(UserError, match=r"^--torch_compile: the cache changes what is compiled"):
        keep(tmp_path, training=training_of(torch_compile=True))
    with pytest.raises(UserError, match=r"^--neftune_noise_alpha: the cache would keep no noise"):
        keep(tmp_path, training=training_of(neftune_noise_alpha=5.0))
    compiled = training_of(torch_compile=True)
    assert keep(tmp_path, training=compiled, cache=False, cache_dir=None)[0] is None


@pytest.mark.parametrize(
    "unused", [{"cache_dtype": "bfloat16"}, {"cache_dir": "states"}, {"clear_cache": True}]
)
def test_what_is_said_of_a_cache_that_is_off_is_refused_by_name(unused, tmp_path):
    (name,) = unused
    with pytest.raises(UserError, match=f"^--cache false: nothing is kept, --{name} changes noth"):
        keep(tmp_path, cache=False, **{"cache_dir": None, **unused})


# Which trainer ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "trainer"),
    [(Task, RecipeTrainer), (ClozeTask, ClozeTrainer), (ClassTask, ClassTrainer)],
)
def test_how_answers_are_read_says_who_trains(task, trainer):
    assert trainer_of(object.__new__(task)) is trainer


# Rates ------------------------------------------------------------------------------------------


def rate_of(name: str, rates: dict[str, float], whole: float) -> float:
    """As `RecipeTrainer` reads them."""
    return next((rate for word, rate in rates.items() if word in name), whole)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("adapted", [False, True])
def test_a_layers_rate_is_that_of_the_layer_above_it_times_the_decay(family, adapted):
    model = adapt_layers(deep(family), "lora", range(LAYERS)) if adapted else deep(family)
    rates = rates_by_depth(model, 0.8, 0.5)
    place = {"gpt2": ".h.", "bloom": ".h.", "bert": ".layer.", "roberta": ".layer."}
    for name, _ in model.named_parameters():
        _, _, rest = name.partition(place.get(family, ".layers."))
        if rest:
            assert rate_of(name, rates, 0.8) == 0.8 * 0.5 ** (3 - int(rest[0])), name
        elif "word_embeddings.weight" in name or "embed_tokens" in name or ".wte." in name:
            assert rate_of(name, rates, 0.8) == 0.8 * 0.5**4, name
        elif "norm" in name and "embed" not in name.lower():
            assert rate_of(name, rates, 0.8) == 0.8, name


def test_numbers_that_begin_alike_are_different_layers():
    model = deep("gpt2", n_layer=12)
    rates = rates_by_depth(model, 1.0, 0.5)
    assert rate_of("transformer.h.1.mlp.c_fc.weight", rates, 1.0) == 0.5**10
    assert rate_of("transformer.h.11.mlp.c_fc.weight", rates, 1.0) == 1


def test_without_decay_all_have_the_whole_rate():
    assert rates_by_depth(deep("gpt2"), 0.8, 1.0) == {}


def test_a_layer_moves_by_its_own_rate(tmp_path):
    moved = {}
    for decay in (1.0, 0.5):
        model = freeze(deep("llama"), [1, 2, 3])
        before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        rates = rates_by_depth(model, 1e-3, decay)
        train_above(
            tmp_path / str(decay), model, "words", cached=True, rates=rates, learning_rate=1e-3,
            max_steps=1,
        )  # fmt: skip
        moved[decay] = {
            name: (weight.detach() - before[name]).norm().item()
            for name, weight in model.named_parameters()
        }
    for layer, share in ((3, 1), (2, 0.5), (1, 0.25)):
        name = f"model.layers.{layer}.mlp.up_proj.weight"
        assert moved[0.5][name] == pytest.approx(share * moved[1.0][name], rel=1e-2)
    assert moved[0.5]["model.norm.weight"] == pytest.approx(moved[1.0]["model.norm.weight"])


# Thawing ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trained", "every", "lowest"),
    [
        ([1, 2, 3], 1, [3, 2, 1, 1, 1]),
        ([1, 2, 3], 2, [3, 3, 2, 2, 1]),
        ([3], 1, [3, 3, 3, 3, 3]),
        ([], 1, [3, 3, 3, 3, 3]),  # the head alone: there is nothing to thaw
        (range(LAYERS), 1, [3, 2, 1, 0, 0]),
    ],
)
def test_one_layer_more_is_trained_from_the_top_down(trained, every, lowest):
    frozen = FrozenLayers.of(freeze(deep("gpt2"), trained, head=True))
    training = RecipeConfig(output_dir="unused", use_cpu=True)
    thaw = GradualUnfreezing(frozen, every, training)
    assert training.ddp_find_unused_parameters  # those that have not thawed
    assert [thaw.lowest(step) for step in range(5)] == lowest


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize(("family", "answers"), [("llama", "words"), ("bert", "classes")])
def test_a_layer_stays_as_it_was_until_it_thaws(family, answers, cached, tmp_path, capsys):
    model = freeze(deep(family, answers), [1, 2, 3], head=True)
    layers, seen = {}, []

    def state() -> dict[int, torch.Tensor]:
        return {
            number: torch.cat([weight.detach().flatten() for weight in layer.parameters()])
            for number, layer in enumerate(layers["all"])
        }

    def watch(frozen, training):
        layers["all"] = [*frozen.layers]

        class Watch(TrainerCallback):
            def on_train_begin(self, *_, **__):
                self.before = state()

            def on_step_end(self, *_, **__):
                after = state()
                seen.append([n for n in after if not torch.equal(after[n], self.before[n])])
                self.before = after

        return [GradualUnfreezing(frozen, 1, training), Watch()]

    train_above(tmp_path, model, answers, cached=cached, callbacks=watch, optim="adamw_torch",
                weight_decay=0.1, learning_rate=1e-3)  # fmt: skip
    assert seen == [[3], [2, 3], [1, 2, 3], [1, 2, 3]]
    line = capsys.readouterr().out
    assert "step 1: layer 2 is trained, too" in line
    assert "step 2: layer 1 is trained, too" in line
    assert "layer 0 is trained" not in line
    assert not any(layer._forward_pre_hooks for layer in layers["all"])


def test_what_is_trained_below_the_layers_is_trained_once_all_have_thawed(tmp_path):
    model = freeze(deep("bert", "classes"), range(LAYERS), head=True)
    embeddings = model.get_input_embeddings().weight.requires_grad_(True)
    seen = [embeddings.detach().clone()]

    class Watch(TrainerCallback):
        def on_step_end(self, *_, **__):
            seen.append(embeddings.detach().clone())

    def watch(frozen, training):
        return [GradualUnfreezing(frozen, 1, training), Watch()]

    train_above(tmp_path, model, "classes", cached=False, callbacks=watch, learning_rate=1e-3)
    moved = [not torch.equal(after, before) for before, after in pairwise(seen)]
    assert moved[: LAYERS - 1] == [False] * (LAYERS - 1)
    assert moved[LAYERS - 1 :] == [True] * (len(moved) - LAYERS + 1)
    assert len(moved) >= LAYERS
