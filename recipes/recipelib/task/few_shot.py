"""A task that a frozen model is asked with demonstrations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipelib.adapters import SOFT_VERBALIZER, base_of, resolve_adapter, tokenizer_of_adapter
from recipelib.data import load_asked
from recipelib.encoding import CausalAsker, MaskedAsker, asker_of
from recipelib.models import describe_model, nature_of_model
from recipelib.prompts import PromptTemplate
from recipelib.runtime import (
    MemoryMeter,
    Store,
    UserError,
    kept_templates,
    read_metrics,
    refuse_trained_run,
    say,
)
from recipelib.task.task import Task, load_template, make_encoder


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
    if args.streaming:
        raise UserError("--streaming: nothing is trained; leave it out")
    if training.publish:
        raise UserError("--push_to_hub: nothing is trained; leave it out")
    adapter = _as_trained(args)
    template = load_template(args, training)
    if args.reasoning == "none" and template.rationale:
        template = template.without_rationale()
    # Before a conversation there is no place for demonstrations.
    usual = 0 if template.conversation else template.demonstrations["k"]
    shots = usual if args.shots is None else args.shots
    if args.reasoning == "trigger":
        if args.shots:
            raise UserError(f"--shots {args.shots}: --reasoning trigger has none; leave it out")
        shots = 0
    sampler = args.sampler or template.demonstrations["sampler"]
    if not shots and (args.sampler or args.draws > 1):
        name = "sampler" if args.sampler else "draws"
        raise UserError(f"--{name}: changes nothing without demonstrations; pass --shots")
    if args.nearest_by != "bm25" and not (shots and sampler == "nearest"):
        raise UserError("--nearest_by: changes nothing without --sampler nearest; leave it out")
    store = Store.of(training)
    pool, asked = load_asked(template, args, training.seed, shots=shots, store=store)
    template.check_content_free(asked.rows[0])
    store.say_what_was_kept()
    refuse_trained_run(training.output_dir)
    masked = nature_of_model(args, training).masked
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
    if args.temperature and not writes:
        raise UserError(
            f"--temperature {args.temperature:g}: {template.name} is answered by the likeliest "
            "label, and nothing is written; leave it out, or add --reasoning trigger"
        )
    drawn = args.temperature and not (args.predict and args.samples == 1)
    if template.metric == "loss" and (drawn or args.reasoning == "trigger"):
        name = "samples" if args.samples > 1 else "temperature" if args.temperature else "reasoning"
        raise UserError(
            f"--{name} {getattr(args, name)}: {template.name} is scored by the loss of what is "
            "there, and nothing is written; leave it out"
        )
    if args.score != "sum" and writes:
        raise UserError(
            f"--score {args.score}: answers of {template.name} are written; leave it out"
        )
    encoder = make_encoder(template, args, training, **tokenizer_of_adapter(adapter))
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
        sampler=sampler,
        writes=writes,
        adapter=adapter,
    )


def _as_trained(args) -> Path | None:
    """The folder of the adapter to put on the model, if one is named. What the command line leaves
    open is filled in as it was when the adapter, or the whole model, was trained, and that is said.

    Raises:
        UserError: no adapter there, or one that cannot be asked; or a run of several tasks.
    """
    adapter, folder = None, Path(args.model_name_or_path or "").expanduser()
    said = f"--model_name_or_path {args.model_name_or_path}"
    if args.adapter:
        adapter = folder = resolve_adapter(args.adapter)
        said = f"--adapter {args.adapter}"
        if (adapter / SOFT_VERBALIZER).exists():
            raise UserError(
                f"{said}: was trained with --soft_verbalizer, whose labels have no words to ask "
                "for; --predict of its own recipe answers with it"
            )
        base, revision = base_of(adapter)
        if not args.model_name_or_path:
            args.model_name_or_path, args.revision = base, args.revision or revision
    run = read_metrics(folder) if adapter or args.model_name_or_path else {}
    if adapter or run.get("trainable_parameters"):
        _fill_in(args, run, kept_templates(folder), said)
    args.template, args.rendering = args.template or "movie_reviews", args.rendering or "text"
    return adapter


def _fill_in(args, run: Mapping[str, Any], kept: Mapping[str, Path], said: str) -> None:
    """Fill in the template, with the rows that it names, and the rendering.

    Args:
        run: what the run's metrics.json holds.
        kept: its templates.
        said: the option that names it.
    """
    taken, rendering = [], run.get("rendering")
    if len(kept) > 1 and not args.template:
        raise UserError(
            f"{said}: was trained on {', '.join(kept)}; pass --template and the one to ask"
        )
    path = kept.get(args.template) if args.template else next(iter(kept.values()), None)
    if path:
        args.template = str(path)
        taken.append(f"its {path.name}")
        rows = PromptTemplate.load(args.template).dataset.get("path")
        if rows and not args.dataset and not args.predict:
            taken.append(f"its rows ({rows})")
    if rendering and not args.rendering:
        args.rendering = rendering
        taken.append(f"--rendering {rendering}")
    if rendering == args.rendering:
        args.chat_template_kwargs = args.chat_template_kwargs or run.get("chat_template_kwargs")
    elif rendering:
        what = "adapter" if args.adapter else "model"
        say(f"warning: the {what} was trained with --rendering {rendering}: ask so, too")
    if taken:
        name = args.adapter or args.model_name_or_path
        say(f"{name}: is asked as it was trained, with {', '.join(taken)}")
