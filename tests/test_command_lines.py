"""Every recipe as a script: what its command line says before anything is trained."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RECIPES = [
    file.stem
    for file in sorted((ROOT / "recipes").glob("*.py"))
    if "run_recipe(" in file.read_text(encoding="utf-8")
]
TEMPLATES = {"cot_sft": "gsm8k", "instruction_sft": "movie_reviews"}


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs a recipe as `python recipes/RECIPE.py` would; gives its exit code and what it says."""

    def command(recipe: str, *argv: object) -> tuple[int, str, str]:
        words = [str(word) for word in argv]
        monkeypatch.setattr(sys, "argv", [f"{recipe}.py", *words])
        capsys.readouterr()
        try:
            runpy.run_path(str(ROOT / "recipes" / f"{recipe}.py"), run_name="__main__")
            code = 0
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return command


def error(err: str) -> str:
    """The one line in what was written to stderr, progress aside, that says what is wrong."""
    (line,) = [line for line in err.splitlines() if line.startswith("error")]
    return line


def test_there_are_recipes_to_check():
    assert {"lora_sft", "adapter_sft", "cloze_sft", "icl_eval"} < set(RECIPES)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_bad_row_ends_in_one_line_before_any_model_is_loaded(
    recipe, command, causal_model, tmp_path, monkeypatch
):
    monkeypatch.setattr("recipelib.models.loading.load_pretrained", None)
    bad = tmp_path / "bad.jsonl"
    if recipe == "cot_sft":
        bad.write_text('{"question": "1 and 1?", "answer": "2\\n#### 2"}\n{"question": "?"}\n')
        said = f"{bad}:2: "
    else:
        bad.write_text('{"sentence": "fine", "label": "positive"}\n{"sentence": "", "label": 7}\n')
        said = f"{bad}:2: label: 7 is not in the verbalizer"
    options = ["--dataset", bad, "--model_name_or_path", causal_model]
    options += ["--template", TEMPLATES.get(recipe, "movie_reviews"), "--eval_split", "train"]
    code, _, err = command(recipe, *options, "--output_dir", tmp_path / "out")
    assert code == 2
    assert said in error(err)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("recipe", RECIPES)
def test_preview_shows_rows_and_loads_no_model(
    recipe, command, causal_model, reviews, sums, tmp_path, monkeypatch
):
    monkeypatch.setattr("recipelib.models.loading.load_pretrained", None)
    options = ["--model_name_or_path", causal_model, "--preview", "1"]
    options += ["--template", TEMPLATES.get(recipe, "movie_reviews")]
    options += ["--dataset", sums if recipe == "cot_sft" else reviews]
    code, out, err = command(recipe, *options, "--output_dir", tmp_path / "out")
    assert code == 0, err
    assert ("pens and" if recipe == "cot_sft" else "film, number") in out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_mistake_does_not_cost_the_finished_run_in_the_folder(
    recipe, command, causal_model, reviews, sums, tmp_path
):
    without_weights, folder = tmp_path / "model", tmp_path / "out"
    shutil.copytree(causal_model, without_weights, ignore=lambda *_: ["model.safetensors"])
    (folder / "checkpoint-2").mkdir(parents=True)
    (folder / "checkpoint-2" / "trainer_state.json").write_text("{}")
    (folder / "metrics.json").write_text('{"trainable_parameters": 7}')
    (folder / "samples.jsonl").write_text("")
    (folder / "model.safetensors").write_text("weights")
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    options = ["--template", TEMPLATES.get(recipe, "movie_reviews"), "--output_dir", folder]
    options += ["--dataset", sums if recipe == "cot_sft" else reviews]
    code, _, err = command(recipe, *options, "--model_name_or_path", without_weights)
    assert code == 2
    trains = recipe not in ("icl_eval", "search_label_words")
    assert ("no weights" if trains else "holds a trained run; name another") in error(err)
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*")} == before


TRAINING = [recipe for recipe in RECIPES if recipe not in ("icl_eval", "search_label_words")]


@pytest.mark.parametrize("recipe", TRAINING)
def test_predict_asks_for_a_trained_result(recipe, command, questions, tmp_path):
    code, _, err = command(recipe, "--predict", questions, "--output_dir", tmp_path / "out")
    assert code == 2
    assert error(err).endswith("out: holds no trained result; train one first")


@pytest.mark.parametrize("recipe", TRAINING)
def test_from_python_predict_names_what_to_call(recipe, questions, tmp_path):
    from recipelib.cli import arguments
    from recipelib.runtime import UserError

    module = __import__(recipe)
    options = {"predict": questions, "output_dir": tmp_path / "out"}
    with pytest.raises(UserError, match=r"call answer_file\(args, training\) of recipelib.report"):
        module.main(*arguments(module, **options))


@pytest.mark.parametrize(
    ("recipe", "argv", "said"),
    [
        ("lora_sft", ["--merge", "true"], "--merge: has moved; run 'python recipes/merge.py OUT"),
        ("lora_sft", ["--merge"], "--merge: has moved; run 'python recipes/merge.py OUTPUT_DIR'"),
        ("cot_sft", ["--merge=true"], "--merge: has moved; run 'python recipes/merge.py OUTPUT_D"),
        ("prompt_tuning", ["--tune", "model"], "--tune model: has moved; run recipes/cloze_sft.py"),
        ("prompt_tuning", ["--tune=model"], "--tune model: has moved; run recipes/cloze_sft.py"),
        (
            "prompt_tuning",
            ["--tune", "both"],
            "has moved; run recipes/cloze_sft.py --soft_prompt t",
        ),
        ("prompt_tuning", ["--tune=none"], "has moved; run recipes/cloze_sft.py --score_only true"),
        ("prompt_tuning", ["--search_label_words", "true"], "run recipes/search_label_words.py"),
        ("prompt_tuning", ["--search-label-words"], "run recipes/search_label_words.py"),
    ],
)
def test_a_moved_option_ends_in_one_line_that_names_the_new_place(recipe, argv, said, command):
    code, out, err = command(recipe, "--template", "sst2", *argv)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert said in error(err)


@pytest.mark.parametrize(
    ("recipe", "given", "said"),
    [
        ("lora_sft", {"merge": True}, "merge: has moved; run 'python recipes/merge.py OUTPUT_DIR'"),
        ("prompt_tuning", {"tune": "model"}, "tune model: has moved; run recipes/cloze_sft.py"),
    ],
)
def test_a_moved_option_in_a_config_ends_so_too(recipe, given, said, command, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(json.dumps(given))
    code, _, err = command(recipe, "--config", config)
    assert code == 2
    assert error(err).startswith(f"error: {config}: {said}")


def test_what_an_option_means_elsewhere_is_not_taken_for_one_that_moved(command, questions):
    # adapter_sft.py has no --tune, and prompt_tuning.py's --tune has values that stay.
    _, _, err = command("adapter_sft", "--tune", "model")
    assert "unknown argument --tune" in error(err)
    _, _, err = command("prompt_tuning", "--tune", "prefix", "--predict", questions)
    assert "has moved" not in error(err)
