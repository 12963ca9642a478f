"""A task is scored by its own template and budget unless others are named, and its evaluation rows
are what the loss is followed on.
"""

from types import SimpleNamespace

import pytest
from quick_runs import write_rows
from row_files import arguments
from tiny_task import plain
from tokenizers_for_tests import tokenizer_for

from recipelib.cli import RecipeArguments
from recipelib.data.rows import Rows
from recipelib.encoding.examples import encode_rows
from recipelib.encoding.prompt_encoder import PromptEncoder
from recipelib.evaluation.scores import TaskScore
from recipelib.prompts.template import PromptTemplate
from recipelib.runtime import Store
from recipelib.runtime.errors import UserError
from recipelib.task import task as one_task
from recipelib.task.task import Task, load_rows_of, load_task

ROWS = [{"sentence": f"film {number}", "label": "positive"} for number in range(3)]


@pytest.fixture
def task():
    encoder = PromptEncoder(PromptTemplate.load("movie_reviews"), tokenizer_for("gpt2"), 100)
    return Task(
        encoder=encoder,
        train=Rows(ROWS, "train.jsonl", skipped=2),
        evaluation=Rows(ROWS[:2], "eval.jsonl"),
        model_name="a model",
        budget={"max_new_tokens": 7, "batch_tokens": 90},
    )


def test_scoring_asks_by_the_tasks_template_within_its_budget_and_says_how_it_went(
    task, monkeypatch, capsys
):
    asked = []

    def evaluate(model, encoder, rows, **options):
        asked.append((encoder.template.name, rows, options))
        return TaskScore("accuracy", 0.5, 0.1, rows=2)

    monkeypatch.setattr(one_task, "evaluate_task", evaluate)
    assert task.score("a model", "base model").score == 0.5
    assert capsys.readouterr().out == "base model: accuracy 0.500 ± 0.100 (2 rows)\n"
    task.score("a model", "by other words", template=PromptTemplate.load("sst2"), samples=3,
               batch_tokens=5)  # fmt: skip
    budget = {"max_new_tokens": 7, "batch_tokens": 90}
    assert asked == [
        ("movie_reviews", ROWS[:2], {"description": "scoring base model", **budget}),
        (
            "sst2",
            ROWS[:2],
            {"description": "scoring by other words", **budget, "samples": 3, "batch_tokens": 5},
        ),
    ]


def test_evaluation_rows_that_do_not_fit_are_called_so(task):
    task.encoder = PromptEncoder(task.template, task.tokenizer, 3)
    with pytest.raises(UserError, match="--max_length 3: no evaluation row fits; raise it"):
        task.held_out()


def test_the_loss_is_followed_on_the_evaluation_rows_as_they_are_trained(task):
    assert plain(task.held_out()) == plain(encode_rows(task.encoder, ROWS[:2]).examples)
    other = task.encoder.with_template(task.template.with_instruction("Be brief."))
    task.trained = [task.encoder, other]
    both = [encode_rows(encoder, ROWS[:2]).examples for encoder in task.trained]
    assert plain(task.held_out()) == plain(both[0]) + plain(both[1])


def test_what_a_run_shows_and_keeps_of_a_task(task):
    assert task.templates == [task.template]
    assert task.sources == {"train": "train.jsonl", "eval": "eval.jsonl"}
    assert task.skipped_rows == 2
    assert task.tokenizer is task.encoder.text.tokenizer


@pytest.mark.parametrize("trains", [True, False])
def test_classes_that_are_never_trained_are_named_in_a_warning(tmp_path, capsys, trains):
    write_rows(tmp_path / "train.jsonl", ROWS)
    write_rows(tmp_path / "val.jsonl", [{"sentence": "a film", "label": "negative"}])
    template = PromptTemplate.load("movie_reviews")
    args = arguments(tmp_path, streaming=False, trains=trains)
    _, evaluation = load_rows_of(template, args, SimpleNamespace(seed=0), Store())
    assert evaluation.source.endswith("val.jsonl")
    said = "warning: movie_reviews: no training row has the class 'negative'"
    assert (said in capsys.readouterr().out) == trains


def test_content_free_texts_that_a_template_cannot_take_are_refused_with_the_rows(tmp_path):
    fields = {"name": "t", "form": "generative", "prompt": "{{ question.stem }}", "label": "label"}
    fields |= {"verbalizer": {"a": ["x"], "b": ["y"]}, "content_free": ["N/A"]}
    rows = [{"question": {"stem": "why"}, "label": label} for label in "abab"]
    args = arguments(write_rows(tmp_path / "rows.jsonl", rows), streaming=False)
    with pytest.raises(UserError, match=r"t.yaml: content_free: 'N/A' stands in .* no attribute"):
        load_rows_of(PromptTemplate(fields, "t.yaml"), args, SimpleNamespace(seed=0), Store())


def test_rows_are_answered_on_the_command_line_and_not_by_training():
    with pytest.raises(UserError, match=r"--predict: is for the command line; .*answer_file"):
        load_task(RecipeArguments(predict="rows.jsonl"), None)
