"""What recipes leave in a folder: twice in the same one, after one another, and in each other's
hands.
"""

import re
import shutil
from pathlib import Path

import icl_eval
import pytest
import torch
from quick_runs import (
    RECIPES,
    REVIEWS,
    SUMS,
    TRAINING,
    make_place,
    parsed,
    run,
    write_rows,
)
from recipe_runs import without_slow_parts
from run_files import losses, read_json, read_jsonl
from safetensors.torch import load_file
from tiny_llama import save_tiny_llama

from recipelib.adapters import load_tuned, merge_adapter
from recipelib.reporting import answer_file
from recipelib.runtime import UserError

# What a run can leave, and the recipe and options that make it.
KINDS = {
    "lora": ("lora_sft", {}),
    "pissa": ("lora_sft", {"pissa": True}),
    "adapters": ("adapter_sft", {}),
    "dropped adapters": ("adapter_sft", {"drop_adapters_below": 1}),
    "soft prompt": ("prompt_tuning", {}),
    "prefix": ("prompt_tuning", {"tune": "prefix"}),
    "soft verbalizer": ("prompt_tuning", {"soft_verbalizer": True}),
    "cloze": ("cloze_sft", {}),
    "cloze with a prompt": ("cloze_sft", {"soft_prompt": True, "virtual_tokens": 4}),
    "masked prompt": ("prompt_tuning", {"model_name_or_path": "MASKED"}),
    "masked cloze": ("cloze_sft", {"model_name_or_path": "MASKED"}),
    "draws": ("cloze_sft", {"per_class": 1, "draws": 2}),
    "instructions": ("instruction_sft", {}),
    "two tasks": ("instruction_sft", {"template": ["movie_reviews=REVIEWS", "word_problems=SUMS"]}),
    "conversations": ("instruction_sft", {"template": ["conversations=CHATS"], "lora": True}),
    "reasoning": ("cot_sft", {"samples": 2, "max_new_tokens": 6}),
    "reasoning, all": ("cot_sft", {"full": True, "max_new_tokens": 6}),
    "frozen": ("transfer_learning", {}),
    "frozen, adapters": ("transfer_learning", {"peft": "lora", "head": "classifier"}),
    "features": ("transfer_learning", {"mode": "features"}),
    "pipeline": ("gpipe_sft", {}),
    "pipeline, lora": ("gpipe_sft", {"peft": "lora"}),
    # Nothing is trained.
    "scored": ("cloze_sft", {"score_only": True}),
    "demonstrations": ("icl_eval", {}),
}
SCORED = ["scored", "demonstrations"]
TRAINED = [kind for kind in KINDS if kind not in SCORED]
# One for each recipe.
PLAIN = {recipe: kind for kind, (recipe, _) in reversed(KINDS.items()) if kind not in SCORED}
IDS = torch.tensor([[5, 17, 12, 9, 7]])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    with without_slow_parts():
        yield make_place(tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="module")
def questions(place):
    """The evaluation rows of both tasks, without their answers."""
    rows = [
        {"sentence": review["sentence"], "question": one["question"]}
        for review, one in zip(REVIEWS[5:], SUMS[6:], strict=True)
    ]
    return write_rows(place.model.parent / "questions.jsonl", rows)


@pytest.fixture(scope="module")
def run_kind(place):
    """Makes a kind's result in a folder."""

    def placed(value):
        if isinstance(value, list):
            return [placed(item) for item in value]
        name = re.search(r"[A-Z]+$", value) if isinstance(value, str) else None
        return value[: name.start()] + str(getattr(place, name[0].lower())) if name else value

    def start(kind: str, folder: Path, **more) -> Path:
        recipe, options = KINDS[kind]
        options = {name: placed(value) for name, value in options.items()}
        return run(recipe, place, folder, **{**options, **more})

    return start


@pytest.fixture(scope="module")
def left(run_kind, tmp_path_factory):
    """The folder of each kind's result, made once: to be read or copied."""
    folders: dict[str, Path] = {}

    def folder_of(kind: str) -> Path:
        if kind not in folders:
            folders[kind] = run_kind(kind, tmp_path_factory.mktemp("left") / "out")
        return folders[kind]

    return folder_of


def files(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


def results(folder: Path) -> list[Path]:
    """The folders of the trained results: of several draws theirs."""
    return sorted(folder.glob("draw_*")) or [folder]


def measured(metrics: dict) -> dict:
    """Figures without what they took, which no two runs share."""
    took = re.compile("seconds|_bytes|_per_second|idle_fraction")
    return {
        key: measured(value) if isinstance(value, dict) else value
        for key, value in metrics.items()
        if not took.search(key)
    }


def assert_same(folder: Path, expected: Path) -> None:
    """That a folder holds exactly what another run with the same options left elsewhere."""
    assert files(folder) == files(expected)
    for name in files(expected):
        ours, theirs = folder / name, expected / name
        if name.endswith(".safetensors"):
            first, second = load_file(ours), load_file(theirs)
            assert first.keys() == second.keys(), name
            for key in first:
                assert torch.allclose(first[key], second[key], atol=1e-6), f"{name}: {key}"
        elif name.endswith((".yaml", ".jsonl", ".jinja")) or "tokenizer" in name:
            assert ours.read_text() == theirs.read_text(), name
        elif name.endswith("trainer_state.json"):
            assert losses(ours.parent) == losses(theirs.parent)
        elif name.endswith("metrics.json"):
            assert measured(read_json(ours)) == measured(read_json(theirs))


def said(folder: Path, kind: str = "") -> list:
    """What predictions say of the rows with reviews, or with sums where no other are asked: the
    score of each label, or what was written.
    """
    records = read_jsonl(folder / f"predictions{kind}.jsonl")
    values = [
        record.get("log_likelihoods") or record.get("scores") or record["generated"]
        for record in records
        if record.get("task", "movie_reviews") == "movie_reviews"
    ]
    if isinstance(values[0], str):
        return values
    return torch.tensor([[*scores.values()] for scores in values])


def assert_says_the_same(folder: Path, kind: str) -> None:
    """That predictions_KIND.jsonl says what the run itself said of the same rows."""
    ours, theirs = said(folder, kind), said(folder)
    if isinstance(ours, list):
        assert ours == theirs
    else:
        assert torch.allclose(ours, theirs, atol=1e-5)


# Twice in a folder ------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", TRAINING)
def test_a_second_run_in_a_folder_leaves_what_it_would_leave_anywhere(
    recipe, run_kind, left, questions, place, tmp_path
):
    kind, folder = PLAIN[recipe], tmp_path / "out"
    run_kind(kind, folder, seed=7, max_steps=3, save_strategy="steps", save_steps=1)
    assert (folder / "checkpoint-3").exists()
    answer_file(*parsed(recipe, place, output_dir=str(folder), predict=str(questions)))
    (folder / "samples.jsonl").write_text("of the first run")
    run_kind(kind, folder)
    assert_same(folder, left(kind))


@pytest.mark.parametrize("kind", SCORED)
def test_a_second_score_in_a_folder_leaves_what_it_would_leave_anywhere(
    kind, run_kind, left, place, tmp_path
):
    folder = shutil.copytree(left("demonstrations"), tmp_path / "out")
    assert (folder / "confusion.png").exists()
    run_kind(kind, folder)
    assert_same(folder, left(kind))
    sums = {"template": "word_problems", "dataset": str(place.sums)}
    answers = run("icl_eval", place, tmp_path / "answers", **sums)
    assert_same(run("icl_eval", place, folder, **sums), answers)


# After one another ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def full_house(left, place, tmp_path_factory):
    """A folder in which every kind has left its result, and the tools theirs: the worst that a run
    can meet.
    """
    folder = tmp_path_factory.mktemp("house") / "out"
    for kind in KINDS:
        shutil.copytree(left(kind), folder, dirs_exist_ok=True)
    merge_adapter(str(left("lora")), str(folder / "merged"))
    (folder / "draw_7" / "checkpoint-2").mkdir(parents=True)
    (folder / "predictions_mine.jsonl").write_text("{}\n")
    (folder / "partial").mkdir()
    (folder / "partial" / "process-0.jsonl").write_text("")  # icl_eval.py was interrupted
    shutil.copy(left("lora") / "metrics.json", folder)
    return folder


@pytest.mark.parametrize("kind", TRAINED)
def test_nothing_of_another_recipes_run_passes_for_this_ones(
    kind, run_kind, left, full_house, place, questions, tmp_path, monkeypatch
):
    folder = run_kind(kind, shutil.copytree(full_house, tmp_path / "out"))
    assert_same(folder, left(kind))
    recipe, _ = KINDS[kind]
    for result in results(folder):
        code = (result / "README.md").read_text().split("```python\n")[1].split("```")[0]
        monkeypatch.syspath_prepend(result)  # where peft_bottleneck.py lies
        monkeypatch.chdir(tmp_path)
        scope = {}
        exec(code, scope)
        if kind == "features":  # a small model, of which --predict below is told
            assert scope["probe"].kind == "logistic"
            answer_file(*parsed(recipe, place, output_dir=str(result), predict=str(questions)))
            assert_says_the_same(result, "_questions")
            continue
        tuned = load_tuned(result, read_json(result / "metrics.json"))
        with torch.no_grad():
            loaded, expected = (
                model.eval()(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
                for model in (scope["model"], tuned)
            )
        assert torch.allclose(loaded, expected, atol=1e-6)
        if kind == "conversations":
            continue
        more = {"model_name_or_path": None}  # but the one that it was trained on
        if kind == "two tasks":
            more["template"] = ["movie_reviews"]
        answer_file(*parsed(recipe, place, output_dir=str(result), predict=str(questions), **more))
        assert_says_the_same(result, "_questions")


@pytest.mark.parametrize("kind", SCORED)
@pytest.mark.parametrize("trained", ["lora", "draws", "instructions"])
def test_a_score_is_not_written_over_a_trained_run(kind, trained, run_kind, left, tmp_path):
    folder = shutil.copytree(left(trained), tmp_path / "out")
    with pytest.raises(UserError, match="holds a trained run; name another"):
        run_kind(kind, folder)
    assert files(folder) == files(left(trained))


def test_the_model_that_is_trained_is_not_cleared_away_with_an_earlier_run(
    run_kind, left, tmp_path
):
    folder = shutil.copytree(left("lora"), tmp_path / "out")
    merged = merge_adapter(str(folder), str(folder / "merged"))
    before = load_file(merged / "model.safetensors")
    run_kind("adapters", folder, model_name_or_path=str(merged))
    after = load_file(merged / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert load_tuned(folder, read_json(folder / "metrics.json"))


# In each other's hands --------------------------------------------------------------------------


def line_of(call) -> str | None:
    """The one line that a call ends in; None where it does what it should."""
    try:
        call()
    except UserError as error:
        line = str(error)
        assert line.strip()
        assert "\n" not in line
        return line
    return None


def refusal_of(kind: str, recipe: str) -> str | None:
    """What a recipe says that is asked to answer rows with what a kind has left."""
    if recipe == "icl_eval":
        return None if kind in SCORED else "holds a trained run; name another"
    if kind in SCORED or kind == "draws":
        return "holds no trained result"
    if kind == "conversations":
        return "no column 'messages'; the columns are"
    if kind == "two tasks" and recipe == "instruction_sft":
        return "the run has movie_reviews, word_problems; name the one to answer with"
    return None


# Every recipe meets one result of each; further ones meet those that differ in what they ask.
ASKED = [
    (kind, recipe)
    for kind in KINDS
    for recipe in RECIPES
    if kind in [*PLAIN.values(), *SCORED] or recipe in ("lora_sft", "instruction_sft", "cot_sft")
]


@pytest.mark.parametrize(("kind", "recipe"), ASKED)
def test_a_recipe_answers_rows_with_what_another_left_or_says_in_a_line_why_not(
    kind, recipe, left, place, questions, tmp_path
):
    folder = shutil.copytree(left(kind), tmp_path / "out")
    options = {"output_dir": str(folder), "predict": str(questions)}
    # Not as on the command line of the run: what an adapter needs it says itself.
    more = {"dataset": None, **({} if recipe == "icl_eval" else {"model_name_or_path": None})}
    if recipe == "instruction_sft":
        more["template"] = []
    args, training = parsed(recipe, place, **options, **more)
    call = icl_eval.main if recipe == "icl_eval" else answer_file
    line, expected = line_of(lambda: call(args, training)), refusal_of(kind, recipe)
    assert (line is None) == (expected is None), line
    if expected:
        assert expected in line
        assert not (folder / "predictions_questions.jsonl").exists()
    elif recipe == "icl_eval":
        assert len(read_jsonl(folder / "predictions_questions.jsonl")) == 3
    elif not (kind == "two tasks" and recipe == "cot_sft"):  # whose template is the other task
        assert_says_the_same(folder, "_questions")


@pytest.mark.parametrize("kind", KINDS)
def test_demonstrations_stand_before_every_adapter_or_a_line_says_why_not(
    kind, left, place, tmp_path
):
    adapter, out = shutil.copytree(left(kind), tmp_path / "adapter"), tmp_path / "out"
    options = {"adapter": str(adapter), "output_dir": str(out), "model_name_or_path": None}
    options |= {"template": "movie_reviews", "rendering": "text"}  # and not that of its run
    ask = parsed("icl_eval", place, **options, shots=0)
    line = line_of(lambda: icl_eval.main(*ask))
    if kind == "soft verbalizer":
        assert "was trained with --soft_verbalizer, whose labels have no words" in line
    elif not (adapter / "adapter_config.json").exists():
        assert "no adapter_config.json, so no adapter; a whole model goes to" in line
    elif "classifier" in KINDS[kind][1].values():
        assert "does not fit the model (it was trained with a classification head" in line
    else:
        assert line is None
        records = read_jsonl(out / "predictions.jsonl")
        asked = torch.tensor([[*record["scores"]["sum"].values()] for record in records])
        if "log_likelihoods" in read_jsonl(adapter / "predictions.jsonl")[0]:
            assert torch.allclose(asked, said(adapter), atol=1e-4)


@pytest.mark.parametrize("kind", ["lora", "adapters", "soft prompt", "prefix", "masked prompt"])
def test_an_adapter_on_another_model_than_its_own_is_one_line(
    kind, left, place, questions, tmp_path
):
    wider = save_tiny_llama(tmp_path / "wider", 48)
    # Wider ones, and of the same width a causal one for a masked one, or the other way around.
    for model in (wider, place.model if kind == "masked prompt" else place.masked):
        options = {"model_name_or_path": str(model)}
        ask = {**options, "adapter": str(left(kind)), "output_dir": str(tmp_path / "out")}
        line = line_of(lambda ask=ask: icl_eval.main(*parsed("icl_eval", place, **ask)))
        assert "does not fit" in line
        folder = shutil.copytree(left(kind), tmp_path / "asked", dirs_exist_ok=True)
        asked = {**options, "output_dir": str(folder), "predict": str(questions)}
        line = line_of(lambda asked=asked: answer_file(*parsed("lora_sft", place, **asked)))
        assert "does not fit" in line
