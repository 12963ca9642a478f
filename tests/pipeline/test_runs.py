"""gpipe_sft.py over several processes trains, scores and saves what it does in one."""

import re

import pytest
import torch
from comparing import ADAPTER, MODEL, assert_equal_losses, assert_equal_updates
from launching import UNSAVED, records
from peft import PeftModel
from run_files import losses, read_json
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.slow

KINDS = ["full", "lora", "written", "written_lora", "loss"]
STEPS = {"full": 8, "lora": 8}
LORA = ["lora", "written_lora"]


@pytest.fixture(scope="module")
def start(root, alone, options):
    """Gives the folder with the weights that runs of a kind start from."""

    def of(kind: str):
        if kind not in LORA:
            return options("start", kind)["model_name_or_path"]
        still = {"learning_rate": 0.0, "max_steps": 1, **UNSAVED}
        return alone(kind, f"start_{kind}", **still)

    return of


@pytest.fixture(scope="module")
def both(root, two, alone):
    """Gives the folders of a kind of run over two processes, and in one."""
    return lambda kind: (root / f"two_{kind}", alone(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_train_what_one_does(kind, both, start):
    ours, single = both(kind)
    assert_equal_losses(ours, single, STEPS.get(kind, 2))
    file = ADAPTER if kind in LORA else MODEL
    assert_equal_updates(ours, single, start(kind), file)


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_score_as_one_does(kind, both):
    ours, single = (read_json(folder / "metrics.json") for folder in both(kind))
    for name in ("score", "base_score", "stderr"):
        assert ours[name] == pytest.approx(single[name], abs=1e-4), name
    for one, other in zip(*map(records, both(kind)), strict=True):
        assert one["prediction"] == other["prediction"]
        if kind in ("full", "lora"):
            assert one["log_likelihoods"] == pytest.approx(other["log_likelihoods"], abs=1e-3)
        elif kind != "loss":
            assert one["generated"] == other["generated"]


def test_a_pipeline_goes_over_two_machines(root, machines, alone):
    assert "no GPU: a rehearsal over 2 gloo processes" in machines.said["machines"]
    assert_equal_losses(root / "machines", alone("lora"), 4)


def losses_of_other_rows(folder) -> list[float]:
    history = read_json(folder / "trainer_state.json")["log_history"]
    return [entry["eval_loss"] for entry in history if "eval_loss" in entry]


def test_the_loss_of_other_rows_is_followed_as_in_one_process(both):
    found, wanted = map(losses_of_other_rows, both("full"))
    assert len(found) == 2
    assert found == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("kind", ["half", "half_lora"])
def test_in_16_bits_two_processes_train_nearly_what_one_does(kind, both):
    ours, single = both(kind)
    assert len(losses(ours)) == 2
    assert losses(ours) == pytest.approx(losses(single), abs=0.02)
    assert losses(ours)[1] < losses(ours)[0] - 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_metrics_count_the_whole_model_whatever_a_process_holds(kind, both):
    ours, single = (read_json(folder / "metrics.json") for folder in both(kind))
    counted = ("trainable_parameters", "total_parameters", "train_tokens", "padding_fraction")
    for name in (*counted, "train_examples", "supervised_tokens", "steps"):
        assert ours[name] == single[name], name
    assert (ours["world_size"], single["world_size"]) == (2, 1)


@pytest.mark.parametrize(
    ("kind", "stages", "bubble"),
    [("full", 2, 1 / (4 + 1)), ("lora", 4, 1 / (2 * 4 + 1)), ("written", 2, 1 / (4 + 1))],
)
def test_metrics_say_how_the_model_was_cut_and_how_long_processes_waited(
    kind, stages, bubble, both
):
    ours, single = (read_json(folder / "metrics.json") for folder in both(kind))
    layers = [number for first, end in ours["stages"] for number in range(first, end)]
    assert layers == [0, 1, 2, 3]
    assert len(ours["stages"]) == stages
    assert single["stages"] == [[0, 4]]
    assert ours["bubble"] == pytest.approx(bubble)
    assert single["bubble"] == 0
    assert 0 < ours["idle_fraction"] < 1
    assert 0 <= single["idle_fraction"] < 1
    assert (ours["pipelines"], ours["micro_batches"]) == (1, 4)


def test_the_plan_names_each_processs_layers_and_memory(two):
    said = two.said["two_full"]
    assert "no GPU: a rehearsal over 2 gloo processes" in said
    first, second = re.findall(r"process \d +│ (.*) +│", said)
    for line, layers in ((first, "embeddings, layers 0-1"), (second, "layers 2-3, head")):
        assert re.match(rf"{layers}: [\d.]+ M parameters, [\d.]+ M trained; [\d.]+ GiB", line)
    assert "20% of each step = 1 / (4 + 1)" in said
    assert re.search(r"memory per process +│ .*GiB = .*\(estimate\)", said)


@pytest.mark.parametrize("kind", ["full", "written"])
def test_plain_transformers_loads_the_whole_result(kind, both, start):
    folder, _ = both(kind)
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(map(len, info.values()))
    before = load_file(start(kind) / MODEL)
    for name, weight in model.state_dict().items():
        assert name not in before or not torch.equal(weight, before[name]), name
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    assert tied == (kind == "full")
    assert AutoTokenizer.from_pretrained(folder)("fine").input_ids


@pytest.mark.parametrize("kind", LORA)
def test_plain_peft_loads_the_whole_adapter(kind, both, options):
    folder, _ = both(kind)
    base = AutoModelForCausalLM.from_pretrained(options("", kind)["model_name_or_path"])
    model = PeftModel.from_pretrained(base, folder)
    trained = {name: it for name, it in model.named_parameters() if "lora_" in name}
    assert len(trained) == 4 * 7 * 2  # layers, linear modules in each, A and B
    assert all(it.abs().max() > 0 for it in trained.values())  # B would be 0 where none was read


# Several pipelines, and a longer one --------------------------------------------------------------


def test_two_pipelines_side_by_side_train_and_score_what_one_process_does(root, four, alone, start):
    changes = {"micro_batches": 8, "max_steps": 4, "eval_strategy": "steps", "eval_steps": 2}
    ours, single = root / "four_lora", alone("lora", "single_beside", **changes)
    assert_equal_losses(ours, single, 4)
    assert_equal_updates(ours, single, start("lora"))
    found, wanted = (read_json(folder / "metrics.json") for folder in (ours, single))
    for name in ("score", "base_score", "train_tokens", "trainable_parameters"):
        assert found[name] == pytest.approx(wanted[name], abs=1e-5), name
    assert (found["world_size"], found["pipelines"]) == (4, 2)
    evaluated = losses_of_other_rows(ours)
    assert len(evaluated) == 2
    assert evaluated == pytest.approx(losses_of_other_rows(single), abs=1e-4)
    for one, other in zip(records(ours), records(single), strict=True):
        assert one["log_likelihoods"] == pytest.approx(other["log_likelihoods"], abs=1e-3)


def test_four_stages_train_and_write_what_one_process_does(root, four, alone, start):
    ours, single = root / "four_written", alone("written")
    assert_equal_losses(ours, single, 2)
    assert_equal_updates(ours, single, start("written"), MODEL)
    assert read_json(ours / "metrics.json")["stages"] == [[n, n + 1] for n in range(4)]
    for one, other in zip(records(ours), records(single), strict=True):
        assert one["generated"] == other["generated"]
