"""Trains with noise, in lines of rows, or until it is stopped early: a test runs it under
`accelerate launch`, or calls `main`. What it finds goes to FOLDER/KIND-HOW.json.

    with_options.py FOLDER [full | lora] [noise | packed | stopped]
"""

import copy
import json
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tiny_models import MODELS, TOKENIZER
from tiny_task import examples_task
from torch.distributed.tensor import DTensor

from recipelib.encoding.examples import encode_rows
from recipelib.encoding.prompt_encoder import PromptEncoder
from recipelib.evaluation.evaluation import evaluate_task
from recipelib.models.quantization import count_parameters
from recipelib.prompts.template import PromptTemplate
from recipelib.runtime.console import is_main_process
from recipelib.training.callbacks import SampleWriter, stop_early
from recipelib.training.config import RecipeConfig
from recipelib.training.trainer import RecipeTrainer

TEMPLATE = PromptTemplate(
    {
        "name": "questions",
        "form": "generative",
        "prompt": "Question: {{ question }}\nAnswer:",
        "answer": " {{ answer }}",
        "metric": "loss",
    }
)
ROWS = [
    {"question": f"what is {number} {'more ' * (number % 5)}?", "answer": f"it is {word}"}
    for number, word in enumerate(["good", "bad", "the river", "a book"] * 4)
]
OTHER_ROWS = [{"question": f"who wrote {number}?", "answer": "a teacher"} for number in range(5)]
OPTIONS = {
    "noise": {"neftune_noise_alpha": 100.0, "learning_rate": 0.0, "max_steps": 2},
    "packed": {"packing": True, "activation_checkpointing": True, "max_steps": 6},
    "stopped": {"num_train_epochs": 40, "eval_steps": 2},
}
RATES = {"full": 5e-3, "lora": 5e-2}


def runs(folder: Path, ways: Iterable[str] = OPTIONS) -> dict[str, list[str]]:
    """What is to be launched for some of the ways to train; results go to `folder`."""
    return {f"{kind}-{how}": [__file__, str(folder), kind, how] for how in ways for kind in RATES}


class WatchedWriter(SampleWriter):
    """Counts the parameters that an answer has left whole."""

    whole = 0

    def _write(self, model, folder, step):
        super()._write(model, folder, step)
        self.whole += sum(not isinstance(one, DTensor) for one in model.parameters())


def main(folder: Path, kind: str, how: str, rows_per_process: int = 4) -> dict:
    """Train, and give what was found."""
    training = RecipeConfig(
        output_dir=str(folder / f"run-{kind}-{how}"),
        per_device_train_batch_size=rows_per_process,
        per_device_eval_batch_size=1,  # the mean over rows, whatever the number of processes
        lr_scheduler_type="constant",
        train_sampling_strategy="random",
        eval_strategy="steps",
        disable_tqdm=True,
        **{"learning_rate": RATES[kind], "eval_steps": 1, **OPTIONS[how]},
    )
    encoder = PromptEncoder(TEMPLATE, TOKENIZER, 100)
    model = copy.deepcopy(MODELS["llama"])
    if kind == "lora":
        torch.manual_seed(0)
        config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, config)
    writer = WatchedWriter(encoder, OTHER_ROWS[:3], 3, max_new_tokens=4)
    callbacks = [writer, stop_early(training, 2)] if how == "stopped" else [writer]
    train, held_out = (encode_rows(encoder, rows).examples for rows in (ROWS, OTHER_ROWS))
    task = examples_task(train, TOKENIZER, held_out)
    trainer = RecipeTrainer(model, training, task, callbacks=callbacks)
    model = trainer.model
    before = evaluate_task(model, encoder, OTHER_ROWS).score
    trainer.train()
    found = {
        "before": before,
        "after": evaluate_task(model, encoder, OTHER_ROWS).score,
        "losses": [one["loss"] for one in trainer.state.log_history if "loss" in one],
        "evaluated": [one["eval_loss"] for one in trainer.state.log_history if "eval_loss" in one],
        "steps": trainer.state.global_step,
        "best": trainer.state.best_global_step,
        "rows_apart": trainer.rows_apart,
        "padding": trainer.slots_seen - trainer.tokens_seen,
        "trainable": count_parameters(model)[0],
        "noisy": hasattr(model.get_input_embeddings(), "neftune_noise_alpha"),
        "whole": writer.whole,
    }
    saved = Path(training.output_dir)
    trainer.save_model(str(saved))
    if is_main_process():
        for checkpoint in saved.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
        lines = (saved / "samples.jsonl").read_text().splitlines()
        found["samples"] = [json.loads(line) for line in lines]
        (folder / f"{kind}-{how}.json").write_text(json.dumps(found))
    return found


def here(folder: Path, ways: Iterable[str] = OPTIONS, kinds: Iterable[str] = RATES) -> Path:
    """The same in this process, with as many rows in each step; gives `folder`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for how in ways:
            for kind in kinds:
                main(folder, kind, how, rows_per_process=8)
    finally:
        torch.set_num_threads(threads)
    return folder


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
