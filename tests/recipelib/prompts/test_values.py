"""What stands in a row besides text is read in every form in which data sets have it, and what
cannot be used says where it is wrong.
"""

from hypothesis import given, settings
from hypothesis import strategies as st

from recipelib.prompts.values import read_entities

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
