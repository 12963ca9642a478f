"""The kept states are those that the model computes for each text by itself, and found again by all
that they depend on.
"""

import math
import tempfile
from functools import cache
from pathlib import Path

import pytest
import torch
from deep_models import CAUSAL, LAYERS, deep, examples_of, freeze
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from recipelib.activations import (
    STATES,
    FrozenLayers,
    StateCache,
    WithStates,
    state_cache,
)
from recipelib.adapters import adapt_layers
from recipelib.runtime import UserError

LENGTHS = [3, 9, 1, 12, 5, 5, 7, 2]
WIDTH = 32
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def freeze_below(number: int, family: str = "llama", model=None, **fields):
    """A model whose layers from this number on are trained, and the others."""
    model = freeze(model or deep(family, **fields), range(number, LAYERS))
    return model, FrozenLayers.of(model)


@cache
def kept_model():
    return freeze_below(2)


def filled(folder: Path, examples, dtype=torch.float32) -> StateCache:
    model, frozen = kept_model()
    kept = StateCache(frozen, examples, folder, dtype)
    kept.fill(model)
    return kept


@cache
def untouched(family: str):
    return deep(family).eval()


def naive_states(family: str, examples, number: int) -> list[torch.Tensor]:
    """Of each example: its sequences run one by one, what they give laid end to end."""
    found = []
    for example in examples:
        lengths = example.get("lengths") or [example["length"]]
        sequences = torch.tensor(example["input_ids"]).split(lengths)
        with torch.no_grad():
            runs = [untouched(family)(ids[None], output_hidden_states=True) for ids in sequences]
        found.append(torch.cat([run.hidden_states[number][0] for run in runs]))
    return found


def assert_holds(kept: StateCache, family: str, examples, number: int) -> None:
    for place, wanted in enumerate(naive_states(family, examples, number)):
        assert wanted.std() > 0.1
        torch.testing.assert_close(kept[place], wanted, **CLOSE)


# What is kept -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [*CAUSAL, "bert", "roberta"])
@pytest.mark.parametrize("number", [1, 3])
def test_the_states_are_those_of_each_text_by_itself(family, number, tmp_path):
    examples = examples_of(LENGTHS)
    model, frozen = freeze_below(number, family)
    kept = StateCache(frozen, examples, tmp_path, torch.float32)
    kept.fill(model.train(), batch_tokens=30)
    assert_holds(kept, family, examples, number)


def test_below_adapters_the_states_are_those_of_the_base(tmp_path):
    examples = examples_of(LENGTHS)
    model = adapt_layers(deep("llama"), "lora", [2, 3])
    kept = StateCache(FrozenLayers.of(model), examples, tmp_path, torch.float32)
    kept.fill(model)
    assert_holds(kept, "llama", examples, 2)


@given(
    st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=3), min_size=1, max_size=9),
    st.integers(1, 40),
    st.integers(1, 30),
    st.booleans(),
)
def test_wherever_shards_end_and_batches_too_each_example_has_its_own_states(
    lengths, most, budget, one_sequence
):
    examples = examples_of([sum(some) for some in lengths] if one_sequence else lengths)
    model, frozen = kept_model()
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(state_cache, "_SHARD_BYTES", most * WIDTH * 4)
        patch.setattr(state_cache, "_LEAST_SHARDS", 1)
        kept = StateCache(frozen, examples, Path(folder), torch.float32)
        kept.fill(model, batch_tokens=budget)
        assert kept.tokens == sum(examples["length"])
        assert len([*kept.folder.iterdir()]) == len(kept.shards)
        assert len(kept.shards) <= math.ceil(kept.tokens / most)
        assert_holds(kept, "llama", examples, 2)


def test_a_shard_has_the_bytes_that_are_asked_for_and_one_example_more_at_most(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(state_cache, "_SHARD_BYTES", 10 * WIDTH * 4)
    kept = filled(tmp_path, examples_of([4] * 100))
    sizes = [
        safe_open(file, framework="pt").get_tensor(STATES).shape[0]
        for file in sorted(kept.folder.iterdir())
    ]
    assert sum(sizes) == 400
    assert max(sizes) <= 10 + 4
    assert len(sizes) == 40


def test_even_few_tokens_are_shared_out_over_many_shards(tmp_path):
    assert (
        len(StateCache(kept_model()[1], examples_of([2] * 64), tmp_path, torch.float32).shards)
        == 16
    )


# In what precision ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_the_bytes_hold_the_same_states_rounded_and_the_error_is_said(dtype, tmp_path):
    examples = examples_of(LENGTHS)
    exact, half = filled(tmp_path, examples), filled(tmp_path, examples, dtype)
    assert half.bytes_per_token == exact.bytes_per_token // 2 == 2 * WIDTH
    states, rounded = (torch.cat([one[n] for n in range(8)]) for one in (exact, half))
    assert rounded.dtype == dtype
    assert torch.equal(states.to(dtype), rounded)
    lost = (rounded.float() - states).norm() / states.norm()
    assert 1e-5 < lost < 1e-2
    assert half.relative_error == pytest.approx(lost.item(), rel=1e-3)
    assert exact.relative_error == 0
    again = filled(tmp_path, examples, dtype)  # read from the shards
    assert again.relative_error == half.relative_error


def test_states_that_float16_cannot_hold_are_one_line_and_no_shard(tmp_path):
    model, frozen = freeze_below(2)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight *= 1e6
    kept = StateCache(frozen, examples_of(LENGTHS), tmp_path, torch.float16)
    line = r"^--cache_dtype float16: the largest state is \S+, which does not fit; pass bfloat16 or"
    with pytest.raises(UserError, match=line) as told:
        kept.fill(model)
    assert "\n" not in str(told.value)
    assert float(str(told.value).split("state is ")[1].split(",")[0]) > 65504
    assert [*kept.folder.iterdir()] == []


# Under what key ---------------------------------------------------------------------------------


def key_of(
    model=None, number=2, examples=None, dtype=torch.float32, computed="no", root=Path("/nowhere")
) -> str:
    model = freeze(model or deep("llama"), range(number, LAYERS))
    examples = examples or examples_of([[5, 4], [3, 2]])
    return StateCache(FrozenLayers.of(model), examples, root, dtype, computed).key


def changed(part: str, model=None):
    """A model with one number of a parameter changed, by as little as float32 can tell."""
    model = model or deep("llama")
    with torch.no_grad():
        weight = model.get_parameter(part).flatten()
        weight[-1] = torch.nextafter(weight[-1], torch.tensor(9e9))
    return model


def with_config(**fields):
    model = deep("llama")
    for name, value in fields.items():
        setattr(model.config, name, value)
    return model


def eager():
    model = deep("llama")
    model.set_attn_implementation("eager")
    return model


def turned():
    """With other rotations, which are no parameter."""
    model = deep("llama")
    model.model.rotary_emb.inv_freq += 1e-3
    return model


OTHER_TOKEN = examples_of([[5, 4], [3, 2]]).map(
    lambda row, n: {"input_ids": [row["input_ids"][0] + (n == 1), *row["input_ids"][1:]]},
    with_indices=True,
)


@pytest.mark.parametrize(
    "other",
    [
        {"model": lambda: changed("model.layers.1.mlp.up_proj.weight")},
        {"model": lambda: changed("model.layers.0.input_layernorm.weight")},
        {"model": lambda: changed("model.embed_tokens.weight")},
        {"model": turned},
        {"model": eager},
        {"model": lambda: with_config(rms_norm_eps=1e-4)},
        {"model": lambda: with_config(rope_parameters={"rope_theta": 5e5, "rope_type": "default"})},
        {"model": lambda: deep("mistral")},
        {"number": 1},
        {"number": 3},
        {"examples": lambda: OTHER_TOKEN},
        {"examples": lambda: examples_of([[5, 4], [3, 2]], seed=1)},
        {"examples": lambda: examples_of([[5, 4], [2, 3]])},  # ends of sequences
        {"examples": lambda: examples_of([[5, 4, 3], [2]])},  # ends of examples
        {"examples": lambda: examples_of([9, 5])},
        {"dtype": torch.bfloat16},
        {"computed": "bf16"},
    ],
)
def test_whatever_the_states_depend_on_is_in_the_key(other):
    made = {name: value() if callable(value) else value for name, value in other.items()}
    assert key_of(**made) != key_of()


@pytest.mark.parametrize(
    "model",
    [
        lambda: changed("model.layers.2.mlp.up_proj.weight"),
        lambda: changed("model.layers.3.self_attn.q_proj.weight"),
        lambda: changed("model.norm.weight"),
        lambda: deep("llama").train(),
        lambda: with_config(_name_or_path="another/name", id2label={0: "no", 1: "yes"}),
    ],
)
def test_what_they_do_not_depend_on_is_not(model, tmp_path):
    assert key_of(model(), root=tmp_path) == key_of()


def test_nor_is_a_frozen_weight_above_what_is_trained():
    def key(model) -> str:
        frozen = FrozenLayers.of(freeze(model, names=["layers.2.mlp"]))
        return StateCache(frozen, examples_of(LENGTHS), Path("/nowhere"), torch.float32).key

    assert key(changed("model.layers.3.mlp.up_proj.weight")) == key(deep("llama"))


def test_a_model_that_is_loaded_from_wherever_it_lies_finds_its_states(tmp_path):
    deep("llama").save_pretrained(tmp_path / "here")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "here")
    first = key_of(loaded)
    (tmp_path / "here").rename(tmp_path / "there")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "there")
    assert first == key_of(again)


def test_what_has_been_trained_finds_the_states_from_before(tmp_path):
    examples = examples_of(LENGTHS)
    model, frozen = freeze_below(2)
    before = StateCache(frozen, examples, tmp_path, torch.float32)
    with torch.no_grad():
        for weight in model.parameters():
            weight += weight.requires_grad
    after = StateCache(FrozenLayers.of(model), examples, tmp_path, torch.float32)
    assert before.key == after.key


# In a batch -------------------------------------------------------------------------------------


def naive_batch(kept: StateCache, places: list[int], width: int) -> torch.Tensor:
    rows = [kept[place] for place in places]
    return torch.stack([torch.cat([row, torch.zeros(width - len(row), WIDTH)]) for row in rows])


def pad(examples) -> dict[str, torch.Tensor]:
    rows = [torch.tensor(example["input_ids"]) for example in examples]
    return {"input_ids": torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)}


def test_a_batch_has_its_states_beside_its_tokens_with_zeros_for_padding(tmp_path):
    examples = examples_of(LENGTHS)
    kept = filled(tmp_path, examples)
    rows = [{**examples[place], "place": place} for place in (3, 0, 6)]
    batch = WithStates(pad, kept)(rows)
    assert torch.equal(batch["input_ids"], pad(rows)["input_ids"])
    assert batch[STATES].shape == (3, 12, WIDTH)
    assert torch.equal(batch[STATES], naive_batch(kept, [3, 0, 6], 12))


def test_the_rows_of_a_line_lie_end_to_end(tmp_path):
    examples = examples_of(LENGTHS)
    kept = filled(tmp_path, examples)

    def line(examples):
        return {"input_ids": torch.tensor([[t for one in examples for t in one["input_ids"]]])}

    rows = [{**examples[place], "place": place} for place in (3, 0, 6)]
    states = WithStates(line, kept)(rows)[STATES]
    assert torch.equal(states[0], torch.cat([kept[3], kept[0], kept[6]]))


def test_each_sequence_of_an_example_is_a_row(tmp_path):
    examples = examples_of([[3, 5], [4], [2, 6, 1]])
    kept = filled(tmp_path, examples)

    def apart(examples):
        rows = [r for e in examples for r in torch.tensor(e["input_ids"]).split(e["lengths"])]
        return {"input_ids": torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)}

    rows = [{**examples[place], "place": place} for place in (2, 0)]
    states = WithStates(apart, kept)(rows)[STATES]
    assert states.shape == (5, 6, WIDTH)
    pieces = [*kept[2].split([2, 6, 1]), *kept[0].split([3, 5])]
    for row, piece in zip(states, pieces, strict=True):
        assert torch.equal(row[: len(piece)], piece)
        assert not row[len(piece) :].any()


def test_held_out_rows_have_no_states(tmp_path):
    examples = examples_of([3, 4])
    assert WithStates(pad, filled(tmp_path, examples))([*examples]).keys() == {"input_ids"}
