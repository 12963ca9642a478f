"""A text's vector is the mean of its own tokens' last states, whatever it is batched with."""

import numpy as np
import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from tiny_bert import tiny_bert
from tiny_llama import tiny_llama
from tokenizers_for_tests import tokenizer_for

from recipelib.encoding.tokens import TextEncoder
from recipelib.inference.embeddings import embed_texts

TEXTS = [
    "The teacher wrote the book in the old town.",
    "a great film",
    "",
    "Nobody knows why they made this; the story is thin, the music is worse. " * 4,
    "terrible",
]
LLAMA, BERT = (
    (TextEncoder(tokenizer_for("gpt2")), tiny_llama(len(tokenizer_for("gpt2"))).eval()),
    (TextEncoder(tokenizer_for("bert")), tiny_bert(len(tokenizer_for("bert")))),
)
BOTH = pytest.mark.parametrize(("encoder", "model"), [LLAMA, BERT], ids=["causal", "masked"])


def embed(encoder, model, texts, **options):
    return embed_texts(model, encoder, texts, **{"max_length": 100, **options})


@torch.no_grad()
def mean_of_states(encoder, model, text):
    ids = encoder.text_prompt(text) or [encoder.tokenizer.pad_token_id]
    states = model.base_model(input_ids=torch.tensor([ids[:100]])).last_hidden_state[0]
    mean = states.double().mean(0)
    return (mean / mean.norm()).numpy()


class Passes:
    """Records the shape of the ids and of the logits in each forward pass."""

    def __init__(self, model):
        self.shapes = []
        self.hook = model.register_forward_hook(self.record, with_kwargs=True)

    def record(self, module, args, kwargs, output):
        self.shapes.append((tuple(kwargs["input_ids"].shape), tuple(output.logits.shape[:2])))

    def __enter__(self):
        return self.shapes

    def __exit__(self, *error):
        self.hook.remove()


@BOTH
def test_vectors_are_the_mean_of_the_last_states_of_length_one(encoder, model):
    found = embed(encoder, model, TEXTS)

    assert found.dtype == np.float32
    assert found.shape == (5, 32)
    assert np.linalg.norm(found, axis=1) == pytest.approx(np.ones(5), abs=1e-6)
    for text, vector in zip(TEXTS, found, strict=True):
        assert vector == pytest.approx(mean_of_states(encoder, model, text), abs=1e-5)


@BOTH
@pytest.mark.parametrize("batch_tokens", [1, 40, 10**6])
def test_a_padded_batch_gives_what_each_text_gives_alone(encoder, model, batch_tokens):
    alone = np.concatenate([embed(encoder, model, [text]) for text in TEXTS])

    found = embed(encoder, model, TEXTS, batch_tokens=batch_tokens)

    assert found == pytest.approx(alone, abs=1e-5)


def test_texts_are_batched_within_the_budget_and_only_one_column_is_projected():
    texts = ["film " * count for count in (1, 2, 30, 3, 12)]
    lengths = sorted(len(LLAMA[0].text_prompt(text)) for text in texts)
    with Passes(LLAMA[1]) as shapes:
        embed(*LLAMA, texts, batch_tokens=3 * lengths[2])

    assert shapes[0] == ((1, lengths[4]), (1, 1))
    assert shapes[-1] == ((3, lengths[2]), (3, 1))


def test_texts_that_say_alike_are_nearer():
    pairs = [
        ("the story is thin, the music is bad", "the story is thin, the film is bad"),
        ("who wrote the book in the old town?", "who wrote the book in the town"),
        ("an insurance change by the river", "an insurance company by the river"),
    ]
    asked, stored = (embed(*LLAMA, some) for some in zip(*pairs, strict=True))

    assert (asked @ stored.T).argmax(1).tolist() == [0, 1, 2]
    assert (asked @ asked.T).argmax(1).tolist() == [0, 1, 2]


@BOTH
def test_of_a_long_text_the_first_tokens_count(encoder, model):
    long = "the book in the old town " * 20
    cut = embed(encoder, model, [long, long + "is terrible"], max_length=20)

    assert cut[0] == pytest.approx(cut[1], abs=1e-6)
    assert cut[0] != pytest.approx(embed(encoder, model, [long])[0], abs=1e-3)


def test_a_soft_prompt_in_front_is_no_part_of_the_text():
    encoder = LLAMA[0]
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    torch.manual_seed(0)
    prompted = get_peft_model(tiny_llama(len(encoder.tokenizer)), config).eval()

    found = embed(encoder, prompted, TEXTS)

    for text, vector in zip(TEXTS, found, strict=True):
        ids = encoder.text_prompt(text) or [encoder.tokenizer.pad_token_id]
        with torch.no_grad():
            states = prompted(input_ids=torch.tensor([ids[:100]]), output_hidden_states=True)
        mean = states.hidden_states[-1][0, 5:].mean(0)
        assert vector == pytest.approx((mean / mean.norm()).numpy(), abs=1e-5)


def test_dropout_is_off():
    encoder, model = BERT
    model.train()

    one, other = (embed(encoder, model, TEXTS) for _ in range(2))

    assert (one == other).all()
    assert not model.training


def test_no_texts_are_no_vectors():
    assert len(embed(*LLAMA, [])) == 0
