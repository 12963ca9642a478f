"""Several tasks that are trained together, or only scored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from recipelib.data import (
    RowStream,
    draw_rows,
    origin_of,
    parse_columns,
    template_for,
    with_classes,
)
from recipelib.encoding import EncodedRows, encode_rows
from recipelib.evaluation import TaskScore, mean_score, records_of
from recipelib.models import describe_model
from recipelib.prompts import PromptTemplate
from recipelib.runtime import Store, UserError, say
from recipelib.task.task import (
    Task,
    begin,
    encode_train,
    load_rows_of,
    make_encoder,
    refuse_predict,
    require_causal,
    say_how_many,
)

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(kw_only=True)
class Mixture(Task):
    """Tasks that are trained together, and tasks that are only scored.

    Attributes:
        tasks: all of them; `train` is None for those that are only scored.
        shares: of each trained task the `rows` that are trained, how many rows a pass has of it
            (`rows_per_pass`, more where rows are repeated), and its supervised tokens in a pass;
            empty for a stream.
    """

    tasks: list[Task]
    shares: dict[str, dict[str, int]]

    @property
    def _trained(self) -> list[Task]:
        return [task for task in self.tasks if task.train]

    @property
    def templates(self) -> list[PromptTemplate]:
        """The templates that are trained."""
        return [template for task in self._trained for template in task.templates]

    @property
    def sources(self) -> dict[str, str]:
        """How many rows each task gives, for the plan; of a stream where they come from."""
        if not self.shares:
            return {stream.template.name: stream.source for stream in self.streams}
        return {name: _shown(share) for name, share in self.shares.items()}

    @property
    def skipped_rows(self) -> int:
        """Bad training rows that were left out."""
        return sum(task.skipped_rows for task in self._trained)

    @property
    def streams(self) -> list[RowStream]:
        """The training rows that are read while training."""
        return [stream for task in self._trained for stream in task.streams]

    def held_out(self) -> Dataset:
        """The trained tasks' evaluation rows as training examples."""
        from datasets import concatenate_datasets

        return concatenate_datasets([task.held_out() for task in self._trained])

    def score(self, model, name: str, **options: Any) -> TaskScore:
        """The mean over the trained tasks, where there is one; its `tasks` has the score of each,
        held out or not, and its records are those of all.
        """
        scores = {}
        for task in self.tasks:
            kind = "" if task.train else " (held out)"
            scores[task.template.name] = task.score(
                model, f"{name}, {task.template.name}{kind}", **options
            )
        mean = mean_score([scores[task.name] for task in self.templates])
        return replace(mean, tasks=scores, records=records_of(scores), class_names={})

    def compare(self, base: TaskScore, tuned: TaskScore) -> dict[str, dict]:
        """What metrics.json says of each task."""
        return {
            name: {
                **tuned.tasks[name].figures(base.tasks[name]),
                "eval_rows": tuned.tasks[name].rows,
                "heldout": task.train is None,
            }
            for task in self.tasks
            for name in [task.template.name]
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
    refuse_predict(args)
    require_causal(args, training)
    items, encoder, tasks, used = [*named, *heldout], None, [], set()
    store = Store.of(training)
    if args.template and args.dataset and len(items) > 1:
        raise UserError("--dataset: goes with one task; write TEMPLATE=DATA for each of several")
    for place, item in enumerate(items):
        template_name, _, data = item.partition("=")
        data = data or (args.dataset if args.template else None)
        if template_name == "auto":
            template, guess = template_for(
                data, args.train_split, args.streaming, args.encoding, args.field
            )
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
        args_of_task = replace(args, dataset=data)
        if args.streaming and len(items) > 1:
            raise UserError("--streaming true: reads one task; leave it out for several")
        template = with_classes(template, args_of_task, store)
        train, evaluation = load_rows_of(template, args_of_task, training, store)
        if encoder is None:
            encoder = make_encoder(template, args, training, plain_chat=True)
        tasks.append(
            Task(
                encoder=encoder.with_template(template),
                train=train if place < len(named) else None,
                store=store,
                origin=origin_of(template, args_of_task, published=training.publish),
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


def _shown(share: Mapping[str, int]) -> str:
    """A task's rows in words, and how often each stands in a pass where that is not once."""
    rows, shown = share["rows"], f"{share['rows']:,} rows"
    times, more = divmod(share["rows_per_pass"], rows)
    often = f"{times} or {times + 1}" if more else f"{times}"
    return shown if share["rows_per_pass"] == rows else f"{shown}, each {often} times"


def mix(tasks: list[Task], counts: Sequence[int], args, training) -> Mixture:
    """One pass over so many rows of each task that is trained, encoded."""
    trained = [task for task in tasks if task.train]
    first, shares = trained[0], {}
    if args.streaming:
        encoded = encode_train(first.train, [first.encoder], training, first.store)
    else:
        parts = []
        for task, count in zip(trained, counts, strict=True):
            rows = draw_rows(task.train.rows, count, training.seed)
            part = encode_rows(task.encoder, rows, seed=training.seed, store=task.store)
            parts.append(part)
            share = {"rows": min(count, len(task.train.rows)), "rows_per_pass": count}
            shares[task.template.name] = share | {"supervised": part.counts.supervised_tokens}
            if count > share["rows"]:
                say(f"{task.template.name}: {_shown(share)} in a pass, for --mixing {args.mixing}")
        encoded = EncodedRows.join(parts)
        distinct = sum(share["rows"] for share in shares.values())
        say_how_many(distinct, sum(task.train.available for task in trained))
        # A row that is repeated counts once.
        encoded = replace(encoded, counts=replace(encoded.counts, rows=distinct))
    mixture = Mixture(
        tasks=tasks,
        shares=shares,
        encoder=first.encoder,
        train=None,
        evaluation=first.evaluation,
        model_name=first.model_name,
        budget=first.budget,
        encoded=encoded,
        store=first.store,
    )
    begin(mixture, args, training)
    return mixture
