"""Options of each row's own are scored and trained as a plain loop over whole texts finds it."""

import pytest
import torch
from template_fields import make
from tiny_bert import tiny_bert
from tiny_models import MODELS
from tokenizers_for_tests import tokenizer_for

from recipelib.encoding.asking import asker_of
from recipelib.encoding.cloze_rows import collate, encode_cloze_rows
from recipelib.encoding.prompt_encoder import PromptEncoder
from recipelib.evaluation.labels import score_cloze, score_labels
from recipelib.inference.cloze_scoring import word_scores
from recipelib.prompts.verbalizer import combine_words

CAUSAL, MASKED = tokenizer_for("gpt2"), tokenizer_for("bert")
BERT = tiny_bert(len(MASKED))
TEMPLATE = {
    "name": "task",
    "form": "generative",
    "prompt": "Q: {{ text }}\nA:",
    "cloze": "{{ text }} {{ mask }}.",
    "options": "choices",
    "label": "gold",
    "content_free": ["", "N/A"],
}
ROWS = [
    {"text": "What is good?", "choices": ["a film", "nothing", "bread and wine"], "gold": "C"},
    {"text": "Who?", "choices": ["she", "the old man"], "gold": 0},
    {"text": "Where {{ x }}", "choices": ["here", "a", "in it", "b", "[MASK]"], "gold": "in it"},
]


def asker(masked=False, cloze=False, **more):
    tokenizer = MASKED if masked else CAUSAL
    return asker_of(PromptEncoder(make(TEMPLATE, **more), tokenizer, 100), masked, cloze)


def whole_text(model, tokenizer, before, after):
    """The log-likelihood of the tokens of `after` behind `before`."""
    prompt, answer = (
        tokenizer(text, add_special_tokens=False).input_ids for text in (before, after)
    )
    ids = torch.tensor([prompt + answer])
    with torch.no_grad():
        log_probs = model(input_ids=ids).logits[0].double().log_softmax(-1)
    places = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
    return sum(log_probs[at, token].item() for at, token in zip(places, answer, strict=True))


def test_a_causal_model_chooses_by_the_likelihood_of_each_option_s_text():
    model = MODELS["llama"]
    (result,) = score_labels(model, asker(), ROWS, [None]).draws
    for row, record in zip(ROWS, result.records, strict=True):
        expected = {
            letter: whole_text(model, CAUSAL, f"Q: {row['text']}\nA:", f" {text}")
            for letter, text in zip("ABCDE", row["choices"], strict=False)
        }
        assert record["scores"]["sum"] == pytest.approx(expected, abs=1e-4)
        assert record["prediction"] == max(expected, key=expected.get)
        for kind in ("mean", "bytes", "pmi", "calibrated"):
            assert list(record["scores"][kind]) == list(expected)
    assert [record["answer"] for record in result.records] == ["C", "A", "C"]


@pytest.mark.parametrize(("masked", "cloze"), [(False, False), (False, True), (True, False)])
def test_rows_of_a_batch_have_as_many_options_as_they_have(masked, cloze):
    ask, model = asker(masked, cloze), BERT if masked else MODELS["llama"]
    rows = encode_cloze_rows(ask, ROWS)
    batch = collate(rows.examples)
    assert batch["words"].tolist() == [3, 2, 5]
    words = word_scores(model, batch)
    scores = combine_words(words, batch["word_labels"])
    for row, example in enumerate(rows.examples):
        alone = word_scores(model, collate([example]))
        count = len(example["word_labels"])
        expected = combine_words(alone, torch.tensor(example["word_labels"]))[0]
        assert torch.allclose(scores[row, :count], expected, atol=1e-5)
        assert scores[row].exp().sum().item() == pytest.approx(1, abs=1e-5)
    loss = torch.nn.functional.cross_entropy(scores, batch["labels"])
    gradients = torch.autograd.grad(loss, [*model.parameters()], allow_unused=True)
    assert all(gradient.isfinite().all() for gradient in gradients if gradient is not None)
    assert any(gradient.abs().sum() > 0 for gradient in gradients if gradient is not None)
    records = score_cloze(model, ask, rows).records
    for row, record in enumerate(records):
        found = torch.tensor(list(record["log_likelihoods"].values())).log_softmax(-1).tolist()
        assert found == pytest.approx(scores[row, : len(found)].tolist(), abs=1e-5)


def test_letters_are_scored_where_the_answer_is_a_letter():
    model = MODELS["llama"]
    (result,) = score_labels(
        model, asker(answer=" {{ letter }}"), ROWS[:1], [None], all_scores=False
    ).draws
    found = result.records[0]["scores"]["sum"]
    prompt = "Q: What is good?\nA:"
    expected = {letter: whole_text(model, CAUSAL, prompt, f" {letter}") for letter in "ABC"}
    assert found == pytest.approx(expected, abs=1e-4)
