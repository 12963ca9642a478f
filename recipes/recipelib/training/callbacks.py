"""What happens between steps: stopping early, and answers to a few rows, written on the way."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from recipelib.encoding import DoesNotFit, PromptEncoder
from recipelib.inference import generate
from recipelib.models import reshard
from recipelib.runtime import UserError, is_main_process, uses_fsdp, write_jsonl

SAMPLES = "samples.jsonl"


class EarlyStopping(EarlyStoppingCallback):
    """transformers', but a resumed run goes on counting where it stopped."""

    def on_train_begin(self, args, state, control, **kwargs):
        """Count the evaluations since the best one."""
        super().on_train_begin(args, state, control, **kwargs)
        best = state.best_global_step or 0
        evaluated = [entry["step"] for entry in state.log_history if "eval_loss" in entry]
        self.early_stopping_patience_counter = sum(step > best for step in evaluated)


def stop_early(training, patience: int) -> EarlyStopping:
    """End training after `patience` evaluations without a lower loss, and go back to the best
    weights (Prechelt 1998).

    Going back needs a checkpoint for each evaluation. If the user set only when to save, or only
    when to evaluate, the other follows; if neither, both happen once an epoch.

    Args:
        training: the trainer's arguments, which are changed: so call this before evaluation rows
            are encoded and the trainer is made.
        patience: evaluations.

    Returns:
        The callback for the trainer.
    Raises:
        UserError: arguments by which the best weights would not be kept.
    """
    fields = type(training).__dataclass_fields__
    saving = (training.save_strategy, training.save_steps)
    untouched = saving == (fields["save_strategy"].default, fields["save_steps"].default)
    why = "early stopping goes back to the best checkpoint"
    if training.save_strategy == "no":
        raise UserError(f"--save_strategy no: {why}; leave it out")
    if training.save_only_model and uses_fsdp():
        raise UserError(f"--save_only_model: {why}, which FSDP cannot load from that; leave it out")
    if training.greater_is_better:
        raise UserError("--greater_is_better: the lower loss is better; leave it out")

    if training.eval_strategy == "no":
        in_steps = training.save_strategy == "steps" and not untouched
        training.eval_strategy = IntervalStrategy.STEPS if in_steps else IntervalStrategy.EPOCH
        training.eval_steps = training.save_steps if in_steps else None
        training.do_eval = True
    if untouched:
        training.save_strategy = SaveStrategy(training.eval_strategy.value)
        training.save_steps = training.eval_steps or training.save_steps
    elif training.save_strategy != "best":
        evaluated = _how_often(training.eval_strategy, training.eval_steps)
        saved = _how_often(training.save_strategy, training.save_steps)
        if evaluated != saved:
            raise UserError(
                f"--save_strategy: {why}, so each evaluation needs one, but the run evaluates "
                f"{evaluated} and saves {saved}; leave out --save_strategy and --save_steps"
            )
    training.load_best_model_at_end = True
    training.metric_for_best_model, training.greater_is_better = "loss", False
    return EarlyStopping(patience)


def _how_often(strategy: str, steps: float) -> str:
    return "once a pass" if strategy == "epoch" else f"every {steps:g} steps"


class SampleWriter(TrainerCallback):
    """Lets the model answer the same few rows of a task before the first step, every `every` steps
    and at the end, and adds the answers to OUTPUT_DIR/samples.jsonl.

    A line holds the `step`, the `task`, the `prompt`, what was `generated` (greedily) and the gold
    `answer`. In a conversation the last reply is generated. After going back to the best weights,
    the last lines have the step of those. A resumed run drops the lines from after its checkpoint.

    Training is the same with and without it, except for the time, which counts as training time.
    All processes take part, the main one writes.

    Args:
        encoder: encodes the task.
        rows: as `data.load_rows` gives them. Rows whose prompt does not fit are skipped, and so are
            conversations that have no trained reply without a tool call.
        every: steps between answers.
        max_new_tokens: of an answer.
    """

    def __init__(
        self, encoder: PromptEncoder, rows: Sequence[Mapping], every: int, max_new_tokens: int = 64
    ):
        self.encoder, self.every, self.max_new_tokens = encoder, every, max_new_tokens
        self.asked = []  # of each row: the prompt's ids, its end marker, the gold answer
        for row in rows:
            try:
                self.asked.append(self._ask(row))
            except DoesNotFit:
                continue

    @classmethod
    def of(cls, task, every: int, rows: int = 2) -> SampleWriter:
        """The callback for the first evaluation rows of a task."""
        return cls(task.encoder, task.evaluation.rows[:rows], every)

    def _ask(self, row: Mapping) -> tuple[list[int], list[int], str]:
        encoder, reserve = self.encoder, self.max_new_tokens
        question = encoder.template.questions(row)[0]
        if not question.turns:
            prompt = encoder.prompt(question, reserve)
            return prompt.ids, prompt.end, question.target.strip()
        replies = [
            place
            for place, turn in enumerate(question.turns)
            if turn["role"] == "assistant" and "tool_calls" not in turn and turn.get("weight") != 0
        ]
        if not replies:
            raise DoesNotFit("the conversation has no reply")
        before, reply = question.turns[: replies[-1]], question.turns[replies[-1]]
        ids, end = encoder.text.chat_prompt(before, question.tools), encoder.text.chat_end(before)
        if len(ids) + reserve + len(end) > encoder.max_length:
            raise DoesNotFit("the conversation is too long")
        return ids, end, reply["content"].strip()

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Drop lines from after the checkpoint that is resumed; without a checkpoint, answer."""
        if is_main_process():
            path = Path(args.output_dir, SAMPLES)
            kept = [line for line in _read(path) if line["step"] <= state.global_step]
            if path.exists():
                write_jsonl(path, kept)
        if state.global_step == 0:
            self._write(model, args.output_dir, 0)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        """Answer, if this step is one of every `every`."""
        if state.global_step % self.every == 0:
            self._write(model, args.output_dir, state.global_step)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        """Answer with the last weights, or with the best if those are loaded at the end."""
        best = args.load_best_model_at_end and state.best_model_checkpoint
        step = state.best_global_step if best else state.global_step
        if step % self.every:
            self._write(model, args.output_dir, step)

    def _write(self, model, folder: str, step: int) -> None:
        if not self.asked:
            return
        template, tokenizer = self.encoder.template, self.encoder.text.tokenizer
        was_training = model.training
        model.eval()
        written = generate(
            model,
            tokenizer,
            [ids for ids, _, _ in self.asked],
            max_new_tokens=self.max_new_tokens,
            end_ids={end[-1] for _, end, _ in self.asked},
            stop=template.stop,
        )
        model.train(was_training)
        reshard(model)
        if not is_main_process():
            return
        path = Path(folder, SAMPLES)
        lines = [
            line for line in _read(path) if (line["task"], line["step"]) != (template.name, step)
        ]
        for (ids, _, answer), (sample,) in zip(self.asked, written, strict=True):
            text = sample.text
            for stop in template.stop:
                text = text.partition(stop)[0]
            prompt = tokenizer.decode(ids)
            line = {"step": step, "task": template.name, "prompt": prompt}
            lines.append({**line, "generated": text, "answer": answer})
        write_jsonl(path, lines)


def _read(path: Path) -> list[dict]:
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    try:
        return [json.loads(line) for line in lines if line]
    except ValueError:
        raise UserError(f"{path}: not what a run has written; delete it") from None
