"""What a tokenizer makes of label words: what is worth a note, and what cannot work."""

import pytest
from tokenizers_for_tests import tokenizer_for

from recipelib.encoding.tokens import TextEncoder
from recipelib.encoding.words import check_words
from recipelib.prompts.template import PromptTemplate
from recipelib.runtime.errors import UserError


def notes(tokenizer, verbalizer, space=" ", before=""):
    fields = {"name": "t", "form": "generative", "prompt": "{{ x }}", "label": "y"}
    template = PromptTemplate({**fields, "verbalizer": verbalizer}, "t.yaml")
    text = TextEncoder(tokenizer_for(tokenizer))
    encoded = {
        label: [text.encode(space + word) for word in words] for label, words in verbalizer.items()
    }
    return check_words(template, text, encoded, before)


def test_a_word_of_several_tokens_is_reported():
    (found,) = notes("gpt2", {"a": ["book"], "b": ["great"]})
    assert found.startswith("t.yaml: verbalizer.b: 'great': is 3 tokens, ")


def test_a_word_that_a_space_would_make_whole_is_reported_with_the_cure():
    words = {"a": ["book"], "b": ["insurance"]}
    assert notes("gpt2", words) == []
    alone = notes("gpt2", words, space="")
    assert len(alone) == 2
    assert all("put one in front of the word" in one for one in alone)


def test_a_word_right_behind_another_is_reported_with_the_cure():
    words = {"a": ["a"], "b": ["b"]}  # one token with a space and one without
    found = notes("gpt2", words, space="", before="s")
    assert len(found) == 2
    assert found[0].startswith("t.yaml: verbalizer.a: 'a': stands right behind 's'")
    for before in ("", "(", " ", "\n", "是"):
        assert notes("gpt2", words, space="", before=before) == []
    assert notes("gpt2", words, space=" ", before="s") == []


def test_a_word_that_the_tokenizer_does_not_know_is_refused():
    with pytest.raises(UserError, match=r"verbalizer.b: '漢': the tokenizer does not know it"):
        notes("bert", {"a": ["good"], "b": ["漢"]})


def test_words_that_the_tokenizer_cannot_tell_apart_are_refused():
    with pytest.raises(UserError, match=r"verbalizer.b: 'góod': .* cannot tell it from 'good'"):
        notes("bert", {"a": ["good"], "b": ["góod"]})
