"""Rows in a batch of their own write what they write in one line of tokens."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import MODELS, TOKENIZER, tiny_llama
from transformers.cache_utils import DynamicLayer

from recipelib.inference import generation
from recipelib.inference.generation import LineOfRows, generate
from recipelib.inference.lockstep import Lockstep
from recipelib.inference.row_cache import RoomyLayer, RowCache
from recipelib.inference.shared_cache import can_share

SHARED = [9, 40, 12, 33] * 6
PROMPTS = [[5] * 3, [7, 300, 12, 9], [50], list(range(40, 60)), [300, 7], [9, 200, 31], [50]]


def write(model, prompts, **options):
    """Long answers, of which each token is an end as likely as another."""
    options = {"max_new_tokens": 150, "samples": 3, "temperature": 1.5, "seed": 4, **options}
    can_share(Lockstep(model))
    return generate(model, TOKENIZER, prompts, end_ids=range(20, 26), **options)


@pytest.mark.parametrize(
    ("name", "prompts"),
    [
        ("llama", PROMPTS),
        ("gpt2", [SHARED + prompt for prompt in PROMPTS]),
        ("qwen3", [SHARED + prompt for prompt in PROMPTS]),
        ("llama", [SHARED]),
    ],
    ids=["apart", "gpt2, shared", "qwen3, shared", "single"],
)
def test_long_answers_of_which_many_end_early_equal_those_of_one_line(name, prompts, monkeypatch):
    model = MODELS[name]
    options = {"max_new_tokens": 40} if name == "gpt2" else {}  # its positions end early
    rows, kept = [], RowCache.select

    def select(self, some):
        rows.append(len(some))
        return kept(self, some)

    monkeypatch.setattr(RowCache, "select", select)
    found = write(model, prompts, **options)
    assert len(rows) > (0 if len(prompts) == 1 else 5)  # so often some had ended
    monkeypatch.setattr(generation, "RowCache", LineOfRows)
    for some, others in zip(found, write(model, prompts, **options), strict=True):
        assert [one.text for one in some] == [one.text for one in others]
        likelihoods = [one.log_likelihood for one in others]
        assert [one.log_likelihood for one in some] == pytest.approx(likelihoods, abs=1e-2)


def test_models_with_attention_of_their_own_write_in_one_line(monkeypatch):
    def unwanted(*_):
        raise AssertionError("a batch of rows")

    greedy = {"samples": 1, "temperature": 0}
    expected = write(MODELS["llama"], PROMPTS, **greedy)
    model = tiny_llama(len(TOKENIZER))
    model.load_state_dict(MODELS["llama"].state_dict())
    model.set_attn_implementation("eager")
    monkeypatch.setattr(generation, "RowCache", unwanted)
    found = write(model, PROMPTS, **greedy)
    assert [[one.text for one in some] for some in found] == [
        [one.text for one in some] for some in expected
    ]
    with pytest.raises(AssertionError, match="a batch of rows"):
        write(MODELS["llama"], PROMPTS)


def some_tokens(rows: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(rows, 2, count, 3), torch.randn(rows, 2, count, 5)


@given(st.integers(1, 5), st.lists(st.tuples(st.integers(1, 90), st.booleans()), max_size=6))
def test_a_layer_with_room_holds_what_transformers_own_does(rows, steps):
    roomy, plain = RoomyLayer(), DynamicLayer()
    for layer in (roomy, plain):
        torch.manual_seed(0)
        layer.update(*some_tokens(rows, 1))
    for count, drops in steps:
        if drops and rows > 1:  # the first one; the last one takes its place
            rows -= 1
            roomy.move([rows], [0], rows)
            plain.batch_select_indices(torch.tensor([rows, *range(1, rows)]))
        more = some_tokens(rows, count)
        for mine, theirs in zip(roomy.update(*more), plain.update(*more), strict=True):
            assert torch.equal(mine, theirs)
        assert roomy.get_seq_length() == plain.get_seq_length()
