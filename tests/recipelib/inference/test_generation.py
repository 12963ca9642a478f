"""Written answers equal what a plain loop over single prompts writes."""

import math

import pytest
import torch
from tiny_models import MODELS, TOKENIZER, tiny_llama, with_opinions

from recipelib.inference.generation import Written, generate
from recipelib.inference.journal import Journal
from recipelib.inference.lockstep import Lockstep
from recipelib.inference.shared_cache import can_share
from recipelib.runtime.errors import UserError

SHARED = [9, 40, 12, 33] * 6
PROMPTS = [[5] * 3, [7, 300, 12, 9], [50], list(range(40, 60)), [300, 7], [9, 200, 31], [50]]
BOTH = ["llama", "gpt2", "mistral"]  # the last one writes with transformers' generate


def write(model, prompts, new_tokens=8, **options):
    options = {"end_ids": [], **options}
    return generate(model, TOKENIZER, prompts, max_new_tokens=new_tokens, **options)


def texts(model, prompts, **options) -> list[str]:
    return [one.text for (one,) in write(model, prompts, **options)]


@torch.no_grad()
def plain_greedy(model, prompt, new_tokens=8) -> list[int]:
    row = list(prompt)
    for _ in range(new_tokens):
        row.append(model(torch.tensor([row])).logits[0, -1].argmax().item())
    return row[len(prompt) :]


@torch.no_grad()
def log_likelihood(model, prompt, answer) -> float:
    logits = model(torch.tensor([[*prompt, *answer]])).logits[0].log_softmax(-1)
    where = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
    return logits[where, answer].sum().item()


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("batch_tokens", [1, 50, 10**6])
@pytest.mark.parametrize("shared", [[], SHARED], ids=["apart", "shared"])
def test_answers_equal_greedy_generation_of_one_prompt_at_a_time(name, batch_tokens, shared):
    model = MODELS[name]
    prompts = [shared + prompt for prompt in PROMPTS]
    found = write(model, prompts, batch_tokens=batch_tokens)
    rows = [plain_greedy(model, prompt) for prompt in prompts]
    for prompt, row, (one,) in zip(prompts, rows, found, strict=True):
        assert one.text == TOKENIZER.decode(row, skip_special_tokens=True)
        assert one.log_likelihood == pytest.approx(log_likelihood(model, prompt, row), abs=1e-3)
    assert len({one.text for (one,) in found}) > 3  # the prompts matter
    assert can_share(Lockstep(model)) == (name != "mistral")


def test_answers_equal_those_of_transformers_generate():
    model = MODELS["llama"]
    for prompt, text in zip(PROMPTS, texts(model, PROMPTS), strict=True):
        ids = torch.tensor([prompt])
        written = model.generate(ids, do_sample=False, max_new_tokens=8, pad_token_id=0)
        assert text == TOKENIZER.decode(written[0, len(prompt) :], skip_special_tokens=True)


@pytest.mark.parametrize("name", ["llama", "mistral"])
@pytest.mark.parametrize("where", ["asked", "configured", "configured list"])
def test_an_answer_ends_before_the_first_end_token_wherever_that_is_named(name, where, monkeypatch):
    model = MODELS[name]
    written = [plain_greedy(model, prompt) for prompt in PROMPTS]
    end = written[1][3]
    configured = {"asked": None, "configured": end, "configured list": [end, 1]}[where]
    monkeypatch.setattr(model.generation_config, "eos_token_id", configured)
    found = write(model, PROMPTS, end_ids=[end] if where == "asked" else [])
    ends = {end, 1} if where == "configured list" else {end}
    for prompt, row, (one,) in zip(PROMPTS, written, found, strict=True):
        length = next((place for place, token in enumerate(row) if token in ends), len(row))
        assert one.text == TOKENIZER.decode(row[:length], skip_special_tokens=True)
        # The end marker is part of what was likely.
        expected = log_likelihood(model, prompt, row[: length + 1])
        assert one.log_likelihood == pytest.approx(expected, abs=1e-3)
    assert len(TOKENIZER(found[1][0].text)["input_ids"]) < 8


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_a_stop_text_ends_its_own_answer_and_no_other(name):
    model = MODELS[name]
    whole = texts(model, PROMPTS)
    row = plain_greedy(model, PROMPTS[3])
    stop = TOKENIZER.decode(row[2:4])
    assert stop not in TOKENIZER.decode(row[:3])
    found = texts(model, PROMPTS, stop=[stop])
    assert found[3] == TOKENIZER.decode(row[:4])
    for text, stopped in zip(whole, found, strict=True):
        assert (stopped == text) == (stop not in text)


class Passes:
    """How many tokens each forward pass computed."""

    def __init__(self, model):
        can_share(Lockstep(model))
        self.tokens = []
        self.hook = model.register_forward_hook(
            lambda module, args, kwargs, output: self.tokens.append(kwargs["input_ids"].numel()),
            with_kwargs=True,
        )

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.hook.remove()


def test_a_beginning_is_computed_once_and_rows_that_are_done_are_computed_no_more():
    model = MODELS["llama"]
    prompts = [SHARED + [100 + number] * 3 for number in range(6)]
    rows = [plain_greedy(model, prompt) for prompt in prompts]
    end = rows[0][2]
    lengths = [row.index(end) if end in row else 8 for row in rows]
    assert len(set(lengths)) > 1
    with Passes(model) as passes:
        write(model, prompts, end_ids=[end])
    assert passes.tokens[0] == len(SHARED) + 6 * 3
    steps = [sum(length > step for length in lengths) for step in range(7)]
    assert passes.tokens[1:] == [count for count in steps if count]


# Samples -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_samples_depend_on_the_seed_the_prompt_and_their_number_only(name):
    model = MODELS[name]
    options = {"samples": 3, "temperature": 1.5}
    found = write(model, PROMPTS, **options)
    assert [len(some) for some in found] == [3] * len(PROMPTS)
    assert found == pytest_approx(write(model, PROMPTS, batch_tokens=1, **options))
    # The last prompt is the third again: its draws are its own.
    assert found[2] != found[6]
    assert write(model, PROMPTS, seed=1, **options) != found
    assert len({one.text for some in found for one in some}) > 10


def pytest_approx(found):
    """The same texts, and likelihoods but for rounding."""
    return [
        [Written(one.text, pytest.approx(one.log_likelihood, abs=1e-3)) for one in some]
        for some in found
    ]


def test_samples_are_drawn_with_the_models_probabilities():
    model = with_opinions(tiny_llama(len(TOKENIZER)))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight /= 4
        probabilities = model(torch.tensor([[5, 9, 4]])).logits[0, -1].div(0.5).softmax(-1)
    likeliest = probabilities.argmax().item()
    (some,) = write(model, [[5, 9, 4]], new_tokens=1, samples=2000, temperature=0.5)
    share = sum(one.text == TOKENIZER.decode([likeliest]) for one in some) / 2000
    expected = probabilities[likeliest].item()
    assert 0.001 < expected < 0.999
    assert abs(share - expected) < 5 * math.sqrt(expected * (1 - expected) / 2000) + 1e-3


def test_samples_share_their_prompt():
    model = MODELS["llama"]
    with Passes(model) as passes:
        write(model, [SHARED], samples=5, temperature=1.0)
    assert passes.tokens == [len(SHARED)] + [5] * 7


# Memory, and interruptions -----------------------------------------------------------------------


def test_where_memory_runs_out_fewer_rows_are_written_side_by_side(monkeypatch):
    model = MODELS["llama"]
    long = list(range(40, 70))  # is computed in parts
    expected = texts(model, [*PROMPTS, long])
    layer = model.model.layers[1]
    forward = layer.forward

    def limited(hidden_states, *args, **kwargs):
        if hidden_states[..., 0].numel() > 20:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(hidden_states, *args, **kwargs)

    monkeypatch.setattr(layer, "forward", limited)
    assert texts(model, [*PROMPTS, long]) == expected
    with pytest.raises(UserError, match="out of memory with a single row"):
        write(model, [[5, 9]], samples=21, temperature=1.0)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_an_interrupted_run_goes_on_where_it_stopped(name, tmp_path):
    model = MODELS[name]
    options = {"batch_tokens": 16, "samples": 2, "temperature": 1.0}
    whole = write(model, PROMPTS, **options)
    calls = []

    def interrupted(*_):
        calls.append(1)
        if len(calls) == 30:
            raise KeyboardInterrupt

    can_share(Lockstep(model))
    hook = model.register_forward_hook(interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(model, PROMPTS, journal=Journal(tmp_path, {}), **options)
    hook.remove()
    assert 0 < len(Journal(tmp_path, {})) < len(PROMPTS)
    assert write(model, PROMPTS, journal=Journal(tmp_path, {}), **options) == whole
    # Another temperature asks for something else.
    options["temperature"] = 0.5
    assert write(model, PROMPTS, journal=Journal(tmp_path, {}), **options) == write(
        model, PROMPTS, **options
    )


def test_nothing_asked_is_nothing_computed():
    with Passes(MODELS["llama"]) as passes:
        assert write(MODELS["llama"], []) == []
    assert passes.tokens == []


def test_special_tokens_are_no_part_of_an_answer(monkeypatch):
    model = MODELS["llama"]
    row = plain_greedy(model, PROMPTS[1])
    special = TOKENIZER.convert_tokens_to_ids("<|im_start|>")
    head = model.get_output_embeddings()
    bias = torch.zeros(len(TOKENIZER))
    bias[special] = 1e6
    steps = []

    def prefer(module, args, output):
        steps.append(1)
        return output + bias if len(steps) == 2 else output

    hook = head.register_forward_hook(prefer)
    (text,) = texts(model, [PROMPTS[1]])
    hook.remove()
    assert text.startswith(TOKENIZER.decode(row[:1]))
    assert "<|im_start|>" not in text
