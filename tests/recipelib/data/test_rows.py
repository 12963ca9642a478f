"""Rows of a run: their splits, draws and columns, and rows that stand in two of them."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from row_files import SST2, arguments, ask, load, numbered, refusal, write

from recipelib.data.rows import (
    load_asked,
    load_splits,
    overlap,
    parse_columns,
    untrained_classes,
)
from recipelib.prompts.template import PromptTemplate
from recipelib.runtime.errors import UserError

# Columns and bad rows


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_a_column_missing_throughout_is_one_line_with_the_cure(tmp_path, suffix):
    rows = [{"Sentense": "a", "stars": "1"}] * 30
    text = refusal(write(tmp_path / f"rows.{suffix}", rows))
    assert text == (
        f"rows.{suffix}: no column 'label', 'sentence'; the columns are 'Sentense', 'stars'; "
        "pass --columns label=COLUMN text=Sentense"
    )


def test_the_cure_of_a_missing_column_works(tmp_path):
    path = write(tmp_path / "rows.csv", [{"review": "a", "label": "1"}])
    template = PromptTemplate.load("sst2", columns=parse_columns(["text=review"]))
    assert load(path, template).rows == [{"review": "a", "label": "1"}]


def test_rows_to_predict_need_no_answer_and_may_leave_it_empty(tmp_path):
    path = write(tmp_path / "rows.csv", [{"sentence": "a"}])
    assert refusal(path).startswith("rows.csv: no column 'label'")
    assert load(path, answers=False).rows == [{"sentence": "a"}]
    write(path, [{"sentence": "a", "label": ""}, {"sentence": "b", "label": "1"}])
    assert len(load(path, answers=False).rows) == 2
    write(path, [{"sentence": "a", "label": "7"}])
    assert "label: '7' is not in the verbalizer" in refusal(path, answers=False)
    assert refusal(write(path, [{"label": "1"}]), answers=False).startswith(
        "rows.csv: no column 'sentence'"
    )


def test_optional_columns_may_be_missing(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"question_text": "q", "gold": "g"}])
    template = ask(prompt="{{ question_text }}{{ hint }}.", optional=["hint"])
    assert load(path, template).rows == [{"question_text": "q", "gold": "g"}]


def test_nested_values_come_out_as_lists_and_dicts(tmp_path):
    template = PromptTemplate(
        {
            "name": "qa",
            "form": "extractive",
            "context": "context",
            "prompt": "{{ context }} {{ asked_text }}",
            "references": "answers.text",
            "start": "answers.answer_start",
        }
    )
    rows = [
        {
            "context": "the red fox",
            "asked_text": "color?",
            "answers": {"text": ["red"], "answer_start": [4]},
        }
    ]
    assert load(write(tmp_path / "a.parquet", rows), template).rows == rows
    assert load(write(tmp_path / "a.jsonl", rows), template).rows == rows
    rows[0]["answers"]["answer_start"] = ["four"]
    text = refusal(write(tmp_path / "a.jsonl", rows), template)
    assert text.startswith("a.jsonl:1: start: 'four' is no character offset")


def test_the_first_twenty_bad_rows_are_listed_and_the_rest_counted(tmp_path):
    rows = numbered(3) + [{"sentence": "x", "label": "9"}] * 1300
    path = write(tmp_path / "rows.jsonl", rows)
    lines = refusal(path).split("\n")
    assert [line.split(": ")[0] for line in lines[:20]] == [f"rows.jsonl:{n}" for n in range(4, 24)]
    assert lines[20:] == ["... and 1,280 more bad rows (pass --skip_bad_rows to leave them out)"]
    write(path, rows[:5])
    assert refusal(path).split("\n")[2:] == ["2 bad rows (pass --skip_bad_rows to leave them out)"]


def test_skipping_all_rows_is_an_error(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"sentence": "x", "label": "9"}] * 2)
    text = refusal(path, skip_bad_rows=True)
    assert text.startswith("rows.jsonl: no good row among 2; the first: rows.jsonl:1: label: '9'")


def test_the_error_of_a_row_with_a_whole_document_stays_one_short_line(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"sentence": "x", "label": "long\n" * 10_000}])
    text = refusal(path)
    assert len(text) < 500
    assert "is not in the verbalizer" in text
    assert "\n" not in text


def test_the_template_names_the_splits_and_arguments_override_it(tmp_path):
    for split, count in (("a", 1), ("b", 2), ("c", 3)):
        write(tmp_path / f"{split}.jsonl", [{"question_text": "q", "gold": "g"}] * count)
    template = ask(dataset={"path": str(tmp_path), "train": "a", "eval": "b"})
    assert [len(part.rows) for part in load_splits(template, arguments(), 0)] == [1, 2]
    both = load_splits(template, arguments(train_split="c"), 0)
    assert [len(part.rows) for part in both] == [3, 2]


# Draws


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(1, 60),
    fewer=st.integers(1, 70),
    more=st.integers(1, 70),
    seed=st.integers(0, 2**32),
)
def test_a_smaller_draw_is_the_beginning_of_a_larger_one(
    tmp_path_factory, count, fewer, more, seed
):
    path = write(tmp_path_factory.mktemp("draw") / "rows.jsonl", numbered(count))
    few = load(path, max_samples=min(fewer, more), seed=seed).rows
    many = load(path, max_samples=max(fewer, more), seed=seed).rows
    assert few == many[: len(few)]
    assert len(few) == min(fewer, more, count)
    assert len({row["sentence"] for row in many}) == len(many) == min(max(fewer, more), count)


def test_a_draw_depends_on_nothing_but_seed_and_count(tmp_path):
    path = write(tmp_path / "rows.jsonl", numbered(10))
    without_classes = ask(prompt="{{ sentence }}", answer=" {{ label }}")

    def drawn(template, seed):
        return [row["sentence"][4:] for row in load(path, template, max_samples=5, seed=seed).rows]

    # The places of the five smallest numbers of random.Random(0): 0.844, 0.758, 0.421, 0.259, ...
    assert drawn(without_classes, 0) == ["3", "7", "5", "2", "8"]
    assert drawn(SST2, 0) == ["3", "2", "7", "8", "5"]  # in turn of either class
    assert drawn(SST2, 0) != drawn(SST2, 1)
    assert load(path).rows == numbered(10)


def test_draws_and_held_out_rows_have_the_classes_shares(tmp_path, capsys):
    labels = ["0"] * 60 + ["1"] * 30 + ["2"] * 9 + ["3"]
    rows = [{"sentence": f"row {n}", "label": label} for n, label in enumerate(labels)]
    path = write(tmp_path / "rows.jsonl", rows)
    words = {label: [word] for label, word in zip("0123", "abcd", strict=True)}
    template = PromptTemplate({**SST2.fields, "verbalizer": words})

    def counts(rows):
        return [sum(row["label"] == label for row in rows) for label in words]

    train, evaluation = load_splits(template, arguments(path), 0)
    assert counts(evaluation.rows) == [6, 3, 1, 0]  # its only row stays in training
    assert counts(train.rows) == [54, 27, 8, 1]
    few, _ = load_splits(template, arguments(path, max_train_samples=30), 1)
    assert counts(few.rows) in ([18, 9, 3, 0], [18, 9, 2, 1])
    assert untrained_classes(few, template) in (["3"], [])
    assert counts(load(path, template, max_samples=50).rows)[:2] == [30, 15]


def test_a_file_is_scored_whole_where_nothing_is_trained(tmp_path, capsys):
    path = write(tmp_path / "rows.csv", numbered(20))
    with pytest.raises(UserError, match=r"--eval_split all: .*rows.csv would be trained on and sc"):
        load_splits(SST2, arguments(path, eval_split="all"), 0)
    args = arguments(path, eval_split="all", trains=False, predict=None)
    train, evaluation = load_splits(SST2, args, 0)
    assert train.rows == evaluation.rows == numbered(20)
    assert capsys.readouterr().out == f"{path}: all 20 rows are scored; none is held out\n"
    assert [len(part.rows) for part in load_asked(SST2, args, 0, shots=1)] == [20, 20]


def test_all_rows_of_a_file_are_checked_whatever_is_drawn(tmp_path):
    path = write(tmp_path / "rows.jsonl", [*numbered(50), {"sentence": "x", "label": "9"}])
    assert refusal(path, max_samples=1).startswith("rows.jsonl:51:")
    drawn = load(path, max_samples=3, skip_bad_rows=True)
    assert (len(drawn.rows), drawn.skipped) == (3, 1)


def test_a_draw_of_none_is_an_error(tmp_path):
    path = write(tmp_path / "rows.jsonl", numbered(3))
    assert refusal(path, max_samples=0) == "rows.jsonl: 0 rows asked for; ask for 1 or more"


@pytest.mark.parametrize(("count", "held_out"), [(2, 1), (9, 1), (40, 4), (10_500, 1000)])
def test_a_single_file_is_divided_without_a_shared_row(tmp_path, capsys, count, held_out):
    path = write(tmp_path / "rows.csv", numbered(count))
    train, evaluation = load_splits(SST2, arguments(path), 3)
    trained, scored = ({row["sentence"] for row in part.rows} for part in (train, evaluation))
    assert (len(trained), len(scored)) == (count - held_out, held_out)
    assert not trained & scored
    assert capsys.readouterr().out == (
        f"{path}: {held_out:,} of {count:,} rows are held out of training for evaluation, the same "
        "ones for every seed\n"
    )
    again = load_splits(SST2, arguments(path), 4)
    assert [part.rows for part in again] == [train.rows, evaluation.rows]
    few_train, few_evaluation = load_splits(
        SST2, arguments(path, max_train_samples=5, max_eval_samples=2), 3
    )
    assert {row["sentence"] for row in few_train.rows} <= trained
    assert {row["sentence"] for row in few_evaluation.rows} <= scored


def test_the_seed_draws_training_rows_and_leaves_the_evaluation_rows_alone(tmp_path):
    write(tmp_path / "train.jsonl", numbered(50))
    write(tmp_path / "validation.jsonl", numbered(50))
    for data in (tmp_path, tmp_path / "train.jsonl"):
        few = arguments(data, max_train_samples=10, max_eval_samples=4)
        (train, evaluation), (other_train, other_evaluation) = (
            load_splits(SST2, few, seed) for seed in (1, 2)
        )
        assert train.rows != other_train.rows
        assert evaluation.rows == other_evaluation.rows


def test_one_row_cannot_be_divided(tmp_path):
    path = write(tmp_path / "rows.jsonl", numbered(1))
    with pytest.raises(UserError, match="one row cannot be both trained on and held out"):
        load_splits(SST2, arguments(path), 0)


def test_one_split_for_both_is_divided(tmp_path):
    write(tmp_path / "train.jsonl", numbered(20))
    train, evaluation = load_splits(SST2, arguments(tmp_path, eval_split="train"), 0)
    assert (len(train.rows), len(evaluation.rows)) == (18, 2)
    assert overlap(train, evaluation, SST2) == 0


def test_overlap_counts_evaluation_rows_that_ask_what_a_training_row_asks(tmp_path):
    train = load(write(tmp_path / "a.jsonl", numbered(4, id=1)))
    seen = [{"sentence": "row 1", "label": "0", "id": 2}] * 2
    evaluation = load(
        write(tmp_path / "b.jsonl", [*seen, {"sentence": "Row 1", "label": "0", "id": 1}])
    )
    assert overlap(train, evaluation, SST2) == 2


# Small things


def test_columns_are_pairs():
    assert parse_columns(["text=sentence", "label=a=b c"]) == {"text": "sentence", "label": "a=b c"}
    assert parse_columns([]) == {}


@pytest.mark.parametrize("item", ["text", "text=", "=sentence", "te xt=a", ""])
def test_columns_that_are_no_pairs_are_an_error(item):
    with pytest.raises(UserError, match=rf"--columns {item}: write variable=column"):
        parse_columns([item])


def test_a_variable_has_one_column():
    with pytest.raises(UserError, match="text stands twice"):
        parse_columns(["text=a", "text=b"])


def test_without_a_named_evaluation_split_usual_names_are_taken_else_rows_are_held_out(
    tmp_path, capsys
):
    template = ask(dataset={"path": "someone/rows", "train": "train"})
    rows = [{"question_text": f"q{number}", "hint": "", "gold": "g"} for number in range(20)]
    write(tmp_path / "train.jsonl", rows)
    train, evaluation = load_splits(template, arguments(tmp_path), 0)
    assert (len(train.rows), len(evaluation.rows)) == (18, 2)
    capsys.readouterr()
    write(tmp_path / "test.jsonl", rows[:4])
    assert len(load_splits(template, arguments(tmp_path), 0)[1].rows) == 2
    assert "; the split 'test' is not read: --eval_split test scores" in capsys.readouterr().out
    load_splits(template, arguments(tmp_path / "train.jsonl"), 0)
    assert f"; test beside it is not read: pass the folder, {tmp_path}" in capsys.readouterr().out
    load_splits(template, arguments(tmp_path / "train.jsonl", eval_split="dev"), 0)
    assert "; a file has no split 'dev'" in capsys.readouterr().out
    for name in ("eval", "dev", "val", "valid", "validation"):  # each goes before those before
        row = {"question_text": name, "hint": "", "gold": "g"}
        write(tmp_path / f"{name}.jsonl", [row])
        train, evaluation = load_splits(template, arguments(tmp_path), 0)
        assert len(train.rows) == 20
        assert evaluation.rows == [row]
    assert len(load_splits(template, arguments(tmp_path, eval_split="test"), 0)[1].rows) == 4
    alone = tmp_path / "alone"
    alone.mkdir()
    (tmp_path / "dev.jsonl").rename(alone / "dev.jsonl")
    assert len(load_asked(template, arguments(alone, predict=None), 0, shots=0)[1].rows) == 1
