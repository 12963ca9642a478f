"""Only whole checkpoints are resumed from, and nothing but a finished run is cleared."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from tiny_llama import tiny_llama

from recipelib.runtime.checkpoints import (
    TRAINED,
    check_adapter,
    check_trained,
    checkpoint_kind,
    clear_results,
    clear_way,
    find_checkpoint,
    refuse_trained_run,
)
from recipelib.runtime.errors import UserError

STATE = json.dumps({"global_step": 20, "log_history": [{"loss": 0.5, "step": 1}]}, indent=2)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run"


def put(folder, name: str, state: str | None = STATE):
    checkpoint = folder / name
    checkpoint.mkdir(parents=True)
    (checkpoint / "adapter_model.safetensors").write_bytes(b"weights")
    if state is not None:
        (checkpoint / "trainer_state.json").write_text(state)
    return checkpoint


def begin(folder, which=None):
    """What a recipe does before it trains."""
    found = find_checkpoint(str(folder), which)
    clear_way(str(folder), found)
    return found


def everything(folder) -> set[str]:
    return {str(one.relative_to(folder)) for one in folder.rglob("*")}


def test_a_fresh_start_in_a_new_or_empty_folder_is_just_that(folder):
    assert find_checkpoint(str(folder), None) is None
    assert not folder.exists()
    folder.mkdir()
    assert find_checkpoint(str(folder), None) is None


def test_last_is_the_highest_number_not_the_last_in_the_alphabet_or_in_time(folder):
    for step in (100, 20, 3):
        put(folder, f"checkpoint-{step}")
    assert find_checkpoint(str(folder), "last") == str(folder / "checkpoint-100")


@pytest.mark.parametrize("state", [None, "", STATE[: len(STATE) // 2], STATE[:-1], "\x00" * 64])
def test_a_half_written_checkpoint_is_passed_over(folder, state):
    put(folder, "checkpoint-20")
    half = put(folder, "checkpoint-40", state)
    assert find_checkpoint(str(folder), "last") == str(folder / "checkpoint-20")
    with pytest.raises(UserError, match="checkpoint-40: no whole checkpoint") as error:
        find_checkpoint(str(folder), str(half))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["checkpoint-foo", "checkpoint-5-best", "checkpoint-²"])
def test_what_is_only_called_like_a_checkpoint_is_left_alone(folder, name):
    other = put(folder, name)
    assert find_checkpoint(str(folder), None) is None
    with pytest.raises(UserError, match="last: no whole checkpoint in"):
        find_checkpoint(str(folder), "last")
    (folder / "metrics.json").write_text("{}")
    begin(folder)
    assert other.is_dir()
    # Named by its path it is taken: the user says so.
    assert find_checkpoint(str(folder), str(other)) == str(other)


def test_a_file_called_like_a_checkpoint_is_none(folder):
    folder.mkdir()
    (folder / "checkpoint-9").write_text("")
    (folder / "metrics.json").write_text("{}")
    assert begin(folder) is None
    assert everything(folder) == {"checkpoint-9"}


def test_nothing_to_go_on_from_is_one_line(folder):
    for which, said in (("last", "start without it"), ("elsewhere", "no whole checkpoint")):
        with pytest.raises(UserError, match=said) as error:
            find_checkpoint(str(folder), which)
        assert "\n" not in str(error.value)


def test_auto_goes_on_from_the_last_whole_checkpoint_and_starts_anew_where_there_is_none(folder):
    assert begin(folder, "auto") is None
    put(folder, "checkpoint-20", state=None)
    assert begin(folder, "auto") is None
    assert everything(folder) == set()
    put(folder, "checkpoint-20")
    put(folder, "checkpoint-40", state=None)
    assert begin(folder, "auto") == str(folder / "checkpoint-20")


def test_a_whole_checkpoint_of_an_unfinished_run_is_never_cleared_for_a_fresh_start(folder):
    put(folder, "checkpoint-20")
    put(folder, "checkpoint-40", state=None)
    clear_way(str(folder), None)  # as a trainer does whose task looked for no checkpoint
    assert [path.name for path in folder.iterdir()] == ["checkpoint-20"]


def test_a_checkpoint_of_another_folder_is_taken_by_its_path(folder, tmp_path):
    other = put(tmp_path / "other", "checkpoint-7")
    assert find_checkpoint(str(folder), str(other)) == str(other)


def test_an_unfinished_run_is_neither_mixed_with_nor_cleared(folder):
    put(folder, "checkpoint-20")
    put(folder, "checkpoint-100", state=None)
    before = everything(folder)
    with pytest.raises(UserError, match="checkpoint-100 of an unfinished run") as error:
        find_checkpoint(str(folder), None)
    assert "\n" not in str(error.value)
    assert "--resume_from_checkpoint last" in str(error.value)
    assert everything(folder) == before


def test_beside_a_finished_run_only_its_checkpoints_and_metrics_are_cleared(folder):
    put(folder, "checkpoint-20")
    put(folder, "checkpoint-40", state=None)
    kept = {"adapter_model.safetensors", "notes.txt", "predictions_mine.jsonl", "loss.png"}
    for name in kept | {"metrics.json"}:
        (folder / name).write_text("{}")
    before = everything(folder)
    assert find_checkpoint(str(folder), None) is None
    assert everything(folder) == before  # until training begins
    assert begin(folder) is None
    assert everything(folder) == kept


def test_samples_are_added_to_by_a_run_that_goes_on_and_not_by_another(folder):
    samples = folder / "samples.jsonl"
    put(folder, "checkpoint-20")
    samples.write_text("{}")
    with pytest.raises(UserError, match="unfinished run"):
        find_checkpoint(str(folder), None)
    begin(folder, "last")
    assert samples.exists()
    (folder / "metrics.json").write_text("{}")
    begin(folder)
    assert everything(folder) == set()
    samples.write_text("{}")  # of a run that ended before its first checkpoint
    begin(folder)
    assert not samples.exists()


def test_a_clearing_that_was_interrupted_is_taken_up_again(folder, monkeypatch):
    put(folder, "checkpoint-20")
    (folder / "metrics.json").write_text("{}")

    def interrupted(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr("shutil.rmtree", interrupted)
        with pytest.raises(KeyboardInterrupt):
            begin(folder)
    assert begin(folder) is None
    assert everything(folder) == set()


def test_a_finished_run_that_goes_on_is_unfinished_again(folder):
    put(folder, "checkpoint-20")
    (folder / "metrics.json").write_text("{}")
    assert begin(folder, "last") == str(folder / "checkpoint-20")
    assert not (folder / "metrics.json").exists()
    with pytest.raises(UserError, match="unfinished run"):
        find_checkpoint(str(folder), None)


def test_other_processes_clear_nothing_and_agree_whenever_they_look(folder, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    checkpoint = put(folder, "checkpoint-20")
    # The main process may already have removed metrics.json and not yet the checkpoints, or none.
    assert find_checkpoint(str(folder), None) is None
    (folder / "metrics.json").write_text("{}")
    before = everything(folder)
    assert begin(folder) is None
    assert begin(folder, "last") == str(checkpoint)
    assert everything(folder) == before


def test_going_on_from_an_earlier_checkpoint_gives_up_those_behind_it(folder, capsys):
    for step in (20, 40, 100):
        put(folder, f"checkpoint-{step}")
    begin(folder, str(folder / "checkpoint-40"))
    assert {one.name for one in folder.iterdir()} == {"checkpoint-20", "checkpoint-40"}
    assert "checkpoint-100 is given up, for the run goes on from checkpoint-40" in (
        capsys.readouterr().out
    )


def test_an_output_dir_that_is_a_file_is_one_line(folder):
    folder.write_text("")
    with pytest.raises(UserError, match="run: is a file; name a folder"):
        find_checkpoint(str(folder), None)


LAUNCHES = {
    "plain": {},
    "full": {"ACCELERATE_USE_FSDP": "true", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"},
    "sharded": {"ACCELERATE_USE_FSDP": "true", "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"},
}


@pytest.mark.parametrize("kind", LAUNCHES)
@pytest.mark.parametrize("launch", LAUNCHES)
def test_a_checkpoint_is_resumed_by_the_kind_of_launch_that_wrote_it(
    folder, monkeypatch, kind, launch
):
    checkpoint = put(folder, "checkpoint-2")
    if kind == "full":
        (checkpoint / "pytorch_model_fsdp.bin").write_bytes(b"weights")
    if kind == "sharded":
        (checkpoint / "pytorch_model_fsdp_0").mkdir()
    for name, value in LAUNCHES[launch].items():
        monkeypatch.setenv(name, value)
    assert checkpoint_kind(checkpoint) == kind
    if kind == launch:
        assert find_checkpoint(str(folder), "last") == str(checkpoint)
        return
    with pytest.raises(UserError, match=r"checkpoint-2: was written .*; launch as it was") as error:
        find_checkpoint(str(folder), "last")
    assert "\n" not in str(error.value)


def lora(**changes):
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **changes})
    return get_peft_model(tiny_llama(50), config)


def test_a_checkpoint_of_the_same_adapter_is_gone_on_from(folder):
    lora().save_pretrained(folder)
    check_adapter(str(folder), lora())
    check_adapter(str(folder), lora(lora_dropout=0.1))
    check_adapter(None, lora(r=8))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"r": 8}, "its adapter has r 4, and this run's 8"),
        ({"lora_alpha": 512}, "its adapter has lora_alpha 8, and this run's 512"),
        ({"init_lora_weights": "pissa"}, "its adapter has init_lora_weights True, and this run's"),
        ({"target_modules": ["q_proj"]}, "its adapter has target_modules "),
        ({"use_dora": True}, "its adapter has use_dora False, and this run's True"),
    ],
)
def test_a_checkpoint_of_another_adapter_is_refused(folder, changes, said):
    lora().save_pretrained(folder)
    with pytest.raises(UserError, match=said) as error:
        check_adapter(str(folder), lora(**changes))
    assert "\n" not in str(error.value)


def test_an_adapter_is_not_gone_on_from_as_a_whole_model_nor_the_other_way_round(folder):
    lora().save_pretrained(folder)
    with pytest.raises(UserError, match="holds an adapter, and this run trains all parameters"):
        check_adapter(str(folder), tiny_llama(50))
    tiny_llama(50).save_pretrained(folder / "whole")
    check_adapter(str(folder / "whole"), tiny_llama(50))
    with pytest.raises(UserError, match="holds a whole model, and this run trains an adapter"):
        check_adapter(str(folder / "whole"), lora())


# What an earlier run of another kind has left


OF_AN_EARLIER_RUN = [
    *("adapter_model.safetensors", "adapter_config.json", "trained.safetensors"),
    *("model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json"),
    *("config.json", "generation_config.json", "template.yaml", "templates/sst2.yaml"),
    *("confusion.png", "reliability.png", "peft_bottleneck.py", "predictions_samples.jsonl"),
    *("merged/model.safetensors", "base_model/config.json", "dropped/layer.json"),
]
NOT_ITS_OWN = ["notes.txt", "checkpoint-20/model.safetensors", "data.csv"]


def leave(folder, names) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")


def files(folder) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_nothing_of_an_earlier_run_passes_for_this_ones_and_what_is_the_users_stays(folder):
    leave(folder, OF_AN_EARLIER_RUN + NOT_ITS_OWN)
    clear_results(str(folder), "owner/base")
    assert files(folder) == set(NOT_ITS_OWN)
    clear_results(str(folder), "owner/base")  # there is nothing left to do
    assert files(folder) == set(NOT_ITS_OWN)


def test_a_folder_that_is_not_there_yet_is_as_good_as_empty(folder):
    clear_results(str(folder), "owner/base")
    assert not folder.exists()


@pytest.mark.parametrize("named", ["as it is", "with a slash", "by a link"])
def test_the_models_own_folder_is_left_alone_however_it_is_named(named, folder, tmp_path):
    leave(folder, OF_AN_EARLIER_RUN)
    (tmp_path / "link").symlink_to(folder)
    names = {"as it is": str(folder), "with a slash": f"{folder}/", "by a link": tmp_path / "link"}
    clear_results(str(folder), str(names[named]))
    assert files(folder) == set(OF_AN_EARLIER_RUN)


def test_a_model_is_not_trained_into_its_own_folder_nor_its_checkpoint_cleared_away(folder):
    own = put(folder, "checkpoint-20")
    put(folder, "checkpoint-30")
    (folder / "metrics.json").write_text("{}")
    with pytest.raises(UserError, match="holds the model that is trained; name another"):
        find_checkpoint(str(own), None, model=f"{own}/")
    clear_way(str(folder), None, str(own))
    assert [one.name for one in folder.iterdir()] == ["checkpoint-20"]
    clear_results(str(folder), "owner/base", draws=2)  # those of the draws lie in their folders
    assert not everything(folder)


def test_other_processes_leave_the_clearing_to_the_main_one(folder, monkeypatch):
    leave(folder, OF_AN_EARLIER_RUN)
    monkeypatch.setenv("RANK", "1")
    clear_results(str(folder), "owner/base")
    assert files(folder) == set(OF_AN_EARLIER_RUN)


# What a cloze's checkpoint was trained as


def test_a_checkpoint_of_other_arguments_is_not_gone_on_from(folder):
    folder.mkdir()
    trained = {"tune": "prefix", "virtual_tokens": "8"}
    save_file({"weight": torch.zeros(1)}, folder / TRAINED, trained)
    check_trained(folder, trained)
    with pytest.raises(UserError, match="was trained with --virtual_tokens 8, and this run has 16"):
        check_trained(folder, {**trained, "virtual_tokens": "16"})
    with pytest.raises(UserError, match="is of another recipe"):
        check_trained(folder, {"soft_prompt": "True"})


@pytest.mark.parametrize("content", [None, b"no safetensors"])
def test_a_checkpoint_of_another_recipe_is_one_line(folder, content):
    folder.mkdir()
    if content:
        (folder / TRAINED).write_bytes(content)
    with pytest.raises(UserError, match="of a run of this recipe") as error:
        check_trained(folder, {})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("metrics", "refused"),
    [(None, 0), ({}, 0), ({"trainable_parameters": 0}, 0), ({"trainable_parameters": 9}, 1)],
)
def test_what_was_only_scored_is_not_written_over_what_was_trained(folder, metrics, refused):
    folder.mkdir()
    if metrics is not None:
        (folder / "metrics.json").write_text(json.dumps(metrics))
    if not refused:
        refuse_trained_run(str(folder))
        return
    with pytest.raises(UserError, match="run: holds a trained run; name another"):
        refuse_trained_run(str(folder))
