"""Features are the pooled states of a text at a layer, computed once."""

import copy
import errno

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from tiny_bert import tiny_bert
from tiny_models import MODELS, VOCABULARY

from recipelib.activations import FrozenLayers, kept_features, pooled_states
from recipelib.activations import features as module
from recipelib.runtime import UserError

MODELS = {name: MODELS[name] for name in ("llama", "gpt2", "gemma3", "bloom")}
KINDS = [*MODELS, "bert"]
PAD = 0
POOLED = {
    "mean": lambda states: states.mean(0),
    "last": lambda states: states[-1],
    "cls": lambda states: states[0],
    "max": lambda states: states.amax(0),
}


@pytest.fixture(scope="module")
def texts():
    """Of different lengths, the shortest a single token; none has the pad's id."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randint(1, VOCABULARY, (length,), generator=generator).tolist()
        for length in (7, 3, 12, 1, 5)
    ]


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    bert = request.param == "bert"
    # A copy: others train these models.
    model = tiny_bert(VOCABULARY) if bert else copy.deepcopy(MODELS[request.param])
    return model.requires_grad_(False).eval()


@pytest.fixture(scope="module")
def frozen(model):
    return FrozenLayers.of(model)


@pytest.fixture(scope="module")
def naive(model, frozen, texts):
    """[layers, rows] of [tokens, width]: each text by itself, hooked, without padding."""
    found = []
    for text in texts:
        states = []
        hooks = [
            layer.register_forward_hook(
                lambda _, args, output, states=states: states.append(
                    output[0][0] if isinstance(output, tuple) else output[0]
                )
            )
            for layer in frozen.layers
        ]
        hooks.append(
            frozen.layers[0].register_forward_pre_hook(
                lambda _, args, kwargs, states=states: states.append(
                    (args[0] if args else kwargs["hidden_states"])[0]
                ),
                with_kwargs=True,
            )
        )
        with torch.no_grad():
            model(input_ids=torch.tensor([text]))
        for hook in hooks:
            hook.remove()
        found.append(states)
    return [[states[layer] for states in found] for layer in range(len(frozen.layers) + 1)]


@pytest.mark.parametrize("pooling", POOLED)
def test_all_layers_are_those_of_each_text_by_itself(model, frozen, texts, naive, pooling):
    found = pooled_states(model, frozen.layers, texts, PAD, pooling=pooling, batch_tokens=24)
    assert found.dtype == np.float32
    wanted = [[POOLED[pooling](states).numpy() for states in layer] for layer in naive]
    np.testing.assert_allclose(found, np.array(wanted), rtol=1e-4, atol=1e-5)


def test_a_single_layer_is_the_one_of_all_and_runs_no_further(model, frozen, texts):
    every = pooled_states(model, frozen.layers, texts, PAD)
    depth = len(frozen.layers)
    for layer in range(depth + 1):
        ran = []
        hooks = [
            one.register_forward_hook(lambda *_, number=number, ran=ran: ran.append(number))
            for number, one in enumerate(frozen.layers)
        ]
        one = pooled_states(model, frozen.layers, texts, PAD, layer=layer)
        for hook in hooks:
            hook.remove()
        np.testing.assert_allclose(one[0], every[layer], rtol=1e-5, atol=1e-6)
        assert one.shape[0] == 1
        assert max(ran) == max(0, layer - 1)


@pytest.fixture
def passes(monkeypatch):
    """How many times the model has been asked for features."""
    asked, real = [], pooled_states

    def count(*args, **options):
        asked.append(options["layer"])
        return real(*args, **options)

    monkeypatch.setattr(module, "pooled_states", count)
    return asked


@pytest.fixture
def small():
    model = tiny_bert(VOCABULARY).requires_grad_(False)
    return model, FrozenLayers.of(model)


def test_features_are_computed_once_and_anew_where_anything_changes(small, texts, passes, tmp_path):
    model, frozen = small

    def ask(texts=texts, layer=1, pooling="mean", model=model, frozen=frozen, root=tmp_path):
        return kept_features(model, frozen, texts, PAD, root, layer=layer, pooling=pooling)

    first = ask()
    assert np.array_equal(ask(), first)
    assert len(passes) == 1
    ask(texts=texts[1:])
    # The same tokens, cut elsewhere.
    ask(texts=[texts[0][:4], texts[0][4:] + texts[1], *texts[2:]])
    ask(layer=2)
    ask(layer=None)
    ask(pooling="last")
    other = tiny_bert(VOCABULARY).requires_grad_(False)
    other.get_input_embeddings().weight[texts[0][0], 0] += 1
    changed = ask(model=other, frozen=FrozenLayers.of(other))
    assert len(passes) == 7
    assert not np.array_equal(changed, first)
    ask(root=None)
    ask(root=None)
    assert len(passes) == 9


def test_damaged_features_are_computed_again(small, texts, passes, tmp_path):
    model, frozen = small
    options = {"layer": 1, "pooling": "mean"}
    first = kept_features(model, frozen, texts, PAD, tmp_path, **options)
    (file,) = tmp_path.glob("features-*")
    with safe_open(file, framework="np") as read:
        checksum = read.metadata()
    whole = file.read_bytes()
    changed = first.copy()
    changed[0, 0, 0] += 1
    for damage in (
        lambda: file.write_bytes(whole[:-8]),
        lambda: file.write_bytes(b""),
        lambda: save_file({"features": changed}, file, checksum),
        lambda: save_file({"others": first}, file, checksum),
        lambda: save_file({"features": first}, file),
    ):
        damage()
        passes.clear()
        found = kept_features(model, frozen, texts, PAD, tmp_path, **options)
        assert np.array_equal(found, first)
        assert passes == [1]


def test_a_disk_that_fills_up_is_one_line_and_leaves_nothing(small, texts, tmp_path, monkeypatch):
    def no_space(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "save_file", no_space)
    with pytest.raises(UserError, match=f"^{tmp_path}: No space left on device; point --cache_dir"):
        kept_features(*small, texts, PAD, tmp_path, layer=1, pooling="mean")
    assert not [*tmp_path.iterdir()]
