"""A template that leaves its verbalizer out takes its classes from the rows, each its own word;
what is no class ends in one line.
"""

import datasets
import pytest
import yaml
from datasets import ClassLabel, Dataset, Features, Value
from row_files import arguments, load, write

from recipelib.data.classes import with_classes, with_classes_of
from recipelib.prompts.template import PromptTemplate
from recipelib.runtime.errors import UserError

FIELDS = {
    "name": "t",
    "form": "generative",
    "prompt": "{{ text }} It was",
    "cloze": "{{ text }} It was {{ mask }}.",
    "label": "label",
}
PAIRS = {
    **{"form": "inference", "first": "{{ text }}", "second": "{{ text }}", "name": "t"},
    **{"prompt": "{{ first }}? {{ second }}", "label": "label"},
}


def labelled(*labels, column="label"):
    return [{"text": f"row {n}", column: label} for n, label in enumerate(labels)]


def classes_of(data, fields=FIELDS, **given):
    return list(with_classes(PromptTemplate(fields, "t.yaml"), arguments(data, **given)).verbalizer)


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        (["b", "a", "b ", None, "", "c"], ["a", "b", "c"]),
        ([1.0, 0.0, 1.0], ["0", "1"]),
        ([True, False, True], ["false", "true"]),
        ([9, 10, 9], ["10", "9"]),
    ],
)
@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
@pytest.mark.parametrize("fields", [FIELDS, PAIRS], ids=["one text", "a pair"])
def test_classes_are_the_values_of_the_labels_column(tmp_path, labels, found, suffix, fields):
    rows = labelled(*labels)
    template = PromptTemplate(fields)
    made = with_classes(template, arguments(write(tmp_path / f"rows.{suffix}", rows)))
    assert made.verbalizer == {name: [name] for name in found}
    assert made.metrics == ["accuracy"]
    assert made.questions(rows[0])[0].label == found[1]
    made.save(tmp_path / "template.yaml")  # which needs no rows any more
    assert PromptTemplate.load(str(tmp_path / "template.yaml")).verbalizer == made.verbalizer
    assert with_classes_of(template, Dataset.from_list(rows), "rows").verbalizer == made.verbalizer


def test_classes_of_a_folder_are_those_of_training_and_evaluation_rows(tmp_path, capsys):
    write(tmp_path / "train.csv", labelled("a", "b", "b", column="kind"))
    write(tmp_path / "dev.tsv", labelled("a", "c", column="kind"))
    fields = {**FIELDS, "columns": {"label": "kind"}}
    assert classes_of(tmp_path, fields) == ["a", "b", "c"]
    assert (
        "t.yaml: has no verbalizer, so the 3 values of 'kind' are their own words: 'a', 'b', "
        in (capsys.readouterr().out)
    )
    (tmp_path / "train.csv").unlink()
    assert classes_of(tmp_path, fields) == ["a", "c"]
    with pytest.raises(
        UserError, match=r"dev.tsv: no column 'label'; the columns are 'text', 'kin"
    ):
        classes_of(tmp_path)


NAMES = Features({"text": Value("string"), "label": ClassLabel(names=["z", "never there", "a"])})


@pytest.mark.parametrize("streaming", [False, True])
def test_classes_that_a_data_set_names_are_taken_in_its_order(monkeypatch, tmp_path, streaming):
    data = Dataset.from_list(labelled(2, 0, 2), features=NAMES)
    plain = Dataset.from_list(labelled("y", "x", "y"))

    def load_dataset(path, name=None, *, split, revision=None, streaming=False):
        if split not in ("train", "validation"):
            raise ValueError(f"Unknown split {split!r}. Should be one of ['train', 'validation'].")
        found = plain if path == "owner/plain" else data
        return found.to_iterable_dataset() if streaming else found

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert classes_of("owner/name", streaming=streaming) == ["z", "never there", "a"]
    data.to_parquet(tmp_path / "rows.parquet")
    if streaming:
        with pytest.raises(
            UserError, match=r"t.yaml: verbalizer: is missing, and owner/plain@main"
        ):
            classes_of("owner/plain", streaming=True)
    else:
        assert classes_of("owner/plain") == ["x", "y"]
        assert classes_of(tmp_path / "rows.parquet") == ["z", "never there", "a"]


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        ([*"abcd"], "t.yaml: label: label has 4 values in 4 rows of .*; name a column of classes"),
        ([n // 2 for n in range(2200)], "t.yaml: label: label has 1,100 values in 2,200 rows"),
        (["a", "a"], "label has the same value, 'a', in all rows"),
        ([None, ""], "label has no value in all rows"),
        (["Yes", "yes.", "no", "no"], "values 'Yes' and 'yes.' of label in .* make the same word"),
        ([["a"], ["b"]], "rows.jsonl: label: holds lists, which are no classes"),
        ([0.5, 1.0], "rows.jsonl: label: holds numbers such as 0.5, which are no classes"),
    ],
)
def test_values_that_are_no_classes_are_one_line(tmp_path, labels, told):
    path = write(tmp_path / "rows.jsonl", labelled(*labels))
    with pytest.raises(UserError, match=told) as error:
        classes_of(path)
    assert "\n" not in str(error.value)


def test_a_verbalizer_that_is_there_stays(tmp_path):
    template = PromptTemplate({**FIELDS, "verbalizer": {"0": ["x"], "1": ["y"]}})
    assert with_classes(template, None) is template
    open_one = PromptTemplate(FIELDS, "t.yaml")
    with pytest.raises(UserError, match=r"t.yaml: verbalizer: is missing, and no rows were"):
        open_one.questions({"text": "a", "label": "b"})


def test_json_true_is_the_verbalizers_true_or_pythons(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a", "label": true}\n{"text": "b", "label": false}\n')
    for yes, no in (("true", "false"), ("True", "False")):
        file = tmp_path / "t.yaml"
        file.write_text(yaml.safe_dump({**FIELDS, "verbalizer": {yes: ["good"], no: ["bad"]}}))
        template = PromptTemplate.load(str(file))
        asked = [template.questions(row)[0].label for row in load(path, template).rows]
        assert asked == [yes, no]
    # What the cure of a boolean key says to write is what matches.
    file.write_text(file.read_text().replace("'True'", "true").replace("'False'", "false"))
    with pytest.raises(
        UserError, match='the key false is read as False, not as text; write "false'
    ):
        PromptTemplate.load(str(file))
    with pytest.raises(UserError, match="label: true is not in the verbalizer"):
        load(path, PromptTemplate({**FIELDS, "verbalizer": {"yes": ["good"], "no": ["bad"]}}))
