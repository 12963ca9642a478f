"""The words that a search has found are shown, and written into a template."""

import json

from recipelib.data.places import locate
from recipelib.evaluation.label_search import LabelWords
from recipelib.prompts.template import PromptTemplate
from recipelib.reporting.label_words import save_label_words

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


def test_rows_beside_the_template_are_found_from_where_the_new_one_is_written(tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    fields = {**FIELDS, "verbalizer": {"0": ["x"], "1": ["y"], "2": ["z"]}}
    fields["dataset"] = {"path": "rows.jsonl"}
    found = LabelWords({"0": "a", "1": "b", "2": "c"}, 0.5, 0.5, {})
    template = PromptTemplate(fields, tmp_path / "t.yaml")
    path = save_label_words(found, template, str(tmp_path / "runs" / "words"))
    written = PromptTemplate.load(str(path))
    assert locate(written, None, None).resolve() == (tmp_path / "rows.jsonl").resolve()


def test_the_words_are_shown_with_their_accuracy_and_stand_in_the_new_template(tmp_path, capsys):
    template = PromptTemplate({**FIELDS, "verbalizer": {"0": ["0"], "1": ["1"], "2": ["2"]}})
    others = {"0": [("fine", 0.75, 0.5)], "1": [], "2": []}
    found = LabelWords({"0": "good", "1": "bad", "2": "old"}, 0.8, 0.625, others)
    path = save_label_words(found, template, str(tmp_path))
    written = PromptTemplate.load(str(path))
    assert written.verbalizer == {"0": ["good"], "1": ["bad"], "2": ["old"]}
    assert written.fields == {**template.fields, "verbalizer": written.fields["verbalizer"]}
    out = capsys.readouterr().out
    for shown in ("good", "0.800 / 0.625", "instead, 0", "fine 0.75/0.50", "written to"):
        assert shown in out


def test_other_processes_write_no_template(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    template = PromptTemplate({**FIELDS, "verbalizer": {"0": ["0"], "1": ["1"]}})
    path = save_label_words(LabelWords({"0": "a", "1": "b"}, 1.0, 1.0, {}), template, str(tmp_path))
    assert not path.exists()
