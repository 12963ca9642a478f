"""The benchmark of pipelines."""

import json
from pathlib import Path
from types import SimpleNamespace

import measuring
import pipeline
import pytest
from tiny_llama import save_tiny_llama, tiny_llama

from recipelib.models import load_tokenizer
from recipelib.runtime import UserError

QUICK = ["--quick", "--length", "16"]


class Runs(list):
    """Stands in for launches: what each was given; its metrics are made up.

    Attributes:
        tokens: of a run, by the recipe; else a number that all have.
    """

    def __init__(self):
        super().__init__()
        self.tokens = {}

    def __call__(self, recipe, options, config=None, processes=1) -> dict:
        self.append(SimpleNamespace(recipe=recipe, config=config, processes=processes, **options))
        number, parts = len(self), options.get("micro_batches", 1)
        return {
            "train_tokens": self.tokens.get(recipe, 960),
            "tokens_per_second": 100 * number,
            "peak_memory_bytes": 2**30 * (1 + number),
            "train_seconds": 10 - number,
            "bubble": 1 / (parts + 1),
            "idle_fraction": 1 / (parts + 1) + number / 100,
        }


@pytest.fixture
def runs(monkeypatch) -> Runs:
    found = Runs()
    monkeypatch.setattr(pipeline, "launch_recipe", found)
    return found


def rows_of_a_step(run) -> int:
    """As the recipe makes them."""
    if run.recipe == "gpipe_sft":
        return run.per_device_train_batch_size * run.micro_batches
    return run.per_device_train_batch_size * run.gradient_accumulation_steps * run.processes


def test_all_parts_are_in_the_last_line(runs, model_folder, tmp_path, capsys):
    figure = tmp_path / "new" / "bubble.png"
    words = [*QUICK, "--model_name_or_path", str(model_folder), "--figure", str(figure)]
    returned = pipeline.main(words)
    shown = capsys.readouterr().out
    result = json.loads(shown.splitlines()[-1])
    assert result == returned
    assert [*result][:4] == ["ratio", *pipeline.PARTS]
    speed = result["speed"]
    rates = [speed[arm]["tokens_per_second"] for arm in ("pipeline", "FSDP2")]
    assert result["ratio"] == speed["ratio"] == rates[0] / rates[1]
    assert {*result["memory"]} == {"tied", "untied"}
    assert [*result["memory"]["tied"]] == [*pipeline.MEMORY]
    assert [one["theory"] for one in result["bubble"].values()] == [1 / 2, 1 / 5, 1 / 17]
    assert (result["length"], result["rounds"], result["steps"]) == (16, 1, 2)
    assert figure.read_bytes().startswith(b"\x89PNG")
    for title in ("head tied, 8 micro-batches", "head untied", "Two stages, LoRA", "over two proc"):
        assert title in shown
    # One process is what others are held against, recomputing where they do.
    assert "6.00 GiB" in shown
    assert [line.split("│")[-2].strip() for line in shown.splitlines() if "│ one" in line] == [
        "1.00"
    ] * 4


def test_runs_that_are_compared_have_the_same_rows_in_a_step(runs, model_folder):
    pipeline.main([*QUICK, "--model_name_or_path", str(model_folder)])
    compared = {
        8: [run for run in runs if getattr(run, "peft", None) is None],
        16: [run for run in runs if getattr(run, "peft", None) == "lora"],
    }
    assert [len(some) for some in compared.values()] == [2 * len(pipeline.MEMORY) + 2, 3]
    for rows, some in compared.items():
        assert {rows_of_a_step(run) for run in some} == {rows}
    assert {(run.config, run.processes) for run in runs} == {
        *((None, 1), ("pipeline", 2), ("fsdp2", 2))
    }


def test_of_several_rounds_the_least_disturbed_counts(runs):
    words = ["--parts", "bubble", "speed", "--rounds", "2", "--steps", "1"]
    result = pipeline.main(words)
    assert [*result["bubble"]] == ["1", "2", "4", "8", "16"]
    assert result["bubble"]["1"]["measured"] == pytest.approx(1 / 2 + 1 / 100)
    assert result["bubble"]["1"]["seconds"] == 10 - 6  # of the second round
    assert result["speed"]["pipeline"]["tokens_per_second"] == 100 * 13
    assert len(runs) == 2 * (5 + 2)


@pytest.mark.parametrize("part", ["memory", "speed", "bubble"])
def test_without_speed_there_is_no_ratio(runs, model_folder, part):
    model = ["--model_name_or_path", str(model_folder)]
    assert ("ratio" in pipeline.main([*QUICK, *model, "--parts", part])) == (part == "speed")


def test_runs_on_other_tokens_end_the_comparison(runs):
    runs.tokens["instruction_sft"] = 7
    with pytest.raises(pipeline.RunFailed, match="FSDP2: was trained on other tokens than the fir"):
        pipeline.main([*QUICK, "--parts", "speed"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--length", "15"], "--length 15: must be 16 or more"),
        (["--rounds", "0"], "--rounds 0: must be 1 or more"),
        (["--steps", "0"], "--steps 0: must be 1 or more"),
        (["--figure", "a.png", "--parts", "speed"], "--figure: shows the bubble; add bubble to"),
        (["--figure", f"{Path(__file__)}/a.png"], "--figure .*: Not a directory|File exists"),
    ],
)
def test_a_mistake_is_said_before_anything_runs(runs, words, said):
    with pytest.raises(UserError, match=said):
        pipeline.main(words)
    assert runs == []


def test_a_head_of_its_own_stays(tmp_path):
    folder = save_tiny_llama(tmp_path / "model", tie_word_embeddings=False)
    args = SimpleNamespace(model_name_or_path=str(folder))
    assert pipeline.heads(args, tmp_path / "untied") == {"untied": str(folder)}
    assert not (tmp_path / "untied").exists()


def test_a_run_fills_its_rows(here, tmp_path):
    # Of the bundled model's tokenizer, in which each word is a token.
    tokenizer = load_tokenizer()
    tokenizer.save_pretrained(tmp_path / "model")
    tiny_llama(len(tokenizer)).save_pretrained(tmp_path / "model")
    args = SimpleNamespace(model_name_or_path=str(tmp_path / "model"), length=60, steps=1)
    pipeline.write_rows(tmp_path / "data", args)
    metrics = pipeline.pipeline(args, tmp_path, **pipeline.ONE_ROW)
    assert metrics["train_tokens"] == pipeline.ROWS * args.length
    assert metrics["padding_fraction"] == 0
    (command,) = here
    assert str(measuring.ROOT / "accelerate_configs" / "pipeline.yaml") in command
