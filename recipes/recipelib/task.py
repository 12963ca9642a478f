"""What every recipe begins with: a template, checked rows, a tokenizer and prepared examples; and how
the task is scored, before and after training.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from recipelib.adapters import base_of, resolve_adapter
from recipelib.data import (
    Rows,
    draw_rows,
    few_shot_rows,
    load_asked,
    load_splits,
    overlap,
    parse_columns,
    template_for,
)
from recipelib.encoding import (
    CausalAsker,
    ClozeRows,
    EncodedRows,
    MaskedAsker,
    PromptEncoder,
    asker_of,
    before_cloze,
    check_words,
    encode_cloze_rows,
    encode_rows,
    ensure_chat_template,
    label_word_ids,
)
from recipelib.evaluation import TaskScore, evaluate_task, mean_score, score_cloze
from recipelib.models import (
    describe_model,
    is_masked,
    load_tokenizer,
    most_positions,
    stored_config,
)
from recipelib.prompts import PromptTemplate, Question
from recipelib.runtime import (
    MemoryMeter,
    UserError,
    check_trained,
    find_checkpoint,
    is_main_process,
    progress,
    read_metrics,
    refuse_trained_run,
    say,
)


@dataclass(kw_only=True)
class Task:
    """A template with its rows, prepared for a model.

    Attributes:
        encoder: encodes rows as they are asked; its template is the one that counts.
        train, evaluation: checked rows; `train` is None for a task that is only scored.
        model_name: of the model, for reports.
        budget: how much of a model's time scoring takes: `max_new_tokens`, `batch_tokens`.
        trained: the encoders of what is trained; the task's own where that is empty.
        encoded: the training examples.
        checkpoint: the one to go on from; None for a fresh start.
        memory: measures what is taken from now on; None where nothing will be trained.
    """

    encoder: PromptEncoder
    train: Rows | None
    evaluation: Rows
    model_name: str
    budget: Mapping[str, Any]
    trained: Sequence[PromptEncoder] = ()
    encoded: EncodedRows = field(default_factory=EncodedRows)
    checkpoint: str | None = None
    memory: MemoryMeter | None = None

    @property
    def template(self) -> PromptTemplate:
        """The task's template."""
        return self.encoder.template

    @property
    def templates(self) -> list[PromptTemplate]:
        """The templates that a run keeps."""
        return [self.template]

    @property
    def tokenizer(self):
        """The model's tokenizer."""
        return self.encoder.text.tokenizer

    @property
    def sources(self) -> dict[str, str]:
        """Where the rows come from, for the plan."""
        return {"train": self.train.source, "eval": self.evaluation.source}

    @property
    def skipped_rows(self) -> int:
        """Bad training rows that were left out."""
        return self.train.skipped

    def held_out(self) -> list[dict]:
        """The evaluation rows as training examples, to follow their loss while training."""
        parts = [encode_rows(one, self.evaluation.rows) for one in self.trained or [self.encoder]]
        return [example for part in parts for example in part.examples]

    def score(
        self, model, name: str, *, template: PromptTemplate | None = None, **options: Any
    ) -> TaskScore:
        """Ask a model about the evaluation rows and say how well it did.

        Args:
            model: causal, on its device; under FSDP sharded, then all processes have to call.
            name: what the model is called: "base model".
            template: ask so instead of by the task's own template.
            options: further ones of `evaluate_task`.
        """
        encoder = self.encoder.with_template(template) if template else self.encoder
        found = evaluate_task(
            model,
            encoder,
            self.evaluation.rows,
            description=f"scoring {name}",
            **{**self.budget, **options},
        )
        say(f"{name}: {found}")
        return found


def load_task(
    args,
    training,
    template: PromptTemplate | None = None,
    *,
    trained: Sequence[PromptTemplate] = (),
) -> Task:
    """Load what a recipe's arguments name, check all of it and prepare the training examples. No
    model is loaded.

    Args:
        args: a recipe's `RecipeArguments`.
        training: its `RecipeConfig`.
        template: the task, if it is not simply `args.template`.
        trained: templates by which each row is trained, instead of this one.
    Raises:
        UserError: a mistake in the arguments, the template or the rows; no row fits.
    """
    _refuse_predict(args)
    template = template or load_template(args)
    train, evaluation = load_rows_of(template, args, training.seed)
    _say_how_many(len(train.rows), train.available)
    encoder = make_encoder(template, args, training)
    encoders = [encoder.with_template(one) for one in trained] or [encoder]
    encoded = EncodedRows()
    for one in encoders:
        bar = progress("encoding")
        encoded.extend(encode_rows(one, train.rows, seed=training.seed, progress=bar))
    task = Task(
        encoder=encoder,
        train=train,
        evaluation=evaluation,
        model_name=describe_model(args.model_name_or_path),
        # Written answers may be a quarter longer than those trained, unless the user says.
        budget={
            "max_new_tokens": args.max_new_tokens or encoded.longest_target * 5 // 4,
            "batch_tokens": args.eval_batch_tokens,
        },
        trained=encoders,
        encoded=encoded,
    )
    _begin(task, args, training)
    return task


def load_template(args) -> PromptTemplate:
    """The template that a recipe's arguments name, with their columns."""
    return PromptTemplate.load(args.template, columns=parse_columns(args.columns))


def load_rows_of(template: PromptTemplate, args, seed: int) -> tuple[Rows, Rows]:
    """Training and evaluation rows of a template, checked; rows that are both are said."""
    train, evaluation = load_splits(template, args, seed, progress=progress("checking"))
    if shared := overlap(train, evaluation, template):
        say(
            f"warning: {template.name}: {shared} evaluation rows are training rows too; the score "
            "will flatter"
        )
    return train, evaluation


def make_encoder(
    template: PromptTemplate,
    args,
    training,
    *,
    plain_chat: bool = False,
    room: Callable[[Any], int] | None = None,
) -> PromptEncoder:
    """Encodes a template's questions with the tokenizer of a recipe's model.

    Args:
        plain_chat: whether a tokenizer without a chat template is given a plain one.
        room: from a tokenizer the most tokens that a text may have, if not `max_length`.
    """
    tokenizer = load_tokenizer(
        args.model_name_or_path,
        revision=args.revision,
        trust_remote_code=training.trust_remote_code,
    )
    if plain_chat and args.rendering == "chat" and ensure_chat_template(tokenizer):
        say("the tokenizer has no chat template: a plain one is used, and saved with the model")
    return PromptEncoder(
        template,
        tokenizer,
        room(tokenizer) if room else training.max_length,
        args.rendering,
        args.chat_template_kwargs,
    )


def _begin(task: Task, args, training) -> None:
    """Look for a checkpoint, and measure memory from here on: the model comes next."""
    if not args.preview:
        task.checkpoint = find_checkpoint(training.output_dir, training.resume_from_checkpoint)
        task.memory = MemoryMeter()


def _refuse_predict(args) -> None:
    if args.predict:
        raise UserError(
            "--predict: is for the command line; from Python call answer_file(args, training) of "
            "recipelib.reporting"
        )


def _say_how_many(count: int, available: int) -> None:
    if count < available:
        say(f"training on {count:,} of {available:,} rows; --max_train_samples -1 takes all")


# Several tasks ------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Mixture(Task):
    """Tasks that are trained together, and tasks that are only scored.

    Attributes:
        tasks: all of them; `train` is None for those that are only scored.
        shares: by trained task the rows and supervised tokens that it gives one pass.
    """

    tasks: list[Task]
    shares: dict[str, dict[str, int]]

    @property
    def _trained(self) -> list[Task]:
        return [task for task in self.tasks if task.train]

    @property
    def templates(self) -> list[PromptTemplate]:
        """The templates that are trained."""
        return [task.template for task in self._trained]

    @property
    def sources(self) -> dict[str, str]:
        """How many rows each task gives, for the plan."""
        return {name: f"{share['rows']:,} rows" for name, share in self.shares.items()}

    @property
    def skipped_rows(self) -> int:
        """Bad training rows that were left out."""
        return sum(task.skipped_rows for task in self._trained)

    def held_out(self) -> list[dict]:
        """The trained tasks' evaluation rows as training examples."""
        return [example for task in self._trained for example in task.held_out()]

    def score(self, model, name: str, **options: Any) -> TaskScore:
        """The mean over the trained tasks; its `tasks` has the score of each, held out or not."""
        scores = {}
        for task in self.tasks:
            kind = "" if task.train else " (held out)"
            scores[task.template.name] = task.score(
                model, f"{name}, {task.template.name}{kind}", **options
            )
        found = mean_score({task.name: scores[task.name] for task in self.templates})
        return replace(found, tasks=scores)

    def compare(self, base: TaskScore, tuned: TaskScore) -> dict[str, dict]:
        """What metrics.json says of each task."""
        return {
            task.template.name: {
                "metric": tuned.tasks[task.template.name].metric,
                "score": tuned.tasks[task.template.name].score,
                "stderr": tuned.tasks[task.template.name].stderr,
                "base_score": base.tasks[task.template.name].score,
                "eval_rows": tuned.tasks[task.template.name].rows,
                "heldout": task.train is None,
            }
            for task in self.tasks
        }


def load_tasks(args, training, named: Sequence[str], heldout: Sequence[str] = ()) -> list[Task]:
    """Several tasks with their rows, which are not encoded yet (see `mix`): those to be trained,
    then those that are only scored.

    Args:
        args: of a recipe; its `columns` may name a task: sst2.text=review.
        named, heldout: each TEMPLATE or TEMPLATE=DATA; auto=DATA guesses the template.
    Raises:
        UserError: arguments or rows that will not do.
    """
    _refuse_predict(args)
    items, encoder, tasks, used = [*named, *heldout], None, [], set()
    if args.template and args.dataset and len(items) > 1:
        raise UserError("--dataset: goes with one task; write TEMPLATE=DATA for each of several")
    for place, item in enumerate(items):
        template_name, _, data = item.partition("=")
        data = data or (args.dataset if args.template else None)
        if template_name == "auto":
            template, guess = template_for(data, args.train_split)
            say(f"{data}: {guess}")
        else:
            template = PromptTemplate.load(template_name)
        columns = {}
        for given in args.columns:
            task, dot, mapping = given.partition(".")
            if not dot and len(items) > 1:
                raise UserError(f"--columns {given}: of which task? Write TASK.variable=column")
            if not dot or task == template.name:
                columns |= parse_columns([mapping if dot else given])
                used.add(given)
        template = template.with_columns(columns)
        if template.name in [task.template.name for task in tasks]:
            raise UserError(f"--template {item}: a task {template.name!r} is there; rename one")
        train, evaluation = load_rows_of(template, replace(args, dataset=data), training.seed)
        if encoder is None:
            encoder = make_encoder(template, args, training, plain_chat=True)
        tasks.append(
            Task(
                encoder=encoder.with_template(template),
                train=train if place < len(named) else None,
                evaluation=evaluation,
                model_name=describe_model(args.model_name_or_path),
                budget={
                    "max_new_tokens": args.max_new_tokens,
                    "batch_tokens": args.eval_batch_tokens,
                },
            )
        )
    if unused := [given for given in args.columns if given not in used]:
        raise UserError(f"--columns {unused[0]}: there is no such task")
    return tasks


def mix(tasks: list[Task], counts: Sequence[int], args, training) -> Mixture:
    """One pass over so many rows of each task that is trained, encoded."""
    trained = [task for task in tasks if task.train]
    _say_how_many(sum(counts), sum(task.train.available for task in trained))
    encoded, shares = EncodedRows(), {}
    for task, count in zip(trained, counts, strict=True):
        rows = draw_rows(task.train.rows, count, training.seed)
        part = encode_rows(task.encoder, rows, seed=training.seed, progress=progress("encoding"))
        encoded.extend(part)
        shares[task.template.name] = {"rows": count, "supervised": part.counts.supervised_tokens}
    first = trained[0]
    mixture = Mixture(
        tasks=tasks,
        shares=shares,
        encoder=first.encoder,
        train=None,
        evaluation=first.evaluation,
        model_name=first.model_name,
        budget=first.budget,
        encoded=encoded,
    )
    _begin(mixture, args, training)
    return mixture


# Through a cloze ----------------------------------------------------------------------------------


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

    def held_out(self) -> list[dict]:
        """The evaluation rows, to follow their loss while training."""
        return self.scored.encoded.examples

    def encode(self, rows: Sequence[Mapping], **options: Any) -> ClozeRows:
        """Rows as they are computed."""
        soft = self.facts["verbalizer"] == "soft"
        return encode_cloze_rows(self.asker, rows, soft=soft, **options)

    def score(self, model, name: str | None, rows: ClozeRows | None = None) -> TaskScore:
        """Fill the cloze of every evaluation row, or of others, and say how well the model did;
        without a name nothing is said.
        """
        found = score_cloze(
            model,
            self.asker,
            rows or self.scored,
            combine=self.facts["combine"],
            calibrate=self.facts["calibrate"],
            batch_tokens=self.budget["batch_tokens"],
            description=name and f"scoring {name}",
        )
        if name:
            say(f"{name}: {found}")
        return found

    def score_untouched(self, model) -> TaskScore:
        """The score of the model as it is: by the label words, even if labels will have embeddings
        of their own.
        """
        rows = encode_cloze_rows(self.asker, self.evaluation.rows)
        return self.score(model, "untouched model", rows)

    def validate(self, model) -> tuple[float, float]:
        """The score of the validation rows, and the mean log-likelihood of their labels, which
        decides between equals.
        """
        found = self.score(model, None, self.validation)
        right = [record["log_likelihoods"][record["answer"]] for record in found.records]
        return found.score, sum(right) / len(right)

    def draws(self, args, training) -> Iterator[tuple[ClozeTask, Any]]:
        """The task and the trainer's arguments of each run: one over all training rows, or one
        for each few-shot draw, in a folder of its own.
        """
        for draw, folder in enumerate(_folders(args, training)):
            run = copy.copy(training)
            run.accelerator_config = copy.deepcopy(training.accelerator_config)  # it is written to
            run.seed, run.output_dir = training.seed + draw, folder
            rows, validation = self.train.rows, None
            if args.per_class:
                rows, chosen = few_shot_rows(self.template, rows, args.per_class, run.seed)
                validation = self.encode(chosen)
            encoded = self.encode(rows, progress=progress("encoding")).encoded
            memory = MemoryMeter()
            yield replace(self, encoded=encoded, validation=validation, memory=memory), run


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
    _refuse_predict(args)
    _refuse_cloze_options(args, training)
    template = template or load_template(args)
    if not template.label:
        raise UserError(f"{template.path}: verbalizer: is missing; a cloze is read by its words")
    train, evaluation = load_rows_of(template, args, training.seed)
    masked = is_masked(stored_config(args.model_name_or_path, revision=args.revision))

    def room(tokenizer) -> int:
        fits = min(training.max_length, tokenizer.model_max_length)
        if virtual_tokens >= fits:
            raise UserError(f"--virtual_tokens {virtual_tokens}: {fits} tokens fit; ask for fewer")
        return fits - virtual_tokens

    encoder = make_encoder(template, args, training, room=room)
    asker = asker_of(encoder, masked, args.cloze)
    question = template.questions(train.rows[0])[0]
    words = label_word_ids(asker, question)
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
        facts={
            "masked": masked,
            "cloze": masked or args.cloze,
            "verbalizer": "soft" if args.soft_verbalizer else "hard",
            "combine": args.combine,
            "calibrate": args.calibrate,
        },
        trained_as={name: str(getattr(args, name)) for name in trained_as},
    )
    if args.preview:
        return task
    for draw, folder in enumerate(_folders(args, training)) if trains else ():
        if args.per_class:  # fails where the rows are too few
            few_shot_rows(template, train.rows, args.per_class, training.seed + draw)
        task.checkpoint = find_checkpoint(
            folder,
            training.resume_from_checkpoint,
            check=lambda found: check_trained(found, task.trained_as),
        )
    if args.draws > 1 and is_main_process():  # until all are done again
        Path(training.output_dir, "metrics.json").unlink(missing_ok=True)
    task.memory = MemoryMeter()
    return task


def _refuse_cloze_options(args, training) -> None:
    if args.per_class and training.resume_from_checkpoint:
        raise UserError("--resume_from_checkpoint: few-shot runs are short; leave it out")
    if training.packing:
        raise UserError("--packing: rows with a cloze are padded; leave it out")
    if training.load_best_model_at_end:
        raise UserError("--load_best_model_at_end: --per_class keeps the best pass; leave it out")
    if args.draws > 1 and training.publish:
        raise UserError("--push_to_hub: which of the draws? Upload one, or train one")


# With demonstrations -------------------------------------------------------------------------------


@dataclass(kw_only=True)
class FewShotTask(Task):
    """A task that a frozen model is asked with demonstrations; nothing is trained.

    Attributes:
        train: the rows that demonstrations are drawn from; None without demonstrations.
        evaluation: the rows that are asked.
        asker: how the model is asked for one of several labels.
        masked: whether that is a masked language model.
        shots, sampler: how many demonstrations stand in a prompt, and which.
        writes: whether answers are written, or chosen by their likelihood.
        adapter: the folder of the adapter to put on the model.
    """

    asker: CausalAsker | MaskedAsker
    masked: bool
    shots: int
    sampler: str
    writes: bool
    adapter: Path | None


def load_few_shot_task(args, training) -> FewShotTask:
    """As `load_task`, for rows that are asked with demonstrations before them.

    Args:
        args: of `icl_eval.py`; an adapter's base model is filled in.
    Raises:
        UserError: as `load_task`, or options that do not fit the task or the model.
    """
    template, adapter = load_template(args), None
    if args.reasoning == "none" and template.rationale:
        template = template.without_rationale()
    shots = template.demonstrations["k"] if args.shots is None else args.shots
    if args.reasoning == "trigger":
        shots = 0
    pool, asked = load_asked(
        template, args, training.seed, shots=shots, progress=progress("checking")
    )
    if args.adapter:
        adapter = resolve_adapter(args.adapter)
        base, revision = base_of(adapter)
        if not args.model_name_or_path:
            args.model_name_or_path, args.revision = base, args.revision or revision
        rendering = read_metrics(str(adapter)).get("rendering", args.rendering)
        if rendering != args.rendering:
            say(f"warning: the adapter was trained with --rendering {rendering}: ask so, too")
    refuse_trained_run(training.output_dir)
    config = stored_config(args.model_name_or_path, revision=args.revision)
    masked = is_masked(config)
    if masked and args.reasoning == "trigger":
        raise UserError("--reasoning trigger: a masked model writes nothing; pass a causal model")
    # Closed answers are scored; what a model reasons or answers freely is written.
    writes = not template.label or args.reasoning == "trigger"
    writes = writes or (template.rationale is not None and not masked)
    if args.samples > 1 and not writes:
        raise UserError(
            f"--samples {args.samples}: {template.name} is answered by the likeliest label, which "
            "is always the same; leave it out, or add --reasoning trigger"
        )
    if args.score != "sum" and writes:
        raise UserError(
            f"--score {args.score}: answers of {template.name} are written; leave it out"
        )

    def room(tokenizer) -> int:
        return min(training.max_length, tokenizer.model_max_length, most_positions(config))

    encoder = make_encoder(template, args, training, room=room)
    return FewShotTask(
        encoder=encoder,
        train=pool,
        evaluation=asked,
        model_name=describe_model(args.model_name_or_path),
        budget={"batch_tokens": args.eval_batch_tokens, "description": "scoring"},
        memory=MemoryMeter(),
        asker=asker_of(encoder, masked, cloze=False),
        masked=masked,
        shots=shots,
        sampler=args.sampler or template.demonstrations["sampler"],
        writes=writes,
        adapter=adapter,
    )
