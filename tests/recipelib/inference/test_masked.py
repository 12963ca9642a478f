"""Label words in clozes score what a plain loop over one cloze at a time gives."""

import itertools
import math

import pytest
import torch
from encoding_cases import ROOMY, template
from hypothesis import given
from hypothesis import strategies as st
from peft import PromptTuningConfig, TaskType, get_peft_model
from tiny_bert import tiny_bert
from tokenizers_for_tests import tokenizer_for

from recipelib.encoding.asking import Cloze
from recipelib.encoding.prompt_encoder import PromptEncoder
from recipelib.inference.journal import Journal
from recipelib.inference.scoring import masked_log_likelihoods

TOKENIZER = tokenizer_for("bert")
MASK = TOKENIZER.mask_token_id
VOCABULARY = len(TOKENIZER)
MODEL = tiny_bert(VOCABULARY)


@torch.no_grad()
def one_by_one(cloze, word, model=MODEL, columns=0):
    """The masks filled from left to right, one forward pass for each."""
    ids, total = list(cloze.ids), 0.0
    for mask, token in zip(cloze.masks, word, strict=True):
        logits = model(input_ids=torch.tensor([ids])).logits[0, columns + mask].double()
        total += logits.log_softmax(-1)[token].item()
        ids[mask] = token
    return total


def expected(clozes, **options):
    return [[one_by_one(cloze, word, **options) for word in cloze.words] for cloze in clozes]


def passes_of(model):
    """The shape of the ids of each forward pass, as they come."""
    shapes = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)),
        with_kwargs=True,
    )
    return shapes, hook


ids = st.integers(5, VOCABULARY - 1)


@st.composite
def drawn_clozes(draw):
    """Clozes of one to three masks side by side, whose words begin alike, are equal, or neither."""
    clozes = []
    for _ in range(draw(st.integers(1, 4))):
        before, after = (draw(st.lists(ids, max_size=8)) for _ in range(2))
        count = draw(st.integers(1, 3))
        token = st.one_of(ids, st.sampled_from([7, 8]))
        words = st.lists(token, min_size=count, max_size=count)
        masks = list(range(len(before), len(before) + count))
        text = [*before, *[MASK] * count, *after]
        clozes.append(Cloze(text, masks, draw(st.lists(words, min_size=1, max_size=5))))
    return clozes


@given(clozes=drawn_clozes(), batch_tokens=st.sampled_from([1, 20, 10**6]))
def test_words_of_several_tokens_score_as_in_a_loop_over_single_clozes(clozes, batch_tokens):
    found = masked_log_likelihoods(MODEL, clozes, batch_tokens=batch_tokens)

    for values, wanted in zip(found, expected(clozes), strict=True):
        assert values == pytest.approx(wanted, abs=1e-4)


def test_clozes_of_different_lengths_in_one_batch_score_as_alone():
    clozes = [
        Cloze(
            [2, *[9 + length] * length, MASK, MASK, 3], [length + 1, length + 2], [[7, 8], [9, 9]]
        )
        for length in (1, 40, 3, 0, 17)
    ]
    alone = [masked_log_likelihoods(MODEL, [cloze])[0] for cloze in clozes]
    shapes, hook = passes_of(MODEL)

    found = masked_log_likelihoods(MODEL, clozes)

    hook.remove()
    assert shapes[0] == (11, 44)  # of 15 steps as many as 512 tokens hold
    for values, wanted in zip(found, alone, strict=True):
        assert values == pytest.approx(wanted, abs=1e-5)
    assert len({round(value, 3) for values in found for value in values}) == 10


def test_the_probabilities_of_all_words_of_a_length_sum_to_one():
    model, mask = tiny_bert(12), 4
    words = [list(word) for word in itertools.product(range(12), repeat=3)]
    cloze = Cloze([1, 6, mask, mask, mask, 9, 2], [2, 3, 4], words)

    (found,) = masked_log_likelihoods(model, [cloze])

    assert sum(map(math.exp, found)) == pytest.approx(1, abs=1e-5)
    # Of each first token, too: the chain rule.
    (first,) = masked_log_likelihoods(model, [cloze._replace(words=[[one] for one in range(12)])])
    for token, value in enumerate(first):
        together = sum(
            math.exp(one) for one, word in zip(found, words, strict=True) if word[0] == token
        )
        assert together == pytest.approx(math.exp(value), abs=1e-5)


def test_what_words_have_in_common_is_computed_once():
    shapes, hook = passes_of(MODEL)
    many = Cloze([2, 9, MASK, 3], [2], [[token] for token in range(100)])
    alike = Cloze([2, 9, MASK, MASK, 3], [2, 3], [[7, 8], [7, 9], [7, 8], [8, 8], [9, 9]])

    masked_log_likelihoods(MODEL, [many])
    masked_log_likelihoods(MODEL, [alike])

    hook.remove()
    # One pass for a hundred words; the bare cloze and one for each of the first tokens 7, 8 and 9.
    assert shapes == [(1, 4), (4, 5)]


def test_no_pass_is_over_the_budget_and_a_long_cloze_runs_alone():
    clozes = [Cloze([2, *[9] * length, MASK], [length + 1], [[7]]) for length in (3, 40, 7, 18, 8)]
    shapes, hook = passes_of(MODEL)

    masked_log_likelihoods(MODEL, clozes, batch_tokens=30)

    hook.remove()
    assert shapes == [(1, 42), (1, 20), (3, 10)]


def test_nothing_asked_is_nothing_found():
    assert masked_log_likelihoods(MODEL, []) == []
    assert masked_log_likelihoods(MODEL, [Cloze([2, MASK], [1], [])]) == [[]]


def test_a_soft_prompt_in_front_moves_no_mask():
    config = PromptTuningConfig(task_type=TaskType.FEATURE_EXTRACTION, num_virtual_tokens=5)
    torch.manual_seed(0)
    model = get_peft_model(tiny_bert(VOCABULARY), config).eval()
    clozes = [
        Cloze([2, 9, MASK, MASK, 3], [2, 3], [[7, 8], [8, 9]]),
        Cloze([2, 9, 9, 9, MASK, 3], [4], [[7], [8]]),
    ]

    found = masked_log_likelihoods(model, clozes)

    for values, wanted in zip(found, expected(clozes, model=model, columns=5), strict=True):
        assert values == pytest.approx(wanted, abs=1e-4)


def test_results_are_kept_in_a_journal_and_found_again(tmp_path):
    clozes = [Cloze([2, 9, MASK, MASK, 3], [2, 3], [[7, 8], [8, token]]) for token in range(5, 15)]
    whole = masked_log_likelihoods(MODEL, clozes)
    masked_log_likelihoods(MODEL, clozes, journal=Journal(tmp_path, {}))
    shapes, hook = passes_of(MODEL)

    found = masked_log_likelihoods(MODEL, clozes, journal=Journal(tmp_path, {}))

    hook.remove()
    assert (found, shapes) == (whole, [])


# From a template


def test_label_words_of_a_template_score_as_in_the_loop_behind_solved_clozes():
    encoder = PromptEncoder(template("class"), TOKENIZER, ROOMY)
    row = {"kind": "", "title": "the book", "text": "a great story", "text_end": "", "label": "1"}
    (question,) = encoder.template.questions(row)
    before, _ = encoder.cloze_parts(question)
    shown = [
        ("the film - bad It was ", "terrible, truly."),
        ("the town - It was ", "great, truly."),
    ]
    clozes = {}
    for words in encoder.template.verbalizer.values():
        for word in words:
            encoded = encoder.text.word(word, before)
            ids, masks, _ = encoder.cloze(question, len(encoded), shown)
            clozes.setdefault(len(encoded), Cloze(ids, masks, [])).words.append(encoded)

    found = masked_log_likelihoods(MODEL, list(clozes.values()))

    assert len(clozes) > 1
    for values, wanted in zip(found, expected(clozes.values()), strict=True):
        assert values == pytest.approx(wanted, abs=1e-4)
    bare = masked_log_likelihoods(
        MODEL,
        [
            Cloze(*encoder.cloze(question, masks)[:2], cloze.words)
            for masks, cloze in clozes.items()
        ],
    )
    assert all(
        one != pytest.approx(other, abs=1e-2) for one, other in zip(found, bare, strict=True)
    )
