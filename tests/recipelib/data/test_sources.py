"""Rows come from where the user says, and are the same wherever they come from."""

import re
from types import SimpleNamespace

import datasets
import pyarrow as pa
import pytest
from datasets import ClassLabel, Dataset, Features, List, Value
from pyarrow import parquet as pq
from row_files import ASK, SST2, arguments, ask, load, numbered, refusal, write

from recipelib.data.rows import load_asked, load_rows, load_splits
from recipelib.prompts.template import PromptTemplate
from recipelib.runtime.errors import UserError

# Folders and where data is looked for


def test_a_folder_holds_a_file_for_each_split(tmp_path):
    write(tmp_path / "train.jsonl", numbered(4))
    write(tmp_path / "dev.csv", numbered(2))
    assert len(load_rows(SST2, str(tmp_path), "dev").rows) == 2
    # The template names validation, of its own data.
    for named in ("dev", None):
        train, evaluation = load_splits(SST2, arguments(tmp_path, eval_split=named), 0)
        assert (len(train.rows), len(evaluation.rows)) == (4, 2)
        assert evaluation.source == str(tmp_path / "dev.csv")
    own = PromptTemplate({**SST2.fields, "dataset": {"path": str(tmp_path), "eval": "validation"}})
    for template, args in ((SST2, arguments(tmp_path, eval_split="validation")),
                           (own, arguments())):  # fmt: skip
        with pytest.raises(
            UserError, match="no file for the split 'validation'; its splits: dev, train; "
        ) as error:
            load_splits(template, args, 0)
        assert "--eval_split" in str(error.value)


def test_a_folder_without_data_says_how_to_name_the_files(tmp_path):
    assert "name the files after their splits: train.jsonl" in refusal(tmp_path)


def test_two_files_of_one_split_are_an_error(tmp_path):
    write(tmp_path / "train.jsonl", numbered(1))
    write(tmp_path / "train.csv", numbered(1))
    assert "train.csv and train.jsonl both are the split 'train'" in refusal(tmp_path)


@pytest.mark.parametrize(
    "name", ["rows.jsonl", "./rows", "a/b/c", "owner/rows.csv", "", "../x", "a b"]
)
def test_what_looks_like_a_path_and_does_not_exist_is_an_error(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", None)
    with pytest.raises(UserError, match=f"--dataset {re.escape(name)}: no such file or folder"):
        load_rows(SST2, name, "train")


def test_the_templates_own_data_lies_beside_it_or_among_the_bundled(tmp_path):
    bundled = load_rows(PromptTemplate.load("movie_reviews"), None, "validation")
    assert bundled.source == "data_templates/examples/movie_reviews/validation.jsonl"
    assert len(bundled.rows) == 96
    (tmp_path / "own").mkdir()
    write(tmp_path / "own/test.csv", [{"question_text": "q", "gold": "g"}])
    template = PromptTemplate({**ASK, "dataset": {"path": "own"}}, tmp_path / "ask.yaml")
    assert load_rows(template, None, "test").rows == [{"question_text": "q", "gold": "g"}]
    with pytest.raises(UserError, match=r"template: dataset.path: is missing; pass --dataset"):
        load_rows(ask(), None, "train")


def test_parquet_shards_are_read_in_order_of_their_numbers(tmp_path):
    rows = numbered(12)
    for shard in range(12):
        write(tmp_path / f"train-{shard}.parquet", rows[shard : shard + 1])
    loaded = load(tmp_path)
    assert loaded.rows == rows
    assert loaded.source == f"{tmp_path}, split train (12 files)"


def test_a_bad_row_of_a_shard_is_named_by_its_row_in_that_file(tmp_path):
    (tmp_path / "data").mkdir()
    write(tmp_path / "data/train-00000-of-00002.parquet", numbered(3))
    write(
        tmp_path / "data/train-00001-of-00002.parquet",
        [*numbered(1), {"sentence": "x", "label": "7"}],
    )
    with pytest.raises(
        UserError, match=r"data/train-00001-of-00002\.parquet: row 2: label: '7' is not"
    ):
        load(tmp_path)


def test_a_missing_shard_is_an_error(tmp_path):
    write(tmp_path / "train-00000-of-00002.parquet", numbered(3))
    assert "1 of 2 train files are there" in refusal(tmp_path)


def test_a_file_that_is_no_parquet_or_has_another_suffix_is_an_error(tmp_path):
    (tmp_path / "rows.parquet").write_text("PAR?")
    (tmp_path / "rows.xlsx").write_text("x")
    assert refusal(tmp_path / "rows.parquet").startswith("rows.parquet: no Parquet file")
    assert refusal(tmp_path / "rows.xlsx").startswith("rows.xlsx: not one of .jsonl, .json, .csv")


def test_a_date_that_python_has_not_is_one_line(tmp_path):
    file = tmp_path / "rows.parquet"
    times = pa.array([2**62], pa.timestamp("us"))
    pq.write_table(pa.table({"text": ["a"], "label": ["good"], "at": times}), file)
    assert refusal(file).startswith("rows.parquet: no Parquet file (date value out of range)")


# The hub, faked at its edge


@pytest.fixture
def hub(monkeypatch):
    """`load_dataset` gives `hub.data` or raises `hub.error`; `hub.asked` holds the arguments."""
    fake = SimpleNamespace(data=None, error=None, asked=[])

    def load_dataset(path, name=None, *, split, revision=None):
        fake.asked.append((path, name, split, revision))
        if fake.error:
            raise fake.error
        return fake.data

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return fake


def labelled(names, labels, **more):
    features = {"sentence": Value("string"), "label": ClassLabel(names=names)}
    values = {"sentence": [f"row {n}" for n in range(len(labels))], "label": labels}
    for column, (feature, cells) in more.items():
        features[column], values[column] = feature, cells
    return Dataset.from_dict(values, features=Features(features))


def test_the_templates_revision_and_config_belong_to_its_own_data_set_only(hub):
    hub.data = Dataset.from_list([{"question_text": "q", "gold": "g"}])
    template = ask(dataset={"path": "owner/name", "name": "main", "revision": "abc"})
    loaded = load_rows(template, None, "train")
    assert loaded.source == "owner/name:main@abc, split train"
    assert (
        load_rows(template, "other/name:config", "test").source
        == "other/name:config@main, split test"
    )
    load_rows(template, "plain", "test[:10]", revision="v2")
    load_rows(template, None, "train", revision="v3")
    assert hub.asked == [
        ("owner/name", "main", "train", "abc"),
        ("other/name", "config", "test", None),
        ("plain", None, "test[:10]", "v2"),
        ("owner/name", "main", "train", "v3"),
    ]


@pytest.mark.parametrize(
    ("verbalizer", "names", "read"),
    [
        ({"0": ["bad"], "1": ["good"]}, ["negative", "positive"], [0, 1, 1]),
        (
            {"negative": ["bad"], "positive": ["good"]},
            ["negative", "positive"],
            ["negative", "positive", "positive"],
        ),
        # Names that look like the integers of other classes are names.
        ({"1": ["bad"], "2": ["good"]}, ["1", "2"], ["1", "2", "2"]),
        ({"1": ["bad"], "0": ["good"]}, ["1", "0"], ["1", "0", "0"]),
    ],
)
@pytest.mark.parametrize("where", ["hub", "parquet"])
def test_class_integers_become_what_the_verbalizer_is_written_for(
    hub, tmp_path, verbalizer, names, read, where
):
    template = PromptTemplate({**SST2.fields, "verbalizer": verbalizer})
    data = labelled(names, [0, 1, 1])
    if where == "hub":
        hub.data = data
        rows = load_rows(template, "owner/name", "train").rows
    else:
        data.to_parquet(tmp_path / "rows.parquet")
        rows = load(tmp_path / "rows.parquet", template).rows
    assert [row["label"] for row in rows] == read


def test_class_integers_outside_the_label_become_names(hub):
    topics = ClassLabel(names=["art", "war"])
    hub.data = labelled(
        ["n", "p"],
        [0, 1],
        topic=(topics, [1, 0]),
        topics=(List(topics), [[1, 0], []]),
        nested=(List({"topic": topics}), [[{"topic": 1}], []]),
        unknown=(topics, [-1, None]),
    )
    first, second = load_rows(SST2, "owner/name", "train").rows
    assert first == {
        "sentence": "row 0",
        "label": 0,
        "topic": "war",
        "topics": ["war", "art"],
        "nested": [{"topic": "war"}],
        "unknown": None,
    }
    assert second["unknown"] is None


def test_tags_are_read_as_names(hub):
    template = PromptTemplate(
        {
            "name": "ner",
            "form": "extractive",
            "context": "text",
            "prompt": "{{ text }} {{ type }}?",
            "spans": {"tokens": "tokens", "tags": "ner_tags", "types": {"PER": ["person"]}},
        }
    )
    tags = List(ClassLabel(names=["O", "B-PER", "I-PER"]))
    values = {"tokens": [["Ada", "Lovelace", "wrote"]], "ner_tags": [[1, 2, 0]]}
    features = Features({"tokens": List(Value("string")), "ner_tags": tags})
    hub.data = Dataset.from_dict(values, features=features)
    (row,) = load_rows(template, "owner/ner", "train").rows
    assert row == {"tokens": ["Ada", "Lovelace", "wrote"], "ner_tags": ["B-PER", "I-PER", "O"]}
    assert template.questions(row)[0].references == ("Ada Lovelace",)


def test_unlabelled_rows_are_bad_unless_they_are_to_be_predicted(hub):
    hub.data = labelled(["negative", "positive"], [1, -1, 0])
    with pytest.raises(
        UserError,
        match=r"owner/name@main, split test, row 2: label: -1 marks a row without a label",
    ):
        load_rows(SST2, "owner/name", "test")
    assert load_rows(SST2, "owner/name", "test", skip_bad_rows=True).skipped == 1
    rows = load_rows(SST2, "owner/name", "test", answers=False).rows
    assert [row["label"] for row in rows] == [1, None, 0]


def test_a_draw_from_the_hub_checks_the_drawn_rows_only_and_refills_skipped_ones(hub):
    hub.data = labelled(["negative", "positive"], [-1] * 10 + [1] * 90)
    options = {"max_samples": 80, "seed": 0}
    drawn = load_rows(SST2, "owner/name", "train", skip_bad_rows=True, **options)
    assert len(drawn.rows) == 80
    assert 0 < drawn.skipped <= 10
    fewer = load_rows(SST2, "owner/name", "train", skip_bad_rows=True, max_samples=20, seed=0)
    assert fewer.rows == drawn.rows[:20]
    with pytest.raises(UserError, match="bad rows"):
        load_rows(SST2, "owner/name", "train", **options)
    assert len(load_rows(SST2, "owner/name", "train", max_samples=1).rows) == 1


@pytest.mark.parametrize(
    ("splits", "own"),
    [(["train", "validation"], "validation"), (["dev", "train"], "dev"), (["train", "test"], None)],
)
def test_the_hubs_own_evaluation_split_is_used_where_the_template_names_none(
    monkeypatch, capsys, splits, own
):
    def load_dataset(path, name=None, *, split, revision=None, streaming=False):
        if split not in splits:
            raise ValueError(f'Unknown split "{split}". Should be one of {splits}.')
        return Dataset.from_list([{"question_text": split, "gold": str(n)} for n in range(20)])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    args = arguments("owner/name")
    train, evaluation = load_splits(ask(), args, 0)
    assert (len(train.rows), len(evaluation.rows)) == ((20, 20) if own else (18, 2))
    assert evaluation.rows[0]["question_text"] == (own or "train")
    assert ("'test' is not read: --eval_split test" in capsys.readouterr().out) == (not own)
    args.predict = None
    asked = load_asked(ask(), args, 0, shots=0)[1]
    assert asked.rows == evaluation.rows


def test_a_column_missing_on_the_hub_is_one_line(hub):
    hub.data = Dataset.from_dict({"text": ["a"] * 3, "label": [1] * 3})
    with pytest.raises(UserError) as error:
        load_rows(SST2, "owner/name", "train")
    assert str(error.value) == (
        "owner/name@main, split train: no column 'sentence'; the columns are 'text', 'label'; "
        "pass --columns text=text"
    )


def hub_errors():
    missing = datasets.exceptions.DatasetNotFoundError
    return [
        (
            ConnectionError("Couldn't reach 'o/n' on the Hub (OfflineModeIsEnabled)"),
            "the hub cannot be reached",
        ),
        (
            missing("Dataset 'o/n' doesn't exist on the Hub or cannot be accessed."),
            "not on the hub",
        ),
        (
            missing("Dataset 'o/n' is a gated dataset on the Hub. You must be ..."),
            "is gated: accept its terms",
        ),
        (missing("Revision 'x' doesn't exist for dataset 'o/n' on the Hub."), "no such revision"),
        (
            RuntimeError("Dataset scripts are no longer supported, but found n.py"),
            "a loading script",
        ),
        (
            ValueError("Unknown split \"x\". Should be one of ['train', 'test']."),
            "its splits: train, test;",
        ),
        (
            ValueError(
                "Config name is missing.\nPlease pick one among the available configs: ['a', 'b']"
            ),
            "as o/n:CONFIG; its configs: a, b",
        ),
        (ValueError("BuilderConfig 'x' not found. Available: ['a']"), "its configs: a"),
        (
            datasets.exceptions.DatasetGenerationError("An error\noccurred"),
            "DatasetGenerationError: An error occurred;",
        ),
    ]


@pytest.mark.parametrize(("error", "told"), hub_errors())
def test_what_the_hub_refuses_is_one_line_with_its_cure(hub, error, told):
    hub.error = error
    with pytest.raises(UserError) as caught:
        load_rows(SST2, "o/n", "x")
    text = str(caught.value)
    assert text.startswith("o/n@main, split x: ")
    assert told in text
    assert "\n" not in text


def test_an_empty_split_on_the_hub_is_an_error(hub):
    hub.data = labelled(["negative", "positive"], [])
    with pytest.raises(UserError, match="split train: holds no rows"):
        load_rows(SST2, "owner/name", "train")
