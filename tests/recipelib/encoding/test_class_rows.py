"""Rows as texts of which a class is read."""

import pytest
import torch
from template_cases import CASES
from tokenizers_for_tests import tokenizer_for

from recipelib.encoding import (
    ClassCollator,
    PromptEncoder,
    class_asker,
    class_encoding,
    encode_class_rows,
    encode_cloze_rows,
)
from recipelib.encoding.prompt_encoder import Counts
from recipelib.prompts import PromptTemplate
from recipelib.runtime import UserError

WITH_CLASSES = ["movie_reviews", "sst2", "trec", "rte", "esnli", "next_sentence", "banking77"]


def encoder_of(name: str, kind: str = "gpt2", max_length: int = 512, **fields) -> PromptEncoder:
    template = PromptTemplate.load(name)
    template = PromptTemplate({**template.fields, **fields}, template.path)
    return PromptEncoder(template, tokenizer_for(kind), max_length)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", WITH_CLASSES)
def test_every_template_with_classes_gives_one_text_and_one_class_a_row(name, masked):
    encoder = encoder_of(name, "bert" if masked else "gpt2")
    rows, counts = CASES[name].rows, Counts()
    asker = class_asker(encoder, masked)
    encoding, classes = class_encoding(asker), list(encoder.template.verbalizer)
    asked = encode_class_rows(asker, rows)
    assert len(asked.ids) == len(rows)
    for number, row in enumerate(rows):
        ((_, (ids, length, label)),) = encoding.encode(number, row, counts)
        assert ids == asked.ids[number]
        assert length == len(ids)
        assert classes[label] == CASES[name].golds[number] == asked.asked[number].questions[0].label
    assert (counts.examples, counts.supervised_tokens) == (len(rows), len(rows))
    assert counts.tokens == sum(map(len, asked.ids))
    # A masked model reads the cloze with its mask; no text tells the class.
    text = encoder.text.tokenizer.decode(asked.ids[0])
    assert ("[MASK]" in text) == masked


def test_rows_that_are_encoded_to_be_scored_have_a_bar(capsys):
    rows = CASES["movie_reviews"].rows
    for encode, kind in [(encode_class_rows, "gpt2"), (encode_cloze_rows, "bert")]:
        encode(class_asker(encoder_of("movie_reviews", kind), kind == "bert"), rows)
        assert f"{len(rows)}/{len(rows)}" in capsys.readouterr().err.rpartition("encoding: ")[2]


def test_a_causal_model_reads_the_prompt_that_it_is_asked():
    encoder = encoder_of("movie_reviews")
    asker = class_asker(encoder, False)
    asked = encode_class_rows(asker, CASES["movie_reviews"].rows)
    decoded = encoder.text.tokenizer.decode(asked.ids[0])
    assert decoded.endswith(CASES["movie_reviews"].prompt)


def test_where_the_prompt_asks_once_per_word_what_stands_before_the_mask_is_read():
    encoder = encoder_of("next_sentence")
    asked = encode_class_rows(class_asker(encoder, False), CASES["next_sentence"].rows)
    text = encoder.text.tokenizer.decode(asked.ids[0])
    assert text.rstrip().endswith("This article is about")


def test_without_a_cloze_that_is_one_line():
    template = PromptTemplate.load("next_sentence")
    fields = {name: value for name, value in template.fields.items() if name != "cloze"}
    encoder = PromptEncoder(PromptTemplate(fields, template.path), tokenizer_for("gpt2"), 512)
    with pytest.raises(UserError, match=r"cloze: is missing; the prompt asks once per label word"):
        class_asker(encoder, False)


def test_rows_that_do_not_fit_are_counted_and_none_at_all_is_one_line():
    rows = CASES["movie_reviews"].rows
    asker = class_asker(encoder_of("movie_reviews", shorten=[], max_length=30), False)
    counts = Counts()
    long = {**rows[0], "sentence": "very " * 40}
    assert not [*class_encoding(asker).encode(0, long, counts)]
    assert (counts.left_out, counts.examples) == (1, 0)
    with pytest.raises(UserError, match="--max_length 30: no row fits"):
        encode_class_rows(asker, [long])


def test_the_key_tells_apart_what_makes_other_texts():
    keys = {
        class_encoding(class_asker(encoder_of(*given), given[1] == "bert")).key
        for given in (
            ("movie_reviews", "gpt2"),
            ("movie_reviews", "bert"),
            ("movie_reviews", "gpt2", 100),
            ("sst2", "gpt2"),
        )
    }
    assert len(keys) == 4


def test_a_batch_is_padded_on_the_right_with_the_pad_that_the_model_looks_for():
    examples = [{"input_ids": [5, 6, 7], "labels": 1}, {"input_ids": [8], "labels": 0}]
    batch = ClassCollator(pad=3)(examples)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 3, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert torch.equal(batch["labels"], torch.tensor([1, 0]))
