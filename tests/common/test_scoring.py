"""Likelihoods and written answers equal what a plain loop over single prompts gives."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_llama import tiny_llama
from tokenizers_for_tests import tokenizer_for
from transformers import GPT2Config, GPT2LMHeadModel

from common.scoring import generate, log_likelihoods

TOKENIZER = tokenizer_for("gpt2")
VOCABULARY = len(TOKENIZER)


def tiny_gpt2(vocabulary: int) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=vocabulary, n_positions=128, n_embd=32, n_layer=2, n_head=4)
    return GPT2LMHeadModel(config)


def with_opinions(model):
    """Weights so large that each token before a position shows in its prediction."""
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight *= 8
    model.generation_config.eos_token_id = None
    return model.eval()


MODELS = {
    "llama": with_opinions(tiny_llama(VOCABULARY)),
    "gpt2": with_opinions(tiny_gpt2(VOCABULARY)),
}


@torch.no_grad()
def one_at_a_time(model, prompt, continuation) -> float:
    logits = model(torch.tensor([[*prompt, *continuation]])).logits[0].float()
    where = range(len(prompt) - 1, len(prompt) + len(continuation) - 1)
    return logits.log_softmax(-1)[where, continuation].sum().item()


class Passes:
    """Records the shape of the ids in each forward pass, and how many columns became logits."""

    def __init__(self, model):
        self.shapes, self.columns = [], []
        self.hook = model.register_forward_hook(self.record, with_kwargs=True)

    def record(self, module, args, kwargs, output):
        self.shapes.append(tuple(kwargs["input_ids"].shape))
        self.columns.append(output.logits.shape[1])

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
@given(requests=drawn_requests(), batch_tokens=st.sampled_from([1, 20, 60, 10**6]))
@settings(max_examples=25)
def test_likelihoods_equal_a_loop_over_whole_texts_in_the_order_of_the_requests(
    name, requests, batch_tokens
):
    model = MODELS[name]
    found = log_likelihoods(model, requests, batch_tokens=batch_tokens)
    assert len(found) == len(requests)
    for (prompt, continuations), values in zip(requests, found, strict=True):
        expected = [one_at_a_time(model, prompt, one) for one in continuations]
        assert values == pytest.approx(expected, abs=1e-5, rel=0)


def test_no_batch_is_over_the_budget_and_a_row_over_it_runs_alone():
    model = MODELS["llama"]
    requests = [([5] * length, [[1, 2]]) for length in (3, 40, 7, 19, 7, 2, 19)]
    alone = log_likelihoods(model, requests, batch_tokens=1)
    with Passes(model) as passes:
        found = log_likelihoods(model, requests, batch_tokens=40)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(alone), atol=1e-5, rtol=0)
    assert passes.shapes == [(1, 41), (2, 20), (4, 8)]


def test_continuations_that_differ_in_their_last_token_share_one_row():
    model = MODELS["llama"]
    with Passes(model) as passes:
        log_likelihoods(model, [([5, 6, 7], [[one] for one in range(100)])])
        log_likelihoods(model, [([5, 6, 7], [[1, 2], [1, 3], [1], [4]])])
    # Three tokens for a hundred words; then "5 6 7" serves [1] and [4], "5 6 7 1" the other two.
    assert passes.shapes == [(1, 3), (2, 4)]


def test_only_columns_that_predict_an_answer_are_projected_on_the_vocabulary():
    model = MODELS["llama"]
    with Passes(model) as passes:
        log_likelihoods(model, [([5] * 30, [[1]]), ([6] * 30, [[1, 2, 3]])])
    assert passes.columns == [3]


def test_a_model_that_projects_every_column_scores_the_same():
    model = MODELS["llama"]

    def forward(*, logits_to_keep, **inputs):
        return model(**inputs)

    deaf = type("Deaf", (), {"__call__": lambda self, **inputs: forward(**inputs)})()
    deaf.parameters = model.parameters
    requests = [([5, 6, 7, 8], [[1], [2, 3]]), ([9, 9], [[4, 5, 6]])]
    assert log_likelihoods(deaf, requests) == log_likelihoods(model, requests)


def test_nothing_asked_is_nothing_computed():
    with Passes(MODELS["llama"]) as passes:
        assert log_likelihoods(MODELS["llama"], []) == []
        assert generate(MODELS["llama"], TOKENIZER, [], max_new_tokens=3, end_ids=[]) == []
    assert passes.shapes == []


# Generating --------------------------------------------------------------------------------------

PROMPTS = [[5] * 3, [7, 300, 12, 9], [50], list(range(40, 60)), [300, 7], [9, 200, 31]]


def plain_greedy(model, prompt, new_tokens=8) -> list[int]:
    row = list(prompt)
    with torch.no_grad():
        for _ in range(new_tokens):
            row.append(model(torch.tensor([row])).logits[0, -1].argmax().item())
    return row[len(prompt) :]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("batch_tokens", [1, 50, 10**6])
def test_answers_equal_greedy_generation_of_one_prompt_at_a_time(name, batch_tokens):
    model = MODELS[name]
    found = generate(
        model, TOKENIZER, PROMPTS, max_new_tokens=8, end_ids=[], batch_tokens=batch_tokens
    )
    expected = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        written = model.generate(ids, do_sample=False, max_new_tokens=8, pad_token_id=0)
        new = written[0, len(prompt) :].tolist()
        assert new == plain_greedy(model, prompt)
        expected.append(TOKENIZER.decode(new, skip_special_tokens=True))
    assert found == expected
    assert len(set(found)) > 3  # the prompts matter


@pytest.mark.parametrize("where", ["asked", "configured", "configured list"])
def test_an_answer_ends_before_the_first_end_token_wherever_that_is_named(where, monkeypatch):
    model = MODELS["llama"]
    written = [plain_greedy(model, prompt) for prompt in PROMPTS]
    end = written[1][3]
    configured = {"asked": None, "configured": end, "configured list": [end, 1]}[where]
    monkeypatch.setattr(model.generation_config, "eos_token_id", configured)
    found = generate(
        model, TOKENIZER, PROMPTS, max_new_tokens=8, end_ids=[end] if where == "asked" else []
    )
    ends = {end, 1} if where == "configured list" else {end}
    for text, row in zip(found, written, strict=True):
        length = next((place for place, token in enumerate(row) if token in ends), len(row))
        assert text == TOKENIZER.decode(row[:length], skip_special_tokens=True)
    assert len(TOKENIZER(found[1])["input_ids"]) < 8


def test_a_stop_text_ends_its_own_answer_and_no_other():
    model = MODELS["llama"]
    whole = generate(model, TOKENIZER, PROMPTS, max_new_tokens=8, end_ids=[])
    row = plain_greedy(model, PROMPTS[3])
    stop = TOKENIZER.decode(row[2:4])
    assert stop not in TOKENIZER.decode(row[:3])
    found = generate(model, TOKENIZER, PROMPTS, max_new_tokens=8, end_ids=[], stop=[stop])
    assert found[3] == TOKENIZER.decode(row[:4])
    for text, stopped in zip(whole, found, strict=True):
        assert (stopped == text) == (stop not in text)


class Scripted:
    """Writes given ids after each prompt, whatever it says."""

    generation_config = SimpleNamespace(eos_token_id=None)

    def __init__(self, answers: dict[int, list[int]]):
        self.answers = answers

    def parameters(self):
        yield torch.zeros(1)

    def generate(self, input_ids, attention_mask, **options):
        assert options["do_sample"] is False
        rows = [self.answers[row[-1]] for row in input_ids.tolist()]
        return torch.cat([input_ids, torch.tensor(rows)], dim=1)


def test_special_tokens_and_what_follows_the_end_are_no_part_of_an_answer():
    hello, end = TOKENIZER.encode(" a good"), TOKENIZER.convert_tokens_to_ids("<|im_end|>")
    special, pad = TOKENIZER.convert_tokens_to_ids("<|im_start|>"), TOKENIZER.pad_token_id
    width = len(hello) + 2
    rows = {
        5: [special, *hello, pad],  # a special token inside
        6: [*hello, end, *hello][:width],  # text behind the end
        7: [end, *hello, pad],  # nothing before it
    }
    found = generate(Scripted(rows), TOKENIZER, [[6], [7], [5, 5]], max_new_tokens=9, end_ids=[end])
    assert found == ["" if one == 7 else " a good" for one in (6, 7, 5)]
