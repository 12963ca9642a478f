"""Choices that differ from row to row, in every recipe where classes work."""

from itertools import cycle

import cloze_sft
import cot_sft
import icl_eval
import instruction_sft
import lora_sft
import prompt_tuning
import pytest
import search_label_words
import transfer_learning
from recipe_runs import run_recipe, write_rows
from run_files import read_json, read_jsonl

from recipelib.inference import Written
from recipelib.runtime import UserError

TEMPLATE = """\
name: choose
form: generative
prompt: |-
  {{ text }}
  It is
cloze: "{{ text }} It is {{ mask }}."
options: choices
label: gold
"""
RATIONALE = """\
rationale: {text: " Look at it.", join: " So it is"}
extract: ['So it is (.*)']
"""
TEXTS = ["odd", "even", "one", "two"]
ROWS = [
    {
        "id": f"q{n}",
        "text": f"Number {n}{'!' * (n % 4)}",
        "choices": {"label": list("ABCD")[:count], "text": TEXTS[:count]},
        "gold": "AB"[n % 2],
    }
    for n in range(16)
    for count in [2 + n % 3]
]


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """A template and its rows."""
    folder = write_rows(tmp_path_factory.mktemp("choose"), train=ROWS[:10], validation=ROWS[10:])
    (folder / "choose.yaml").write_text(TEMPLATE)
    (folder / "reason.yaml").write_text(f"{TEMPLATE}{RATIONALE}")
    return {"template": str(folder / "choose.yaml"), "dataset": str(folder)}


@pytest.mark.parametrize(
    ("recipe", "masked", "options"),
    [
        (icl_eval, False, {"shots": 2, "draws": 2}),
        (icl_eval, True, {"shots": 1}),
        (lora_sft, False, {"max_steps": 2}),
        (instruction_sft, False, {"max_steps": 1}),
        (cloze_sft, False, {"max_steps": 1, "cloze": True}),
        (cloze_sft, True, {"max_steps": 2}),
        (prompt_tuning, False, {"max_steps": 2}),
    ],
    ids=lambda value: getattr(value, "__name__", None) or str(value),
)
def test_a_recipe_chooses_among_each_row_s_own_options(
    recipe, masked, options, task, causal_model, masked_model, tmp_path
):
    model = masked_model if masked else causal_model
    folder = run_recipe(
        recipe, model_name_or_path=model, output_dir=tmp_path / "run", **task, **options
    )
    records = [one for one in read_jsonl(folder / "predictions.jsonl") if not one.get("draw")]
    assert len(records) == 6
    for record in records:
        row = next(row for row in ROWS if row["id"] == record["id"])
        assert record["answer"] == row["gold"]
        assert record["prediction"] in row["choices"]["label"]
    assert read_json(folder / "metrics.json")["metric"] == "accuracy"


def test_reasoning_ends_in_one_of_the_row_s_options(task, causal_model, tmp_path, monkeypatch):
    from recipelib.evaluation import answers

    ends = ["So it is even", "So it is (A).", "So it is c", "So it is odd", "B", "So it is"]
    said = cycle(ends)

    def write(model, tokenizer, prompts, **options):
        return [[Written(next(said), 0.0)] for _ in prompts]

    monkeypatch.setattr(answers, "generate", write)
    folder = run_recipe(
        cot_sft,
        model_name_or_path=causal_model,
        output_dir=tmp_path / "run",
        max_steps=1,
        **{**task, "template": task["template"].replace("choose.yaml", "reason.yaml")},
    )
    read = [one["prediction"] for one in read_jsonl(folder / "predictions.jsonl")]
    assert read == ["B", "A", None, "A", None, None]  # the third row has no C


@pytest.mark.parametrize(
    ("recipe", "options", "said"),
    [
        (transfer_learning, {"mode": "features"}, "options: differ from row to row"),
        (transfer_learning, {"head": "classifier"}, "options: differ from row to row"),
        (prompt_tuning, {"soft_verbalizer": True}, "--soft_verbalizer"),
        (cloze_sft, {"per_class": 1}, "--per_class"),
        (cloze_sft, {"calibrate": True}, "--calibrate"),
        (icl_eval, {"sampler": "balanced"}, "--sampler balanced"),
        (icl_eval, {"score": "pmi"}, "content_free"),
        (search_label_words, {}, "options"),
    ],
    ids=lambda value: getattr(value, "__name__", None) or str(value),
)
def test_what_needs_classes_that_all_rows_share_is_refused(
    recipe, options, said, task, causal_model, tmp_path
):
    with pytest.raises(UserError, match=said) as error:
        run_recipe(
            recipe,
            model_name_or_path=causal_model,
            output_dir=tmp_path / "run",
            **task,
            **options,
        )
    assert "\n" not in str(error.value)
