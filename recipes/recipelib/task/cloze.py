"""A task that is asked and trained through label words: what follows a prompt, or fills a cloze."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from recipelib.adapters import tokenizer_of_adapter
from recipelib.data import RowStream, few_shot_rows, origin_of
from recipelib.encoding import (
    CausalAsker,
    ClozeRows,
    EncodedRows,
    Encoding,
    MaskedAsker,
    asker_of,
    before_cloze,
    check_words,
    cloze_encoding,
    encode_cloze_rows,
    encode_into,
    encode_stream,
    label_word_ids,
)
from recipelib.evaluation import TaskScore, identify_rows, score_cloze
from recipelib.models import describe_model, nature_of_model
from recipelib.prompts import PromptTemplate, Question
from recipelib.runtime import (
    MemoryMeter,
    Store,
    UserError,
    check_trained,
    clear_results,
    find_checkpoint,
    is_main_process,
    say,
)
from recipelib.task.task import (
    Task,
    load_rows_of,
    load_task,
    load_template,
    make_encoder,
    refuse_options_of_texts,
    refuse_predict,
)

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(kw_only=True)
class ClozeTask(Task):
    """A task with label words, asked and trained through the words' likelihood.

    Attributes:
        asker: how the model is asked.
        masked: whether that is a masked language model.
        question: one of the task's, to see the words in their place.
        words: label -> the ids of its words as they stand there.
        scored: the evaluation rows as they are computed.
        facts: what a run's metrics.json keeps of how it is asked.
        trained_as: the arguments that decide what is trained, for a checkpoint to be compared with.
        validation: rows to choose the best pass by; None without few-shot draws.
    """

    asker: CausalAsker | MaskedAsker
    masked: bool
    question: Question
    words: Mapping[str, list[list[int]]]
    scored: ClozeRows
    facts: dict[str, Any]
    trained_as: dict[str, str]
    validation: ClozeRows | None = None

    @property
    def kind_of_model(self) -> dict[str, Any]:
        """Whether it is a masked one."""
        return {"masked": self.masked}

    @property
    def read_by(self) -> dict[str, Any]:
        """How label words are read."""
        return self.facts

    def held_out(self) -> Dataset:
        """The evaluation rows, to follow their loss while training."""
        return self._training_examples(self.evaluation.rows).examples

    def _training_examples(self, rows: Sequence[Mapping]) -> EncodedRows:
        return encode_into(self.store, rows, self._encoding())

    def _encoding(self) -> Encoding:
        return cloze_encoding(self.asker, soft=self.facts["verbalizer"] == "soft")

    def encode(self, rows: Sequence[Mapping], **options: Any) -> ClozeRows:
        """Rows as they are computed."""
        soft = self.facts["verbalizer"] == "soft"
        return encode_cloze_rows(self.asker, rows, soft=soft, **options)

    def score(self, model, name: str | None, rows: ClozeRows | None = None) -> TaskScore:
        """Fill the cloze of every evaluation row, or of others, and say how well the model did;
        without a name nothing is said.
        """
        result = score_cloze(
            model,
            self.asker,
            rows or self.scored,
            combine=self.facts["combine"],
            calibrate=self.facts["calibrate"],
            batch_tokens=self.budget["batch_tokens"],
            description=name and f"scoring {name}",
        )
        if name:
            identify_rows(result.records, self.evaluation.rows)
            say(f"{name}: {result}")
        return result

    def score_untouched(self, model) -> TaskScore:
        """The score of the model as it is: by the label words, even if labels will have embeddings
        of their own.
        """
        rows = encode_cloze_rows(self.asker, self.evaluation.rows)
        with self.memory.sampling() if self.memory else nullcontext():  # where nothing is trained
            return self.score(model, "untouched model", rows)

    def validate(self, model) -> tuple[float, float]:
        """The score of the validation rows, and the mean score of their labels, which
        decides between equals.
        """
        result = self.score(model, None, self.validation)
        right = [record["scores"][record["answer"]] for record in result.records]
        return result.score, sum(right) / len(right)

    def draws(self, args, training) -> Iterator[tuple[ClozeTask, Any]]:
        """The task and the trainer's arguments of each run: one over all training rows, or one
        for each few-shot draw, in a folder of its own.
        """
        if args.draws > 1 and is_main_process():  # until all are done again
            Path(training.output_dir, "metrics.json").unlink(missing_ok=True)
        for draw, folder in enumerate(_folders(args, training)):
            run = copy.copy(training)
            run.accelerator_config = copy.deepcopy(training.accelerator_config)  # it is written to
            run.seed, run.output_dir = training.seed + draw, folder
            rows, validation = self.train.rows, None
            if args.per_class:
                rows, chosen = few_shot_rows(self.template, rows, args.per_class, run.seed)
                validation = self.encode(chosen)
            if isinstance(self.train, RowStream):
                encoded = encode_stream(self.train, [self._encoding()], run)
            else:
                encoded = self._training_examples(rows)
            self.store.say_what_was_kept()
            memory = MemoryMeter()
            yield replace(self, encoded=encoded, validation=validation, memory=memory), run
        if args.draws > 1:  # then nothing of another run stands beside them
            clear_results(training.output_dir, str(args.model_name_or_path), args.draws)


def _folders(args, training) -> list[str]:
    if args.draws == 1:
        return [training.output_dir]
    return [f"{training.output_dir}/draw_{draw}" for draw in range(args.draws)]


def load_cloze_task(
    args,
    training,
    template: PromptTemplate | None = None,
    *,
    virtual_tokens: int = 0,
    trained_as: Sequence[str] = (),
    trains: bool = True,
) -> ClozeTask:
    """As `load_task`, for what is asked and trained through label words; training rows are encoded
    when they are drawn.

    Args:
        args: a recipe's `ClozeArguments`.
        virtual_tokens: of a soft prompt, for which room is left.
        trained_as: names of the arguments that decide what is trained.
        trains: False where the model is only scored.
    Raises:
        UserError: as `load_task`, or no label words.
    """
    refuse_predict(args)
    if args.streaming and not trains:
        raise UserError("--streaming: nothing is trained; leave it out")
    if training.publish and not trains:
        raise UserError("--push_to_hub: nothing is trained; leave it out")
    if virtual_tokens and training.neftune_noise_alpha:
        raise UserError(
            "--neftune_noise_alpha: is for training a model, not a prompt in front; leave it out"
        )
    _refuse_cloze_options(args, training)
    template = template or load_template(args, training)
    if not template.label:
        raise UserError(f"{template.path}: verbalizer: is missing; a cloze is read by its words")
    if template.options and args.soft_verbalizer:
        raise UserError(
            f"--soft_verbalizer: learns an embedding per class, and the options of "
            f"{template.path.name} differ from row to row; leave it out"
        )
    store = Store.of(training)
    train, evaluation = load_rows_of(template, args, training, store)
    masked = nature_of_model(args, training).masked
    own = tokenizer_of_adapter(getattr(args, "adapter", None))
    encoder = make_encoder(template, args, training, virtual_tokens=virtual_tokens, **own)
    asker = asker_of(encoder, masked, args.cloze)
    question = template.questions(train.rows[0])[0]
    words = label_word_ids(asker, question)
    if template.verbalizer:
        before = before_cloze(asker, question, next(iter(template.verbalizer.values()))[0])
        for note in check_words(template, encoder.text, words, before):
            say(note)
    task = ClozeTask(
        encoder=encoder,
        train=train,
        evaluation=evaluation,
        model_name=describe_model(args.model_name_or_path),
        budget={"batch_tokens": args.eval_batch_tokens},
        asker=asker,
        masked=masked,
        question=question,
        words=words,
        scored=encode_cloze_rows(asker, evaluation.rows, soft=args.soft_verbalizer),
        store=store,
        origin=origin_of(template, args, published=training.publish),
        facts={
            "masked": masked,
            "cloze": masked or args.cloze,
            "verbalizer": "soft" if args.soft_verbalizer else "hard",
            "combine": args.combine,
            "calibrate": args.calibrate,
        },
        trained_as={name: str(getattr(args, name)) for name in trained_as},
    )
    store.say_what_was_kept()
    if args.preview:
        return task
    for draw, folder in enumerate(_folders(args, training)) if trains else ():
        if args.per_class:  # fails where the rows are too few
            few_shot_rows(template, train.rows, args.per_class, training.seed + draw)
        task.checkpoint = find_checkpoint(
            folder,
            training.resume_from_checkpoint,
            check=lambda folder: check_trained(folder, task.trained_as),
            model=args.model_name_or_path,
        )
    if not trains:
        task.memory = MemoryMeter()  # else each draw has its own
    return task


def load_word_task(args, training) -> Task:
    """A task that is trained through its answers by a causal model, and through its label words by
    a masked one.

    Args:
        args: a recipe's `RecipeArguments`.
    """
    if not nature_of_model(args, training).masked:
        return load_task(args, training)
    plain = {"cloze": False, "combine": "logsumexp", "soft_verbalizer": False, "calibrate": False}
    asked = SimpleNamespace(**vars(args), **plain, per_class=None, draws=1)
    task = load_cloze_task(asked, training)
    if args.preview:
        return task
    prepared, _ = next(task.draws(asked, training))
    return prepared


def _refuse_cloze_options(args, training) -> None:
    if args.per_class and args.streaming:
        raise UserError("--per_class: draws rows of each class from all; leave out --streaming")
    if args.per_class and training.resume_from_checkpoint:
        raise UserError("--resume_from_checkpoint: few-shot runs are short; leave it out")
    if training.packing:
        raise UserError("--packing: rows with a cloze are padded; leave it out")
    refuse_options_of_texts(training)
    if training.load_best_model_at_end:
        raise UserError("--load_best_model_at_end: --per_class keeps the best pass; leave it out")
    if args.draws > 1 and training.publish:
        raise UserError("--push_to_hub: which of the draws? Upload one, or train one")
