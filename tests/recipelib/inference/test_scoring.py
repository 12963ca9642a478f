"""Likelihoods and written answers equal what a plain loop over single prompts gives."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tiny_llama import tiny_llama
from tiny_models import MODELS, VOCABULARY, with_opinions

from recipelib.inference.journal import Journal
from recipelib.inference.lockstep import Lockstep
from recipelib.inference.scoring import log_likelihoods
from recipelib.inference.shared_cache import _PART, can_share
from recipelib.runtime.errors import UserError


@torch.no_grad()
def one_at_a_time(model, prompt, continuation) -> float:
    logits = model(torch.tensor([[*prompt, *continuation]])).logits[0].float()
    where = range(len(prompt) - 1, len(prompt) + len(continuation) - 1)
    return logits.log_softmax(-1)[where, continuation].sum().item()


class Passes:
    """Records the shape of the ids in each forward pass, and how many columns became logits."""

    def __init__(self, model):
        can_share(Lockstep(model))  # what tells that computes, once
        self.shapes, self.columns = [], []
        self.hook = model.register_forward_hook(self.record, with_kwargs=True)

    def record(self, module, args, kwargs, output):
        self.shapes.append(tuple(kwargs["input_ids"].shape))
        self.columns.append(output.logits.shape[1])

    @property
    def tokens(self) -> int:
        return sum(rows * columns for rows, columns in self.shapes)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.hook.remove()


# Likelihoods -------------------------------------------------------------------------------------

ids = st.integers(0, VOCABULARY - 1)


@st.composite
def drawn_requests(draw):
    """Prompts with continuations of one to five tokens, some of which begin others or are equal."""
    requests = []
    for _ in range(draw(st.integers(1, 4))):
        prompt = draw(st.lists(ids, min_size=1, max_size=12))
        whole = draw(st.lists(ids, min_size=1, max_size=5))
        cuts = draw(st.lists(st.integers(1, len(whole)), max_size=3))
        others = draw(st.lists(st.lists(ids, min_size=1, max_size=5), max_size=2))
        continuations = [whole, *(whole[:cut] for cut in cuts), *others]
        requests.append((prompt, draw(st.permutations(continuations))))
    return requests


@pytest.mark.parametrize("name", MODELS)
@given(
    requests=drawn_requests(),
    batch_tokens=st.sampled_from([1, 20, 60, 10**6]),
    common=st.sampled_from([0, 1, 30]),
)
@settings(max_examples=12)
def test_likelihoods_equal_a_loop_over_whole_texts_in_the_order_of_the_requests(
    name, requests, batch_tokens, common
):
    model = MODELS[name]
    requests = [([7, 3] * common + prompt, continuations) for prompt, continuations in requests]
    found = log_likelihoods(model, requests, batch_tokens=batch_tokens)
    assert len(found) == len(requests)
    for (prompt, continuations), values in zip(requests, found, strict=True):
        expected = [one_at_a_time(model, prompt, one) for one in continuations]
        assert values == pytest.approx(expected, abs=1e-4, rel=0)


def test_models_that_can_share_are_told_from_those_that_cannot():
    shares = {name: can_share(Lockstep(model)) for name, model in MODELS.items()}
    assert shares == {
        "llama": True,  # grouped-query attention, tied head
        "llama, eager": True,
        "llama, untied": True,
        "gpt2": True,  # learned positions
        "qwen3": True,
        "mistral": False,  # sliding window
        "gemma3": False,  # sliding windows and full attention by turns
        "bloom": False,  # positions are read off the mask
        "rwkv": False,
    }


def test_a_long_beginning_is_computed_once():
    model = MODELS["llama"]
    beginning = [5, 9] * 100
    requests = [(beginning + [number] * 20, [[1], [2, 3]]) for number in range(10, 30)]
    with Passes(model) as passes:
        log_likelihoods(model, requests, batch_tokens=120)
    assert passes.tokens == 200 + 20 * 21
    assert max(columns for _, columns in passes.shapes) <= 120


def test_no_pass_is_over_the_budget_and_a_row_over_it_is_computed_in_parts():
    model = MODELS["llama"]
    lengths = (3, 40, 7, 19, 8, 2, 20)
    requests = [([100 + length] * length, [[1, 2]]) for length in lengths]
    alone = [log_likelihoods(model, [one])[0] for one in requests]
    with Passes(model) as passes:
        found = log_likelihoods(model, requests, batch_tokens=40)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(alone), atol=1e-4, rtol=0)
    assert max(columns for _, columns in passes.shapes) <= 40
    # Nothing is padded: each token, and of the answers the first, once.
    assert passes.tokens == sum(lengths) + len(lengths)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_passes_that_are_longer_than_a_part_of_the_attention_score_the_same(name):
    model = MODELS[name]
    requests = [([5, 9] * 20 + [number, 7, number + 3], [[1], [2, 3]]) for number in range(60, 160)]
    with Passes(model) as passes:
        found = log_likelihoods(model, requests)
    assert max(columns for _, columns in passes.shapes) > 2 * _PART
    for (prompt, continuations), values in zip(requests, found, strict=True):
        expected = [one_at_a_time(model, prompt, one) for one in continuations]
        assert values == pytest.approx(expected, abs=1e-4, rel=0)


def test_candidates_share_their_query_and_what_they_have_in_common():
    model = MODELS["llama"]
    with Passes(model) as passes:
        log_likelihoods(model, [([5, 6, 7], [[one] for one in range(100)])])
        log_likelihoods(model, [([5, 6, 7], [[1, 2], [1, 3, 4], [1, 3, 5], [1], [4]])])
    # Three tokens for a hundred words; then two more, since a last token is never computed.
    assert [shape[1] for shape in passes.shapes] == [3, 5]


def test_only_places_that_predict_an_answer_are_projected_on_the_vocabulary():
    model = MODELS["llama"]
    with Passes(model) as passes:
        log_likelihoods(model, [([5] * 30, [[1]]), ([6] * 30, [[1, 2, 3]])])
    assert passes.columns == [4]


def test_whole_prompts_go_in_padded_batches_longest_first_within_the_budget():
    model = MODELS["mistral"]
    requests = [([5] * length, [[1, 2]]) for length in (3, 40, 7, 19, 7, 2, 19)]
    with Passes(model) as passes:
        log_likelihoods(model, requests, batch_tokens=40)
    assert passes.shapes == [(1, 41), (2, 20), (4, 8)]


def test_whole_prompts_share_a_row_where_continuations_differ_in_their_last_token():
    model = MODELS["mistral"]
    with Passes(model) as passes:
        log_likelihoods(model, [([5, 6, 7], [[one] for one in range(100)])])
        log_likelihoods(model, [([5, 6, 7], [[1, 2], [1, 3], [1], [4]])])
        log_likelihoods(model, [([5] * 30, [[1]]), ([6] * 30, [[1, 2, 3]])])
    # Three tokens for a hundred words; then "5 6 7" serves [1] and [4], "5 6 7 1" the other two.
    assert passes.shapes == [(1, 3), (2, 4), (2, 32)]
    # Of the 32 columns only those from which an answer is predicted.
    assert passes.columns[-1] == 3


def test_a_model_that_projects_every_column_scores_the_same():
    model = MODELS["llama"]

    def forward(*, logits_to_keep, **inputs):
        return model(**inputs)

    deaf = type("Deaf", (), {"__call__": lambda self, **inputs: forward(**inputs)})()
    deaf.parameters = model.parameters
    requests = [([5, 6, 7, 8], [[1], [2, 3]]), ([9, 9], [[4, 5, 6]])]
    found = log_likelihoods(deaf, requests)
    for one, other in zip(found, log_likelihoods(model, requests), strict=True):
        assert one == pytest.approx(other, abs=1e-4)


def test_a_soft_prompt_in_front_moves_no_column():
    model = tiny_llama(VOCABULARY)
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    torch.manual_seed(0)
    prompted = with_opinions(get_peft_model(model, config))
    requests = [([5, 6, 7, 8], [[1], [2, 3]]), ([9, 9], [[4, 5, 6]])]
    for (prompt, continuations), values in zip(
        requests, log_likelihoods(prompted, requests), strict=True
    ):
        for continuation, value in zip(continuations, values, strict=True):
            with torch.no_grad():
                ids = torch.tensor([[*prompt, *continuation]])
                logits = prompted(input_ids=ids).logits[0, 5:].log_softmax(-1)
            where = range(len(prompt) - 1, ids.shape[1] - 1)
            assert value == pytest.approx(logits[where, continuation].sum().item(), abs=1e-4)


def test_an_adapter_is_part_of_what_is_scored():
    model = with_opinions(
        get_peft_model(tiny_llama(VOCABULARY), LoraConfig(target_modules="all-linear"))
    )
    requests = [([5, 6, 7, 8], [[1], [2, 3]]), ([9, 9], [[4, 5, 6]])]
    assert can_share(Lockstep(model))
    found = log_likelihoods(model, requests)
    expected = [[one_at_a_time(model, prompt, one) for one in some] for prompt, some in requests]
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, abs=1e-4)


def test_nothing_asked_is_nothing_computed():
    with Passes(MODELS["llama"]) as passes:
        assert log_likelihoods(MODELS["llama"], []) == []
    assert passes.shapes == []


# Memory, and interruptions -----------------------------------------------------------------------


def room_for(model, tokens: int, monkeypatch):
    """Lets a pass over more tokens run out of memory in the middle of the model."""
    layer = model.model.layers[1]
    forward = layer.forward

    def limited(hidden_states, *args, **kwargs):
        if hidden_states.shape[0] * hidden_states.shape[1] > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(hidden_states, *args, **kwargs)

    monkeypatch.setattr(layer, "forward", limited)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_where_memory_runs_out_passes_shrink_and_no_row_is_lost(name, monkeypatch):
    model = MODELS[name]
    requests = [([5, 9] * 40 + [number] * 9, [[1], [2, 3]]) for number in range(10, 40)]
    expected = log_likelihoods(model, requests)
    room_for(model, 95 if name == "mistral" else 30, monkeypatch)
    found = log_likelihoods(model, requests, batch_tokens=300)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), atol=1e-4, rtol=0)


def test_where_there_is_little_memory_a_long_row_is_computed_in_parts(monkeypatch):
    model = MODELS["llama"]
    requests = [(list(range(40, 80)), [[1, 2]])]
    expected = log_likelihoods(model, requests)
    room_for(model, 9, monkeypatch)
    assert log_likelihoods(model, requests)[0] == pytest.approx(expected[0], abs=1e-4)


@pytest.mark.parametrize(("name", "room"), [("llama", 1), ("mistral", 4)])
def test_a_row_that_cannot_fit_is_a_line_that_says_what_helps(name, room, monkeypatch):
    model = MODELS[name]
    can_share(Lockstep(model))
    room_for(model, room, monkeypatch)
    with pytest.raises(UserError, match="out of memory with a single row of 9 tokens; lower"):
        log_likelihoods(model, [([5, 9, 8, 7, 1, 2, 3, 4], [[1, 2]])])


def test_other_errors_of_a_model_are_not_taken_for_a_lack_of_memory(monkeypatch):
    model = MODELS["llama"]
    log_likelihoods(model, [([5], [[1]])])
    monkeypatch.setattr(model.model.layers[0], "forward", lambda *a, **k: torch.zeros(1) @ a)
    with pytest.raises(TypeError):
        log_likelihoods(model, [([5], [[1]])])


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_an_interrupted_run_goes_on_and_finds_exactly_what_one_run_finds(name, tmp_path):
    model = MODELS[name]
    requests = [([5, 9] * 10 + [number] * 9, [[1], [2, 3]]) for number in range(10, 40)]
    whole = log_likelihoods(model, requests, batch_tokens=60)
    calls = []

    def interrupted(*_):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt

    hook = model.register_forward_hook(interrupted)
    with pytest.raises(KeyboardInterrupt):
        log_likelihoods(model, requests, batch_tokens=60, journal=Journal(tmp_path, {}))
    hook.remove()
    assert 0 < len(Journal(tmp_path, {})) < 40
    with Passes(model) as passes:
        found = log_likelihoods(model, requests, batch_tokens=60, journal=Journal(tmp_path, {}))
    assert found == whole
    with Passes(model) as all_passes:
        log_likelihoods(model, requests, batch_tokens=60)
    assert 0 < len(passes.shapes) < len(all_passes.shapes)
    with Passes(model) as passes:
        assert log_likelihoods(model, requests, journal=Journal(tmp_path, {})) == whole
    assert passes.shapes == []
