"""recipes/search_label_words.py run whole, on a tiny model: what it writes is a template to use."""

import cloze_sft
import pytest
import search_label_words
import yaml
from recipe_runs import write_rows
from run_files import read_json

from recipelib.prompts.template import PromptTemplate
from recipelib.runtime.errors import UserError

TASK = {
    "name": "topics",
    "form": "generative",
    "prompt": "{{ text }} It was",
    "cloze": "{{ text }} It was {{ mask }}.",
    "label": "label",
}
ROWS = [
    {"text": f"{word} {number}", "label": label}
    for number in range(6)
    for label, word in (("0", "a good film"), ("1", "the bad book"))
]


@pytest.fixture
def run(runs, masked_model, tmp_path):
    """Runs the tool on a task that has no label words; gives the output folder."""
    (tmp_path / "topics.yaml").write_text(yaml.safe_dump(TASK))
    task = {
        "template": tmp_path / "topics.yaml",
        "dataset": write_rows(tmp_path / "rows", train=ROWS, validation=ROWS[:4]),
        "max_length": 100,
    }
    return runs(search_label_words, model_name_or_path=masked_model, **task)


def test_words_are_shown_and_written_into_a_template_that_other_recipes_take(
    run, runs, masked_model, tmp_path, capsys
):
    folder = run()
    words = PromptTemplate.load(str(folder / "template.yaml")).verbalizer
    assert set(words) == {"0", "1"}
    assert words["0"] != words["1"]
    said = capsys.readouterr().out
    for (word,) in words.values():
        assert word in said
    assert "instead, 0" in said
    assert "pass it as --template" in said
    assert {file.name for file in folder.iterdir()} == {"template.yaml"}
    score = runs(cloze_sft, model_name_or_path=masked_model, max_length=100)
    options = {"template": folder / "template.yaml", "dataset": tmp_path / "rows"}
    metrics = read_json(score(**options, score_only=True, output="scored") / "metrics.json")
    assert f"/ {metrics['score']:.3f}" in said


def test_a_causal_model_is_asked_by_the_prompt_or_by_the_cloze(run, causal_model, capsys):
    said = {}
    for cloze in (False, True):
        run(model_name_or_path=causal_model, cloze=cloze, preview=1)
        said[cloze] = capsys.readouterr().out
    assert "'0': [' 0']" in said[False]
    assert "'0': [' 0.']" in said[True]  # the cloze goes on behind its words


def test_preview_loads_no_model(run, monkeypatch, capsys):
    monkeypatch.setattr("recipelib.models.loading.load_pretrained", None)
    folder = run(preview=2)
    assert capsys.readouterr().out.count("[MASK]") == 2
    assert not folder.exists()


def test_a_trained_run_is_not_written_over(run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "metrics.json").write_text('{"trainable_parameters": 7}')
    with pytest.raises(UserError, match="holds a trained run; name another"):
        run()
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["metrics.json"]


def test_a_search_answers_no_rows(run, tmp_path):
    with pytest.raises(UserError, match="--predict: a search answers no rows; leave it out"):
        run(predict=tmp_path / "rows" / "train.jsonl")


def test_a_class_without_rows_is_named(run, tmp_path):
    with pytest.raises(UserError, match=r"topics\.yaml: .*no training row has the label '1'"):
        run(
            template=_with_words(tmp_path),
            dataset=write_rows(tmp_path / "one", train=ROWS[::2], validation=ROWS[:4]),
        )


def _with_words(folder):
    path = folder / "topics.yaml"
    path.write_text(yaml.safe_dump({**TASK, "verbalizer": {"0": ["film"], "1": ["book"]}}))
    return path
