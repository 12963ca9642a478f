"""Label words are found where the rows hold them, in templates that have none, for any model."""

import itertools

import pytest
import torch
from tiny_bert import tiny_bert
from tiny_models import MODELS
from tokenizers_for_tests import tokenizer_for

from recipelib.encoding.asking import asker_of
from recipelib.encoding.cloze_rows import encode_cloze_rows
from recipelib.encoding.prompt_encoder import PromptEncoder
from recipelib.evaluation.label_search import _choose, search_label_words
from recipelib.evaluation.labels import score_cloze
from recipelib.prompts.template import PromptTemplate
from recipelib.runtime.errors import UserError

FIELDS = {
    "name": "t",
    "form": "generative",
    "prompt": "{{ text }} It was",
    "cloze": "{{ text }} It was {{ mask }}.",
    "label": "label",
}
ROWS = [
    {"text": f"{word} {number}", "label": label}
    for number in range(6)
    for label, word in (("0", "a good film"), ("1", "the bad book"), ("2", "this old town"))
]


def prepared(masked):
    tokenizer = tokenizer_for("bert" if masked else "gpt2")
    template = PromptTemplate({**FIELDS, "verbalizer": {"0": ["0"], "1": ["1"], "2": ["2"]}})
    asker = asker_of(PromptEncoder(template, tokenizer, 100), masked, False)
    return asker, tiny_bert(len(tokenizer)) if masked else MODELS["gpt2"]


@pytest.mark.parametrize("masked", [False, True])
def test_the_words_score_as_the_search_says(masked):
    asker, model = prepared(masked)
    train, evaluation = (encode_cloze_rows(asker, rows) for rows in (ROWS, ROWS[:7]))
    found = search_label_words(model, asker, train, evaluation)
    assert len(set(found.words.values())) == 3
    words = {label: [word] for label, word in found.words.items()}
    template = PromptTemplate({**asker.encoder.template.fields, "verbalizer": words})
    asker = asker_of(PromptEncoder(template, asker.encoder.text.tokenizer, 100), masked, False)
    for rows, accuracy in ((ROWS, found.train), (ROWS[:7], found.evaluation)):
        result = score_cloze(model, asker, encode_cloze_rows(asker, rows))
        assert result.score == pytest.approx(accuracy)
    assert found.train > 0.5  # three classes
    for label, others in found.others.items():
        assert others[0][1] >= found.train - 1e-6, label
        assert all(word.isalpha() for word, _, _ in others)


def test_no_change_of_one_word_gains_and_few_classes_reach_the_best_of_all():
    torch.manual_seed(0)
    likely, gold = torch.randn(40, 12).log_softmax(-1), torch.arange(40) % 2
    tokens = [list(range(6)), list(range(3, 12))]

    def accuracy(picked):
        ids = [some[at] for some, at in zip(tokens, picked, strict=True)]
        return (likely[:, ids].argmax(-1) == gold).float().mean().item()

    chosen = _choose(likely, gold, tokens)
    assert tokens[0][chosen[0]] != tokens[1][chosen[1]]
    for at, other in itertools.product(range(6), range(9)):
        if tokens[0][at] != tokens[1][chosen[1]]:
            assert accuracy([at, chosen[1]]) <= accuracy(chosen)
        if tokens[0][chosen[0]] != tokens[1][other]:
            assert accuracy([chosen[0], other]) <= accuracy(chosen)


def test_rows_that_are_sorted_by_class_are_drawn_from(monkeypatch):
    monkeypatch.setattr("recipelib.evaluation.label_search.MOST_ROWS", 12)
    asker, model = prepared(masked=True)
    rows = encode_cloze_rows(asker, sorted(ROWS * 2, key=lambda row: row["label"]))
    assert len(search_label_words(model, asker, rows, rows).words) == 3


def test_words_are_found_for_a_cloze_of_a_causal_model_whose_tokens_carry_the_space():
    tokenizer = tokenizer_for("llama2")
    template = PromptTemplate({**FIELDS, "verbalizer": {"0": ["0"], "1": ["1"], "2": ["2"]}})
    asker = asker_of(PromptEncoder(template, tokenizer, 100), False, True)
    rows = encode_cloze_rows(asker, ROWS)
    found = search_label_words(MODELS["llama"], asker, rows, rows)
    assert len(set(found.words.values())) == 3


def test_a_cloze_that_no_word_can_fill_is_named():
    template = PromptTemplate(
        {**FIELDS, "answer": "x{{ word }}", "verbalizer": {"0": ["0"], "1": ["1"], "2": ["2"]}}
    )
    asker = asker_of(PromptEncoder(template, tokenizer_for("gpt2"), 100), False, False)
    rows = encode_cloze_rows(asker, ROWS)
    with pytest.raises(UserError, match="0 words of one token can fill the cloze for '0'"):
        search_label_words(MODELS["gpt2"], asker, rows, rows)


def test_a_class_without_training_rows_is_named():
    asker, model = prepared(masked=True)
    rows = encode_cloze_rows(asker, ROWS[:2])
    with pytest.raises(UserError, match="no training row has the label '2'"):
        search_label_words(model, asker, rows, rows)
