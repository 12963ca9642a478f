"""What every recipe begins with: a template, checked rows, a tokenizer and prepared examples; and
how the task is scored, before and after training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from recipelib.adapters import tokenizer_of_adapter
from recipelib.data import (
    Rows,
    RowStream,
    load_splits,
    load_streamed,
    origin_of,
    overlap,
    parse_columns,
    untrained_classes,
    with_classes,
)
from recipelib.encoding import (
    EncodedRows,
    PromptEncoder,
    encode_rows,
    encode_stream,
    ensure_chat_template,
    training_encoding,
)
from recipelib.evaluation import TaskScore, evaluate_task, identify_rows
from recipelib.models import describe_model, load_tokenizer, nature_of_model
from recipelib.prompts import PromptTemplate
from recipelib.runtime import MemoryMeter, Store, UserError, find_checkpoint, say

if TYPE_CHECKING:
    from datasets import Dataset

_SHOWN = 8  # classes


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
        store: where what is prepared lies.
        checkpoint: the one to go on from; None for a fresh start.
        origin: where the rows come from, as a template's `dataset` says it.
        memory: measures what is taken from now on; None where nothing will be trained.
    """

    encoder: PromptEncoder
    train: Rows | RowStream | None
    evaluation: Rows
    model_name: str
    budget: Mapping[str, Any]
    trained: Sequence[PromptEncoder] = ()
    encoded: EncodedRows = field(default_factory=EncodedRows)
    store: Store = field(default_factory=Store)
    checkpoint: str | None = None
    origin: Mapping[str, str] = field(default_factory=dict)
    memory: MemoryMeter | None = None

    @property
    def template(self) -> PromptTemplate:
        """The task's template."""
        return self.encoder.template

    @property
    def templates(self) -> list[PromptTemplate]:
        """The templates that a run keeps; their rows are those that it had."""
        return [self.template.with_dataset(self.origin)]

    @property
    def tokenizer(self):
        """The model's tokenizer."""
        return self.encoder.text.tokenizer

    @property
    def kind_of_model(self) -> dict[str, Any]:
        """What `load_model` has to know of the model that does this task."""
        return {}

    @property
    def read_by(self) -> dict[str, Any]:
        """What a run's metrics.json keeps of how answers are read, where not simply as text."""
        return {}

    @property
    def sources(self) -> dict[str, str]:
        """Where the rows come from, for the plan."""
        return {"train": self.train.source, "eval": self.evaluation.source}

    @property
    def skipped_rows(self) -> int:
        """Bad training rows that were left out."""
        return self.train.skipped

    @property
    def streams(self) -> list[RowStream]:
        """The training rows that are read while training."""
        return [self.train] if isinstance(self.train, RowStream) else []

    def held_out(self) -> Dataset:
        """The evaluation rows as training examples, to follow their loss while training."""
        rows, encoders = self.evaluation.rows, self.trained or [self.encoder]
        options = {"store": self.store, "kind": "evaluation"}
        parts = [encode_rows(encoder, rows, **options) for encoder in encoders]
        return EncodedRows.join(parts).examples

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
        result = evaluate_task(
            model,
            encoder,
            self.evaluation.rows,
            description=f"scoring {name}",
            **{**self.budget, **options},
        )
        identify_rows(result.records, self.evaluation.rows)
        say(f"{name}: {result}")
        return result


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
    refuse_predict(args)
    require_causal(args, training)
    template = template or load_template(args, training)
    store = Store.of(training)
    train, evaluation = load_rows_of(template, args, training, store)
    if not args.streaming:
        say_how_many(len(train.rows), train.available)
    own = tokenizer_of_adapter(getattr(args, "adapter", None))
    encoder = make_encoder(template, args, training, **own)
    encoders = [encoder.with_template(other) for other in trained] or [encoder]
    encoded = encode_train(train, encoders, training, store)
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
        store=store,
        origin=origin_of(template, args, published=training.publish),
    )
    begin(task, args, training)
    return task


def load_template(args, training=None) -> PromptTemplate:
    """The template that a recipe's arguments name, with their columns; classes that it leaves out
    are those of the rows.
    """
    template = PromptTemplate.load(args.template, columns=parse_columns(args.columns))
    return with_classes(template, args, Store.of(training) if training else None)


def encode_train(
    train: Rows | RowStream, encoders: Sequence[PromptEncoder], training, store: Store
) -> EncodedRows:
    """The training examples of rows, by one encoder after the other; of a stream row by row."""
    if isinstance(train, RowStream):
        encodings = [training_encoding(encoder, training.seed) for encoder in encoders]
        return encode_stream(train, encodings, training)
    return EncodedRows.join(
        [encode_rows(encoder, train.rows, seed=training.seed, store=store) for encoder in encoders],
        same_rows=True,
    )


def load_rows_of(
    template: PromptTemplate, args, training, store: Store
) -> tuple[Rows | RowStream, Rows]:
    """Training and evaluation rows of a template, checked; rows that are both are said, and classes
    that are never trained.
    """
    if args.streaming:
        if training.train_sampling_strategy != "random":
            say(
                f"--train_sampling_strategy {training.train_sampling_strategy}: needs the length "
                "of every row, which a stream does not tell; rows are drawn at random"
            )
            training.train_sampling_strategy = "random"
        train, evaluation = load_streamed(template, args, training, store)
        template.check_content_free(evaluation.rows[0])
        return train, evaluation
    train, evaluation = load_splits(template, args, training.seed, store=store)
    template.check_content_free(evaluation.rows[0])
    if getattr(args, "trains", True) and (absent := untrained_classes(train, template)):
        more = f" and {len(absent) - _SHOWN} more" if len(absent) > _SHOWN else ""
        say(
            f"warning: {template.name}: no training row has the class "
            f"{', '.join(map(repr, absent[:_SHOWN]))}{more}"
        )
    # Where nothing is trained, a file may be scored whole.
    same = train.source == evaluation.source
    if shared := 0 if same else overlap(train, evaluation, template):
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
    virtual_tokens: int = 0,
    tokenizer_of: str | None = None,
    vocabulary: int | None = None,
) -> PromptEncoder:
    """Encodes a template's questions with the tokenizer of a recipe's model, no longer than the
    model can read.

    Args:
        plain_chat: whether a tokenizer without a chat template is given a plain one.
        virtual_tokens: of a soft prompt, for which room is left.
        tokenizer_of: a folder whose tokenizer is taken instead, an adapter's.
        vocabulary: how many tokens the adapter has embeddings for, if not as many as the model.
    Raises:
        UserError: arguments for a chat template that is not used, or a tokenizer that does not fit
            the model.
    """
    nature = nature_of_model(args, training)
    tokenizer = load_tokenizer(
        tokenizer_of or args.model_name_or_path,
        revision=None if tokenizer_of else args.revision,
        trust_remote_code=training.trust_remote_code,
    )
    if training.pad_token is not None:
        if training.pad_token not in tokenizer.get_vocab():
            raise UserError(
                f"--pad_token {training.pad_token}: is not in the tokenizer's vocabulary; leave it "
                "out: padding is never trained, whatever stands there"
            )
        tokenizer.pad_token = training.pad_token
    if plain_chat and args.rendering == "chat" and ensure_chat_template(tokenizer):
        say("the tokenizer has no chat template: a plain one is used, and saved with the model")
    chat = args.rendering == "chat" or template.messages is not None
    checked = nature
    if tokenizer_of:
        name = f"{tokenizer_of}: does not fit {nature.name}"
        checked = replace(nature, name=name, vocabulary=vocabulary or nature.vocabulary)
    checked.check_tokens(tokenizer, chat)
    encoder = PromptEncoder(
        template,
        tokenizer,
        nature.fitting(training.max_length, tokenizer, virtual_tokens),
        args.rendering,
        args.chat_template_kwargs,
    )
    if args.chat_template_kwargs and not encoder.chat:
        raise UserError(
            "--chat_template_kwargs: changes nothing without --rendering chat; leave it out"
        )
    return encoder


def require_causal(args, training) -> None:
    """Refuse a model that would see each answer while it predicts it.

    Raises:
        UserError: it is a masked one.
    """
    if nature_of_model(args, training).masked:
        raise UserError(
            f"--model_name_or_path {args.model_name_or_path}: is a masked language model, which "
            "would see each answer while it predicts it; run recipes/cloze_sft.py, "
            "prompt_tuning.py or transfer_learning.py"
        )


def _require_experts(args, training) -> None:
    nature = nature_of_model(args, training)
    if not hasattr(nature.config.get_text_config(), "output_router_logits"):
        raise UserError(
            f"--router_aux_loss_coef: {nature.name} has no experts whose load it could balance; "
            "leave it out"
        )


def begin(task: Task, args, training) -> None:
    """Say what was kept, look for a checkpoint, and measure memory from here on: the model comes
    next.
    """
    task.store.say_what_was_kept()
    if training.router_aux_loss_coef is not None:
        _require_experts(args, training)
    if not args.preview:
        task.checkpoint = find_checkpoint(
            training.output_dir,
            training.resume_from_checkpoint,
            kind=args.checkpoints,
            model=args.model_name_or_path,
        )
        task.memory = MemoryMeter()


def refuse_options_of_texts(training) -> None:
    """Refuse options for training on all tokens of a text where labels are chosen.

    Raises:
        UserError: one of them is set.
    """
    for name in ("pad_to_multiple_of", "pad_token", "router_aux_loss_coef"):
        if getattr(training, name) is not None:
            raise UserError(f"--{name}: is for training to write, not to choose; leave it out")


def refuse_predict(args) -> None:
    """Refuse to train where rows are to be answered, which `run_recipe` does."""
    if args.predict:
        raise UserError(
            "--predict: is for the command line; from Python call answer_file(args, training) of "
            "recipelib.reporting"
        )


def say_how_many(count: int, available: int) -> None:
    """Say that not all rows are trained on, where that is so."""
    if count < available:
        say(f"training on {count:,} of {available:,} rows; --max_train_samples -1 takes all")
