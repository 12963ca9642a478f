"""FSDP2 over two processes trains, scores and saves what one process does: the recipes under
`accelerate launch`, on CPUs.
"""

import merge
import pytest
import torch
from comparing import MODEL, assert_equal_losses, assert_equal_updates
from launching import assert_sharded_over_two, records
from peft import PeftModel
from run_files import losses, read_json
from transformers import AutoModelForCausalLM

from recipelib.cli import RecipeArguments, parse_arguments
from recipelib.evaluation.evaluation import evaluate_task
from recipelib.task.task import load_task

pytestmark = pytest.mark.slow


# Training ----------------------------------------------------------------------------------------


def test_a_line_says_that_each_of_two_processes_holds_half(two):
    for name, said in two.said.items():
        assert "no GPU: a rehearsal, FSDP2 over 2 gloo processes" in said, name
        assert_sharded_over_two(said)


def test_every_step_and_what_is_learned_are_those_of_one_process(root, two, single, initial):
    assert_equal_losses(root / "two", single)
    assert_equal_updates(root / "two", single, initial)
    assert losses(single)[-1] < losses(single)[0] - 1
    metrics, alone = (read_json(run / "metrics.json") for run in (root / "two", single))
    assert (metrics["world_size"], metrics["distributed_type"]) == (2, "FSDP")
    for name in ("train_tokens", "trainable_parameters", "total_parameters", "score", "base_score"):
        assert metrics[name] == alone[name], name


def test_an_adapter_is_trained_further_as_by_one_process(root, two, alone):
    further = alone("single_further", adapter=root / "two", max_steps=2)
    assert_equal_losses(root / "two_further", further, steps=2)
    assert_equal_updates(root / "two_further", further, root / "two")
    metrics = read_json(root / "two_further" / "metrics.json")
    assert metrics["base_score"] == read_json(root / "two" / "metrics.json")["score"]


def test_rows_grouped_by_length_are_the_same_in_each_step(root, two, alone, initial):
    grouped = alone("single_rebalanced", train_sampling_strategy="batch_rebalance")
    assert_equal_losses(root / "two_rebalanced", grouped)
    assert_equal_updates(root / "two_rebalanced", grouped, initial)


def test_recomputing_activations_changes_nothing(
    root, two, recomputing, single, initial, single_full
):
    assert recomputing.failed == ["two_owners"], recomputing.errors
    assert_equal_losses(root / "two_recomputed", single, 4)
    assert_equal_losses(root / "recomputing_lora", single, 4)
    assert_equal_updates(root / "recomputing_lora", root / "two_recomputed", initial)
    assert_equal_losses(root / "recomputing", single_full, 4)
    # Four steps of two micro-batches, each layer computed twice; scored before and after; and four
    # passes to see that the model can share tokens.
    assert "first layer computed 22 times" in recomputing.said["recomputing"]


def test_activation_checkpointing_with_two_owners_is_refused_by_a_line_that_says_which_to_drop(
    root, recomputing
):
    said = recomputing.said["two_owners"]
    assert said.splitlines()[-1] == "exit code 2"
    assert "sharded" not in said
    assert not (root / "two_owners").exists()
    (line,) = [one for one in recomputing.errors.splitlines() if one.startswith("error: ")]
    assert "drop --activation_checkpointing, or set fsdp_activation_checkpointing: false" in line


def test_all_parameters_tuned_are_those_of_one_process_and_saved_once(root, two, single_full):
    assert_sharded_over_two(two.said["two_full"])
    assert_equal_losses(root / "two_full", single_full)
    # The names too: a tied head is the embedding, not a second copy.
    assert_equal_updates(root / "two_full", single_full, root / "model", MODEL)
    # 8 steps of two micro-batches, nothing twice; scored before and after; and four passes to see
    # that the model can share tokens.
    assert "first layer computed 22 times" in two.said["two_full"]


# Scoring -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "template", "data", "budget"),
    [
        ("two", "movie_reviews", "reviews", 300),
        ("two_written", "gsm8k", "sums", 200),
        ("two_loss", "questions.yaml", "sums", 250),
    ],
    ids=["by likelihood", "by generating", "by loss"],
)
def test_an_adapter_scores_as_in_one_process_each_of_an_odd_number_of_rows_once(
    root, two, options, name, template, data, budget
):
    template = root / template if template.endswith(".yaml") else template
    given = options(
        name,
        template=template,
        dataset=root / data,
        max_new_tokens=6,
        eval_batch_tokens=budget,
    )
    task = load_task(*parse_arguments(RecipeArguments, "", {}, [], given))
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(root / "model"), root / name
    )
    batches = []
    model.register_forward_pre_hook(lambda *_: batches.append(1))
    expected = evaluate_task(model, task.encoder, task.evaluation.rows, **task.budget)
    assert len(batches) > 2
    found = records(root / name)
    assert [one["row"] for one in found] == list(range(7))
    metrics = read_json(root / name / "metrics.json")
    assert metrics["eval_rows"] == 7
    assert metrics["score"] == pytest.approx(expected.score, abs=1e-5)
    assert metrics["stderr"] == pytest.approx(expected.stderr, abs=1e-5)
    for one, other in zip(found, expected.records, strict=True):
        for key in ("log_likelihoods", "scores"):  # those of pairs
            assert one.pop(key, {}) == pytest.approx(other.pop(key, {}), abs=1e-5)
        assert one.pop("line") > 0
        assert one.pop("score") == pytest.approx(other.pop("score"), abs=1e-5)
        assert one == other
    said = {str(one) for one in found}
    assert len(said) == 7  # no two rows alike, so that a row in another's place would show


# Saving ------------------------------------------------------------------------------------------


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([[5, 17, 42, 99, 7, 3, 64, 12]])).logits


def test_pissa_and_the_merged_model_are_those_of_one_process(root, two, alone):
    options = {"pissa": True, "r": 4}
    single = alone("single_pissa", **options)
    start = alone("initial_pissa", **options, learning_rate=0, max_steps=1)
    assert_equal_losses(root / "two_pissa", single)
    assert_equal_updates(root / "two_pissa", single, start)
    for folder in (root / "two_pissa", single):
        merge.main([str(folder)])
    assert_equal_updates(root / "two_pissa" / "merged", single / "merged", root / "model", MODEL)
    config, other = (read_json(one / "adapter_config.json") for one in (root / "two_pissa", single))
    assert config["r"] == other["r"] == 8
    base = AutoModelForCausalLM.from_pretrained(root / "model")
    adapted = logits(PeftModel.from_pretrained(base, root / "two_pissa"))
    merged = logits(AutoModelForCausalLM.from_pretrained(root / "two_pissa" / "merged"))
    assert (merged - adapted).abs().max() < 1e-4
