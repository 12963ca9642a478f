"""The trainer's arguments fit the machine, and what would fail late is refused at once."""

from functools import cached_property

import pytest
import torch
from trl import SFTConfig

from recipelib.cli import RecipeArguments, parse_arguments
from recipelib.runtime.errors import UserError
from recipelib.training.config import RecipeConfig


def parse(*argv: str) -> RecipeConfig:
    defaults = {"output_dir": "runs/nowhere"}
    return parse_arguments(RecipeArguments, "A recipe.", defaults, list(argv))[1]


def test_a_cpu_computes_in_float32_without_being_told(monkeypatch):
    for gpu in (False, True):
        monkeypatch.setattr("recipelib.training.config.fast_bf16", lambda gpu=gpu: gpu)
        config = parse("--use_cpu", "true")
        assert config.bf16 is False
        assert config.fp16 is False
        assert config.dataloader_pin_memory is False
        assert config.model_dtype[0] == torch.float32
        assert "CPU" in config.model_dtype[1]
        assert config.activation_checkpointing is False
        assert config.report_to == []


def test_pushing_to_the_hub_is_left_to_the_recipe():
    config = parse("--push_to_hub", "true", "--use_cpu", "true")
    assert (config.publish, config.push_to_hub) == (True, False)
    assert parse("--use_cpu", "true").publish is False


def test_several_gpus_in_one_process_are_one(monkeypatch, capsys):
    def set_up(self):
        self._n_gpu = 2
        self.distributed_state = None
        return torch.device("cpu")

    devices = cached_property(set_up)
    devices.__set_name__(SFTConfig, "_setup_devices")
    monkeypatch.setattr(SFTConfig, "_setup_devices", devices)
    config = RecipeConfig(output_dir="runs/nowhere", use_cpu=True)
    assert config.n_gpu == 1
    assert config.train_batch_size == config.per_device_train_batch_size
    assert "using one of 2 GPUs; accelerate_configs/ddp.yaml uses all" in capsys.readouterr().out


REFUSED = {
    "--report_to foo": "--report_to: foo is not supported, only .*wandb",
    "--report_to wandb": "--report_to: .*pip install wandb",
    "--optim adamw_bnb_8bit": "--optim: .*pip install -U bitsandbytes",
    "--optim foo": "optim: invalid choice: 'foo' .*adamw_torch",
    "--lr_scheduler_type foo": "lr_scheduler_type.*: invalid choice: 'foo' .*cosine",
    "--lr_scheduler_type cosine_with_min_lr": "--lr_scheduler_type: .*min_lr",
    "--fp16 true": "--fp16: needs a GPU",
    "--padding_free true": "--padding_free: --packing true lays whole rows",
    "--packing_strategy wrapped": "--packing_strategy: --packing true lays whole rows",
    "--packing true --eval_packing false": "--eval_packing: --packing true lays whole rows",
    "--neftune_noise_alpha -1": "--neftune_noise_alpha -1.0: must be 0 or more",
    "--loss_type dft": "--loss_type: the template decides",
    "--assistant_only_loss true": "--assistant_only_loss: the template decides",
    "--completion_only_loss false": "--completion_only_loss: the template decides",
    "--chat_template_path some.jinja": "--chat_template_path: the template decides",
    "--eos_token </s>": "--eos_token: the template decides",
}


@pytest.mark.parametrize("command", REFUSED)
def test_what_would_fail_after_minutes_is_refused_at_once_in_one_line(command, monkeypatch):
    # As where nothing is installed.
    for check in ("integrations.integration_utils.is_wandb", "trainer_optimizer.is_bitsandbytes"):
        monkeypatch.setattr(f"transformers.{check}_available", lambda: False)
    with pytest.raises(UserError, match=REFUSED[command]) as refused:
        parse("--use_cpu", "true", *command.split())
    assert "\n" not in str(refused.value)


def test_activations_are_recomputed_when_asked():
    config = parse("--activation_checkpointing", "true", "--use_cpu", "true")
    assert config.activation_checkpointing is True


def test_what_works_is_taken():
    stable = '--lr_scheduler_type warmup_stable_decay --lr_scheduler_kwargs {"num_decay_steps":5}'
    for command in (
        "--optim sgd",
        "--optim adafactor",
        "--report_to none",
        "--packing true",
        stable,
    ):
        assert parse("--use_cpu", "true", *command.split()).output_dir == "runs/nowhere"


def test_processes_that_do_not_know_of_each_other_do_not_train(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="2 processes were started, but this one knows of 1"):
        RecipeConfig(output_dir=str(tmp_path))
