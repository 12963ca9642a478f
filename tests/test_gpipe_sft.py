"""recipes/gpipe_sft.py run whole in one process; tests/pipeline launches it in several."""

import json
import shutil
from pathlib import Path

import gpipe_sft
import lora_sft
import pytest
import torch
from quick_runs import write_rows
from recipe_runs import changed, watched_training
from run_files import losses, read_json
from safetensors.torch import load_file, save_file
from tiny_bert import save_tiny_bert
from tiny_llama import save_tiny_llama
from transformers import AutoConfig

from recipelib.cli import arguments
from recipelib.encoding import Counts
from recipelib.pipeline import Stages
from recipelib.runtime import UserError
from recipelib.training import RecipeConfig

QUICK = {"micro_batches": 4, "per_device_train_batch_size": 1}
QUICK |= {"max_steps": 4, "learning_rate": 5e-3}
SAVING = {"save_strategy": "steps", "save_steps": 2}


@pytest.fixture
def run(runs):
    """Runs the recipe; gives the output folder."""
    return runs(gpipe_sft, **QUICK)


@pytest.fixture(scope="module")
def finished(start, tmp_path_factory):
    """Gives the folder of a run of all parameters, or of LoRA, that left checkpoints 2 and 4."""
    folders = {}

    def of(peft=None):
        if peft not in folders:
            folder = tmp_path_factory.mktemp("gpipe") / "out"
            folders[peft] = start(gpipe_sft, folder, **QUICK, **SAVING, peft=peft)
        return folders[peft]

    return of


def line_of(error) -> str:
    """The one line that a mistake ends in."""
    line = str(error.value)
    assert line.strip()
    assert "\n" not in line
    return line


def test_all_parameters_are_trained_unless_adapters_are_asked_for(run):
    with watched_training() as seen:
        run()
    assert changed(seen) == seen.before.keys()
    with watched_training() as seen:
        run(peft="lora", output="lora")
    assert changed(seen) == {name for name in seen.before if ".lora_" in name}


def test_the_rank_and_the_scale_are_those_that_are_asked_for(run):
    config = read_json(run(peft="lora", r=2, alpha=6) / "adapter_config.json")
    assert (config["r"], config["lora_alpha"]) == (2, 6)


def test_how_a_step_is_cut_changes_no_loss(finished, run):
    cut = run(micro_batches=2, per_device_train_batch_size=2)
    assert losses(cut) == pytest.approx(losses(finished()), abs=1e-5)


@pytest.mark.parametrize("options", [{}, {"label_smoothing_factor": 0.2}], ids=str)
def test_lora_in_one_process_is_that_of_lora_sft(options, run, start, tmp_path):
    options = {**options, "train_sampling_strategy": "random"}
    options |= {"lr_scheduler_type": "linear", "warmup_steps": 0}
    ours = run(peft="lora", **options)
    steps = {"max_steps": 4, "learning_rate": 5e-3, "per_device_train_batch_size": 1}
    plain = start(lora_sft, tmp_path / "plain", **options, **steps, gradient_accumulation_steps=4)
    assert losses(ours) == pytest.approx(losses(plain), abs=1e-5)
    assert losses(ours)[-1] < losses(ours)[0] - 0.1


def test_the_best_weights_are_saved_where_they_are_asked_for(run):
    folder = run(
        load_best_model_at_end=True,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # of a loss that falls: the first
    )
    state = read_json(folder / "trainer_state.json")
    assert state["best_global_step"] == 1
    (file,) = Path(state["best_model_checkpoint"]).glob("stage-*.safetensors")
    best, found = load_file(file), load_file(folder / "model.safetensors")
    assert best.keys() == found.keys()
    assert all(torch.equal(best[name], found[name]) for name in best)


def test_a_last_step_of_fewer_rows_than_micro_batches_is_trained(run):
    folder = run(max_train_samples=5, micro_batches=4, max_steps=-1, num_train_epochs=2)
    assert len(losses(folder)) == 4
    assert all(0 < loss < 20 for loss in losses(folder))


# Checkpoints --------------------------------------------------------------------------------------


def cut_in_two(checkpoint) -> None:
    """What a process has written becomes two files, as two processes leave them."""
    for kind in ("stage", "optimizer"):
        file = checkpoint / f"{kind}-00001-of-00001.safetensors"
        tensors = load_file(file)
        names = sorted({key.rpartition(":")[2] for key in tensors})
        for place, part in enumerate((names[::2], names[1::2]), 1):
            own = {key: it for key, it in tensors.items() if key.rpartition(":")[2] in part}
            notes = {"numbers": "[]", "names": json.dumps(part)} if kind == "optimizer" else {}
            save_file(own, checkpoint / f"{kind}-0000{place}-of-00002.safetensors", notes)
        file.unlink()


@pytest.fixture
def checkpoint(finished, tmp_path):
    """Gives a copy of a run's second checkpoint, and what goes on from it."""

    def of(peft=None):
        return shutil.copytree(finished(peft) / "checkpoint-2", tmp_path / "copied")

    return of


@pytest.mark.parametrize("peft", [None, "lora"])
def test_a_run_goes_on_from_the_files_of_any_number_of_processes(peft, checkpoint, finished, run):
    folder = checkpoint(peft)
    cut_in_two(folder)
    resumed = run(peft=peft, resume_from_checkpoint=str(folder))
    assert losses(resumed) == pytest.approx(losses(finished(peft)), abs=1e-6)
    assert len(losses(resumed)) == 4


@pytest.mark.parametrize(
    "file", ["stage-00002-of-00002.safetensors", "optimizer-00002-of-00002.safetensors"]
)
def test_a_checkpoint_that_lacks_the_file_of_a_process_ends_in_one_line(file, checkpoint, run):
    folder = checkpoint()
    cut_in_two(folder)
    (folder / file).unlink()
    with pytest.raises(UserError, match="copied") as error:
        run(resume_from_checkpoint=str(folder))
    assert line_of(error)


@pytest.mark.parametrize("kind", ["stage", "optimizer"])
def test_a_damaged_file_ends_in_one_line_that_names_it(kind, checkpoint, run):
    file = checkpoint() / f"{kind}-00001-of-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError) as error:
        run(resume_from_checkpoint=str(file.parent))
    assert f"{file}: cannot be read" in line_of(error)


def test_a_checkpoint_without_the_trainers_state_is_not_taken_for_whole(finished, checkpoint, run):
    folder = checkpoint()
    (folder / "trainer_state.json").unlink()
    with pytest.raises(UserError, match="no whole checkpoint") as error:
        run(resume_from_checkpoint=str(folder))
    assert line_of(error)


def test_the_newest_whole_checkpoint_is_the_last(finished, run, tmp_path):
    folder = shutil.copytree(finished(), tmp_path / "out")
    (folder / "metrics.json").unlink()
    (folder / "checkpoint-4" / "trainer_state.json").unlink()
    with watched_training() as seen:
        run(resume_from_checkpoint="last")
    assert seen.trainer.task.checkpoint == str(folder / "checkpoint-2")
    assert losses(folder) == pytest.approx(losses(finished()), abs=1e-6)


@pytest.mark.parametrize(
    ("held", "asked", "says"),
    [
        ("lora", {"peft": "lora", "r": 8}, "its adapter has r 16, and this run's 8"),
        ("lora", {}, "holds an adapter, and this run trains all parameters"),
        (None, {"peft": "lora"}, "no stage-*.safetensors has base_model"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused(held, asked, says, checkpoint, run):
    with pytest.raises(UserError) as error:
        run(**asked, resume_from_checkpoint=str(checkpoint(held)))
    assert says in line_of(error)


def test_a_checkpoint_of_another_model_is_refused(checkpoint, run, tmp_path):
    wider = save_tiny_llama(tmp_path / "wider", 48)
    with pytest.raises(UserError, match="has another shape than here") as error:
        run(model_name_or_path=wider, resume_from_checkpoint=str(checkpoint()))
    assert line_of(error)


def test_other_recipes_and_this_one_refuse_each_others_checkpoints(checkpoint, runs, tmp_path):
    folder = checkpoint("lora")
    with pytest.raises(UserError) as error:
        runs(lora_sft, max_steps=4)(resume_from_checkpoint=str(folder))
    assert "was written as a pipeline (recipes/gpipe_sft.py)" in line_of(error)
    plain = runs(lora_sft, max_steps=2, **SAVING, save_total_limit=1)("plain") / "checkpoint-2"
    with pytest.raises(UserError) as error:
        runs(gpipe_sft, **QUICK, peft="lora")(resume_from_checkpoint=str(plain))
    assert "was written without FSDP, and this run is as a pipeline" in line_of(error)


# Refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"stages": 2}, "--stages 2: the number of started processes, 1, is no multiple"),
        ({"gradient_accumulation_steps": 2}, "--gradient_accumulation_steps: --micro_batches says"),
        ({"packing": True}, "--packing: micro-batches in a pipeline have one shape"),
        ({"streaming": True}, "--streaming: each process would read other rows"),
        ({"neftune_noise_alpha": 5}, "--neftune_noise_alpha: the noise would depend on"),
        ({"torch_compile": True}, "--torch_compile: is not used on stages"),
        ({"auto_find_batch_size": True}, "--auto_find_batch_size: only one of the processes"),
        ({"train_sampling_strategy": "batch_rebalance"}, "--train_sampling_strategy batch_rebal"),
    ],
)
def test_what_a_pipeline_cannot_do_is_one_line(options, says, run, monkeypatch):
    monkeypatch.setattr("recipelib.models.loading.load_pretrained", None)
    with pytest.raises(UserError) as error:
        run(**options)
    assert line_of(error).startswith(says)


def test_fp16_is_refused_where_a_gpu_would_take_it(causal_model, monkeypatch):
    args, training = arguments(gpipe_sft, model_name_or_path=causal_model)
    training.fp16 = True
    with pytest.raises(UserError, match="--fp16: scales the loss by what one process sees"):
        gpipe_sft.main(args, training)


def test_a_config_for_fsdp_is_refused(causal_model, monkeypatch):
    args, training = arguments(gpipe_sft, model_name_or_path=causal_model)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match=r"launch with accelerate_configs/pipeline\.yaml") as error:
        gpipe_sft.main(args, training)
    assert line_of(error)


@pytest.mark.parametrize("family", ["bert", "bloom", "mixtral"])
def test_a_model_of_another_family_is_refused_from_its_config_alone(family, run, tmp_path):
    folder = tmp_path / family
    if family == "bert":
        save_tiny_bert(folder)
    else:
        AutoConfig.for_model(family).save_pretrained(folder)
        (folder / "model.safetensors").touch()
    with pytest.raises(UserError) as error:
        run(model_name_or_path=folder)
    assert f"models of type {family} are not cut into stages here" in line_of(error)


@pytest.fixture
def four(monkeypatch):
    """Whether a run of four processes is refused before the model is loaded; nothing is sent."""
    monkeypatch.setattr(RecipeConfig, "world_size", 4)

    def check(model, **options):
        args, training = arguments(gpipe_sft, model_name_or_path=model, **options)
        monkeypatch.setattr("recipelib.task.load_task", lambda *_: pytest.fail("not refused"))
        gpipe_sft.main(args, training)

    return check


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"stages": 3}, "--stages 3: the number of started processes, 4, is no multiple"),
        ({"stages": 8}, "--stages 8: the number of started processes, 4, is no multiple"),
        (
            {"schedule": "1f1b", "micro_batches": 3},
            "--schedule 1f1b: needs as many micro-batches as stages; raise --micro_batches to 4",
        ),
        (
            {"stages": 2, "schedule": "interleaved", "micro_batches": 5},
            "--schedule interleaved: --micro_batches 5 is no multiple of 2; take 4",
        ),
    ],
)
def test_numbers_that_do_not_fit_the_processes_are_one_line(options, says, four, causal_model):
    with pytest.raises(UserError) as error:
        four(causal_model, **options)
    assert line_of(error).startswith(says)


@pytest.mark.parametrize(
    ("options", "stages"), [({}, 4), ({"stages": 2, "schedule": "interleaved"}, 4)]
)
def test_more_stages_than_layers_are_one_line(options, stages, causal_model, monkeypatch):
    args, training = arguments(gpipe_sft, model_name_or_path=causal_model, **options)
    monkeypatch.setattr(RecipeConfig, "world_size", 4)
    monkeypatch.setattr("recipelib.pipeline.stages.init_device_mesh", lambda *_, **__: None)
    with pytest.raises(UserError) as error:
        Stages.of(args, training, Counts(tokens=10, supervised_tokens=2))
    assert line_of(error).startswith(f"{stages} pipeline stages: the model has 2 layers")


def test_rows_without_a_template_for_them_are_refused_before_a_model_is_loaded(
    run, tmp_path, monkeypatch
):
    monkeypatch.setattr("recipelib.models.loading.load_pretrained", None)
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": "a film", "label": "positive"}])
    with pytest.raises(UserError, match="sentence") as error:
        run(dataset=rows)
    assert line_of(error)
