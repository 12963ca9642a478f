"""The scores of label words in a blank, with gradients, are those of a plain loop over whole texts,
whatever stands in the batch and in front of the text.
"""

import copy

import pytest
import torch
from encoding_cases import LABELS, template
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from tiny_bert import tiny_bert
from tiny_models import MODELS, tiny, tiny_llama, with_opinions
from tokenizers_for_tests import tokenizer_for

from recipelib.adapters.soft_prompts import compute_prompt_once
from recipelib.adapters.soft_verbalizer import SoftVerbalizer
from recipelib.encoding.asking import ClozeAsker, asker_of
from recipelib.encoding.cloze_rows import collate, encode_cloze_rows, example_of
from recipelib.encoding.prompt_encoder import PromptEncoder
from recipelib.encoding.words import label_word_ids
from recipelib.evaluation.evaluation import evaluate_task
from recipelib.evaluation.labels import score_cloze
from recipelib.inference.cloze_scoring import score_examples, word_scores
from recipelib.inference.scoring import log_likelihoods, masked_log_likelihoods
from recipelib.runtime.errors import UserError

CAUSAL, MASKED = tokenizer_for("gpt2"), tokenizer_for("bert")
BERT = tiny_bert(len(MASKED))
WORDS = ["good", "a bad film", "0", "[MASK]", "<|endoftext|>", "{{ x }}", "so so so", ""]
ROWS = [
    {"kind": "film", "title": WORDS[n % 8], "text": " ".join(WORDS[: n % 7]), "text_end": ".",
     "label": list(LABELS)[n % 3]}
    for n in range(9)
]  # fmt: skip


def asker(masked=False, cloze=False, name="class", max_length=100):
    encoder = PromptEncoder(template(name), MASKED if masked else CAUSAL, max_length)
    return asker_of(encoder, masked, cloze)


def plain(model, example, shift=0):
    """The likelihood of each word from all logits of each sequence, computed alone."""
    scores, start = [0.0] * len(example["word_labels"]), 0
    for number, length in enumerate(example["lengths"]):
        ids = torch.tensor([example["input_ids"][start : start + length]])
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].double()
        for sequence, place, token, word, sign in example["reads"]:
            if sequence == number:
                scores[word] += sign * logits[shift + place].log_softmax(-1)[token].item()
        start += length
    return scores


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", ["class", "pair"])
def test_scores_are_the_likelihoods_that_the_evaluation_engine_finds(masked, name):
    ask, model = asker(masked, name=name), BERT if masked else MODELS["llama"]
    rows = encode_cloze_rows(ask, ROWS)
    found = score_examples(model, rows.examples)
    score = masked_log_likelihoods if masked else log_likelihoods
    for one, values, example in zip(rows.asked, found, rows.examples, strict=True):
        requests = ask.requests(one.questions[0], one.prompts[0], ())
        expected = score(model, [request for request, _ in requests])
        assert values.tolist() == pytest.approx([x for some in expected for x in some], abs=1e-4)
        labels = [label for _, words in requests for label, *_ in words]
        assert [list(LABELS)[index] for index in example["word_labels"]] == labels


def test_models_whose_body_is_called_in_parts_are_read_at_the_blank_too():
    shape = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = with_opinions(tiny("opt", **shape, word_embed_proj_dim=32, max_position_embeddings=128))
    examples = encode_cloze_rows(asker(), ROWS).examples
    found = score_examples(model, examples)
    for example, values in zip(examples, found.tolist(), strict=True):
        assert values == pytest.approx(plain(model, example), abs=1e-4)


def test_a_model_that_cannot_be_read_at_the_blank_alone_is_refused(monkeypatch):
    model = copy.deepcopy(MODELS["llama"])
    head = torch.nn.Linear(1, 1)
    monkeypatch.setattr(type(model), "get_output_embeddings", lambda self: head)
    with pytest.raises(UserError, match="LlamaForCausalLM has no last layer that can be asked"):
        score_examples(model, encode_cloze_rows(asker(), ROWS[:1]).examples)


def test_a_pair_that_is_asked_once_per_word_scores_by_how_much_yes_leads():
    ask, model = asker(name="each"), MODELS["gpt2"]
    rows = encode_cloze_rows(ask, ROWS[:3])
    found = score_examples(model, rows.examples)
    assert found.shape == (3, 4)  # a text for each of the four labels
    for one, values in zip(rows.asked, found.tolist(), strict=True):
        for question, prompt, value in zip(one.questions, one.prompts, values, strict=True):
            candidates = ask.encoder.candidates(question, prompt.end)
            asked = [candidates["yes"][0], candidates["no"][0]]
            ((yes, no),) = log_likelihoods(model, [(prompt.ids, asked)])
            assert value == pytest.approx(yes - no, abs=1e-4)


def test_a_causal_model_fills_a_blank_anywhere_by_the_likelihood_of_the_whole_text():
    ask, model = asker(cloze=True), MODELS["llama"]
    assert isinstance(ask, ClozeAsker)
    rows = encode_cloze_rows(ask, ROWS)
    found = score_examples(model, rows.examples)
    tokenizer, words = ask.encoder.text.tokenizer, [w for some in LABELS.values() for w in some]
    for one, values in zip(rows.asked, found.tolist(), strict=True):
        question, prompt = one.questions[0], one.prompts[0].ids
        whole = ask.encoder.template.cloze(question, "MARK")
        (((_, follow), _),) = ask.requests(question, one.prompts[0])
        for word, value, rest in zip(words, values, follow, strict=True):
            # The whole text with the word in it: nothing is left out or doubled.
            assert tokenizer.decode(prompt + rest) == whole.replace("MARK", word)
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([prompt + rest])).logits[0].log_softmax(-1)
            places = range(len(prompt) - 1, len(prompt) + len(rest) - 1)
            assert value == pytest.approx(logits[places, rest].sum().item(), abs=1e-4)


@given(
    masked=st.booleans(),
    prompt=st.sampled_from(["none", "soft", "p_tuning", "prefix", "soft, once"]),
    order=st.permutations(range(9)),
    budget=st.sampled_from([1, 60, 4096]),
)
@settings(max_examples=15)
def test_a_rows_scores_depend_neither_on_its_batch_nor_on_padding(masked, prompt, order, budget):
    model, ask = prompted(masked, prompt), asker(masked)
    shift = 3 if prompt in ("soft", "p_tuning", "soft, once") else 0
    examples = encode_cloze_rows(ask, [ROWS[index] for index in order]).examples
    found = score_examples(model, examples, batch_tokens=budget).tolist()
    for example, values in zip(examples, found, strict=True):
        assert values == pytest.approx(plain(model, example, shift), abs=1e-4)


_PROMPTED: dict = {}


def prompted(masked, kind):
    """A tiny model with a soft prompt or prefix that changes what it says."""
    name = kind
    if (masked, kind) not in _PROMPTED:
        model = tiny_bert(len(MASKED)) if masked else with_opinions(tiny_llama(len(CAUSAL)))
        shape = {"task_type": "FEATURE_EXTRACTION" if masked else "CAUSAL_LM",
                 "num_virtual_tokens": 3}  # fmt: skip
        kinds = {
            "soft": PromptTuningConfig,
            "p_tuning": PromptEncoderConfig,
            "prefix": PrefixTuningConfig,
        }
        torch.manual_seed(1)
        kind, _, once = kind.partition(", ")
        if kind in kinds:
            before = score_examples(model, encode_cloze_rows(asker(masked), ROWS).examples)
            model = get_peft_model(model, kinds[kind](**shape))
            with torch.no_grad():
                for one in model.prompt_encoder.parameters():
                    one.mul_(3)
            after = score_examples(model, encode_cloze_rows(asker(masked), ROWS).examples)
            assert (after - before).abs().max() > 0.01
        if once:
            assert compute_prompt_once(model) is not masked
        _PROMPTED[masked, name] = model.eval()
    return _PROMPTED[masked, name]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3", "bloom", "llama, eager"])
def test_a_prompt_computed_once_has_the_scores_and_gradients_of_one_per_row(kind):
    found = {}
    for once in (False, True):
        torch.manual_seed(0)
        config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
        model = get_peft_model(copy.deepcopy(MODELS[kind]), config)
        assert not once or compute_prompt_once(model)
        batch = collate(encode_cloze_rows(asker(), ROWS).examples)
        scores = word_scores(model, batch)
        scores.softmax(-1)[:, 0].sum().backward()
        found[once] = scores.detach(), model.prompt_encoder["default"].embedding.weight.grad
    assert torch.allclose(found[True][0], found[False][0], atol=1e-4)
    size = found[False][1].norm()
    assert size > 0
    assert (found[True][1] - found[False][1]).norm() < 1e-3 * size


@pytest.mark.parametrize("kind", ["mistral", "gemma3", "rwkv"])
def test_models_that_keep_other_things_than_all_keys_go_pefts_way(kind):
    config = PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4, token_dim=32, num_layers=2,
        num_attention_heads=4,
    )  # fmt: skip
    assert not compute_prompt_once(get_peft_model(copy.deepcopy(MODELS[kind]), config))


@pytest.mark.parametrize("masked", [False, True])
def test_the_head_sees_only_the_places_that_are_read(masked):
    model, ask = BERT if masked else MODELS["llama"], asker(masked)
    batch = collate(encode_cloze_rows(ask, ROWS).examples)
    seen = []
    head = model.get_output_embeddings()
    hook = head.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    word_scores(model, batch)
    hook.remove()
    assert seen == [(1, len(batch["places"]), len(MASKED if masked else CAUSAL))]
    assert len(batch["places"]) < batch["input_ids"].numel() / 4


def test_words_that_begin_alike_share_a_sequence_in_a_causal_model():
    words = [[5], [6, 7], [6, 7, 8], [9, 1]]
    example = example_of([(([1, 2], words), [("a",), ("a",), ("b",), ("b",)])], ["a", "b"], "b")
    assert example["lengths"] == [3, 4]  # 1 2 9, and 1 2 6 7, in which the others are read, too
    assert example["labels"] == 1
    assert example["word_labels"] == [0, 0, 1, 1]
    model = MODELS["llama"]
    expected = log_likelihoods(model, [([1, 2], words)])
    assert score_examples(model, [example])[0].tolist() == pytest.approx(expected[0], abs=1e-4)


@pytest.mark.parametrize("masked", [False, True])
def test_a_soft_verbalizer_starts_at_the_label_words(masked):
    model = tiny_bert(len(MASKED)) if masked else with_opinions(tiny_llama(len(CAUSAL)))
    single = {"0": ["a"], "1": ["b"], "2": ["c"]}
    ask = asker(masked)
    ask.encoder.template.verbalizer = single
    rows, soft = encode_cloze_rows(ask, ROWS), encode_cloze_rows(ask, ROWS, soft=True)
    hard = score_examples(model, rows.examples)
    words = label_word_ids(ask, rows.asked[0].questions[0])
    assert all(len(ids) == 1 for (ids,) in words.values())
    SoftVerbalizer.at_words(model, words).into(model)
    found = score_examples(model, soft.examples)
    # Of words of one token the soft scores are the hard ones, but for the words left out.
    assert torch.allclose(found, hard.log_softmax(-1), atol=1e-4)
    batch = collate(soft.examples)
    word_scores(model, batch)[:, 0].sum().backward()
    assert model.soft_verbalizer.weight.grad.norm() > 0


def test_a_soft_verbalizer_of_several_words_starts_at_their_mean():
    model = MODELS["llama"]
    head = model.get_output_embeddings().weight
    soft = SoftVerbalizer.at_words(model, {"a": [[5], [6, 7]], "b": [[9]]})
    assert torch.allclose(soft.weight[0], (head[5] + (head[6] + head[7]) / 2) / 2)
    assert torch.equal(soft.weight[1], head[9])


def test_a_long_row_is_shortened_in_its_fields_and_never_at_the_blank():
    row = {**ROWS[0], "text": "word " * 300}
    for masked, cloze in ((False, False), (False, True), (True, True)):
        ask = asker(masked, cloze, max_length=50)
        rows = encode_cloze_rows(ask, [row, ROWS[1]])
        assert rows.counts.shortened == 1
        assert max(rows.examples[0]["lengths"]) <= 50
        text = ask.encoder.text.tokenizer.decode(rows.asked[0].prompts[0].ids)
        assert "It was" in text or "it was" in text
        assert text.count("word") > 2
    with pytest.raises(UserError, match="--max_length 5: no row fits"):
        encode_cloze_rows(asker(max_length=5), ROWS)


def test_calibration_divides_by_what_the_blank_says_without_content():
    fields = {**template("class").fields, "content_free": ["", "N/A"]}
    encoder = PromptEncoder(type(template("class"))(fields), CAUSAL, 100)
    ask, model = asker_of(encoder, False, False), MODELS["llama"]
    rows = encode_cloze_rows(ask, ROWS)
    words = score_examples(model, rows.examples).softmax(-1)
    free = []
    for text in ("", "N/A"):
        emptied = rows.asked[0].questions[0].change(kind=text, title=text, text=text, text_end=text)
        request, _ = ask.requests(emptied, ask.prompt(emptied, ()), ())[0]
        free.append(torch.tensor(log_likelihoods(model, [request])[0]).softmax(-1))
    weighted = words / ((free[0] + free[1]) / 2)
    weighted /= weighted.sum(-1, keepdim=True)
    labels = rows.examples[0]["word_labels"]
    result = score_cloze(model, ask, rows, calibrate=True)
    for record, row in zip(result.records, weighted, strict=True):
        for number, label in enumerate(LABELS):
            part = sum(p for p, own in zip(row.tolist(), labels, strict=True) if own == number)
            assert record["scores"][label] == pytest.approx(
                torch.tensor(part).log().item(), abs=1e-3
            )
    plain_result = score_cloze(model, ask, rows)
    # Uncalibrated and unnormalized, as every recipe writes them.
    asked = evaluate_task(model, ask.encoder, ROWS)
    for one, other, more in zip(plain_result.records, result.records, asked.records, strict=True):
        for record in (one, other):
            assert record["log_likelihoods"] == pytest.approx(more["log_likelihoods"], abs=1e-4)
    assert "scores" not in asked.records[0]
    assert plain_result.details["calibrated"] == result.score
    assert result.details["uncalibrated"] == plain_result.score


def test_calibration_without_inputs_free_of_content_is_refused():
    rows = encode_cloze_rows(asker(), ROWS)
    with pytest.raises(UserError, match="--calibrate: needs content_free in"):
        score_cloze(MODELS["llama"], asker(), rows, calibrate=True)
