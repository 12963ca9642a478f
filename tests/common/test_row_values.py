import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from template_fields import make, one_line

from common.row_values import RowError, read_entities

TAGS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]


def naive_entities(tokens, tags):
    """The same, read entity by entity: each start is followed to its end."""
    found = []
    for i, tag in enumerate(tags):
        kind = tag[2:]
        before = tags[i - 1][2:] if i else ""
        if tag == "O" or (tag[0] == "I" and before == kind):
            continue
        j = i + 1
        while j < len(tags) and tags[j] == f"I-{kind}":
            j += 1
        start = sum(len(token) + 1 for token in tokens[:i])
        text = " ".join(tokens[i:j])
        found.append((kind, text, start, start + len(text)))
    return found


@given(st.lists(st.tuples(st.text(max_size=4), st.sampled_from(TAGS)), max_size=12))
@settings(max_examples=300, deadline=None)
def test_bio_tags_read_as_the_naive_reading_does(pairs):
    tokens, tags = [token for token, _ in pairs], [tag for _, tag in pairs]
    found = read_entities(tokens, tags, {"PER": [], "LOC": []})
    assert found == naive_entities(tokens, tags)
    sentence = " ".join(tokens)
    assert all(sentence[start:end] == text for _, text, start, end in found)


@pytest.mark.parametrize(
    ("turns", "problem"),
    [
        ("hello", "turn 1 is no {role, content}; convert the conversation"),
        ([{"from": "human", "value": "x"}], "turn 1 is no {role, content}"),
        ([{"role": "bot", "content": "x"}], "turn 1 has the role 'bot'; use system, user"),
        (
            [{"role": "user", "content": "x"}, {"role": "assistant", "content": " "}],
            "turn 2 is empty",
        ),
        ([{"role": "user", "content": None}], "turn 1 is empty"),
        ([{"role": "user", "content": "x"}], "no assistant turn, so nothing to learn"),
        ([], "no assistant turn, so nothing to learn"),
        (
            [{"role": "system", "content": "x"}, {"role": "assistant", "content": "x"}],
            "the assistant speaks first; begin with the user's turn",
        ),
    ],
)
def test_a_conversation_that_cannot_be_learned_says_why(turns, problem):
    template = make({"name": "task", "form": "generative", "messages": "chat"})
    with pytest.raises(RowError, match=re.escape(problem)) as error:
        template.questions({"chat": turns})
    assert one_line(error).startswith("chat: ")
