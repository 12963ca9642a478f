"""--predict: rows without answers in, predictions out, with what a run of any recipe left."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from recipelib.activations import FrozenLayers, pooled_states
from recipelib.adapters import load_tuned
from recipelib.data import load_questions, parse_columns
from recipelib.encoding import (
    PromptEncoder,
    asker_of,
    class_asker,
    encode_class_rows,
    encode_cloze_rows,
)
from recipelib.evaluation import (
    TaskScore,
    evaluate_task,
    identify_rows,
    score_chosen,
    score_classes,
    score_cloze,
)
from recipelib.models import (
    four_bit_loading,
    load_model,
    load_tokenizer,
    place_model,
    prepare_four_bit,
)
from recipelib.probes import load_probe
from recipelib.prompts import PromptTemplate
from recipelib.runtime import (
    Store,
    UserError,
    is_main_process,
    kept_templates,
    read_metrics,
    say,
    write_jsonl,
)

# What metrics.json says of how rows were asked.
_ASKED_BY = ("max_length", "rendering", "chat_template_kwargs")


def answer_file(args, training) -> None:
    """Answer the rows of `args.predict` with what `training.output_dir` holds: an adapter or a soft
    prompt, on the model that it was trained on unless another is named, or a whole model; as the
    run asked, except for what the command line names. Of a conversation the next turn is written.

    The predictions go to `predictions_<file>.jsonl` in that folder.

    Raises:
        UserError: no finished run there, or rows that the template cannot read.
    """
    folder = Path(training.output_dir)
    run = read_metrics(folder)
    template = _template(folder, run, args)
    # Asked as it was trained, unless the command line says otherwise.
    asked = {
        "max_length": training.max_length if "max_length" in args.named else run["max_length"],
        "rendering": args.rendering if "rendering" in args.named else run["rendering"],
        "chat_template_kwargs": args.chat_template_kwargs or run["chat_template_kwargs"],
    }
    encoder = PromptEncoder(template, load_tokenizer(str(folder)), **asked)
    own = template.path.is_relative_to(folder)
    by = f"its {template.path.relative_to(folder)}" if own else template.path
    said = " and ".join(f"--{name} {asked[name]}" for name in ("rendering", "max_length"))
    say(f"{folder}: is asked by {by}, with {said}")
    store = Store.of(training)
    rows = load_questions(template, args, store)
    store.say_what_was_kept()
    if run.get("head") == "probe":
        _answer_by_probe(folder, encoder, rows, args, training)
        return
    model = _load(folder, run, args, training)
    budget = {"batch_tokens": args.eval_batch_tokens, "description": "answering"}
    if run.get("head") == "classifier":
        asker = class_asker(encoder, run["masked"])
        encoded = encode_class_rows(asker, rows.rows, answers=False)
        result = score_classes(model, encoder, encoded, answers=False, **budget)
    elif "verbalizer" in run:  # trained through a cloze
        asker = asker_of(encoder, run["masked"], run["cloze"])
        soft = run["verbalizer"] == "soft"
        encoded = encode_cloze_rows(asker, rows.rows, soft=soft, answers=False)
        how = {"combine": run["combine"], "calibrate": run["calibrate"]}
        result = score_cloze(model, asker, encoded, answers=False, **how, **budget)
    else:
        longest = args.max_new_tokens if "max_new_tokens" in args.named else None
        longest = longest or run.get("max_new_tokens") or args.max_new_tokens or 256
        result = evaluate_task(
            model, encoder, rows.rows, max_new_tokens=longest, answers=False, **budget
        )
        if not result.rows:
            raise UserError(
                f"--max_length {encoder.max_length}: none of the {result.left_out} rows fits with "
                "room for its answer; shorten them, or lower --max_new_tokens"
            )
    _write(folder, args, result, rows.rows)


def _write(folder: Path, args, result: TaskScore, rows: Sequence[Mapping]) -> None:
    identify_rows(result.records, rows)
    target = folder / f"predictions_{Path(args.predict).stem}.jsonl"
    if is_main_process():
        write_jsonl(target, result.records)
    say(f"{result.rows} rows answered, {result.left_out} left out as too long: {target}")


def _answer_by_probe(folder: Path, encoder: PromptEncoder, rows, args, training) -> None:
    """Answer rows by a small model on features of the large one that it was trained with."""
    probe, facts = load_probe(folder)
    named = args.model_name_or_path or facts["model_name_or_path"]
    asked = replace(args, model_name_or_path=named, revision=args.revision or facts["revision"])
    model = load_model(asked, training, masked=facts["masked"], headless=True)
    model.requires_grad_(False)
    frozen = FrozenLayers.of(model)
    encoded = encode_class_rows(class_asker(encoder, facts["masked"]), rows.rows, answers=False)
    (features,) = pooled_states(
        place_model(model, training),
        frozen.layers,
        encoded.ids,
        encoder.text.tokenizer.pad_token_id,
        layer=facts["layer"],
        pooling=facts["pooling"],
        batch_tokens=args.eval_batch_tokens,
        description="answering",
    )
    result = score_chosen(encoder, encoded, probe.scores(features), answers=False)
    _write(folder, args, result, rows.rows)


def _load(folder: Path, run: dict, args, training):
    """The model of a run on this process's device, whole in each of several processes."""
    quantized = {}
    if run.get("quantization"):
        quantized = four_bit_loading(replace(args, model_name_or_path=None), training)
    # Nothing is sharded here: every process answers its part of the rows with a model of its own,
    # of which transformers would otherwise read the weights in one process only.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    model = load_tuned(
        folder,
        run,
        args.model_name_or_path,
        dtype=training.model_dtype[0],
        revision=args.revision,
        attn_implementation=args.attn_implementation,
        trust_remote_code=training.trust_remote_code,
        **quantized,
    )
    if quantized:
        prepare_four_bit(model)
        return model
    return model.to(training.device)


def _template(folder: Path, run: dict, args) -> PromptTemplate:
    """The template that a run has kept, of several the one that is named; or another one, if that
    is named.
    """
    kept = kept_templates(folder)
    if not run.get("trainable_parameters") or not kept:
        draws = " (its folders draw_N do)" if (folder / "draw_0").exists() else ""
        raise UserError(f"--output_dir {folder}: holds no trained result{draws}; train one first")
    if missing := [key for key in _ASKED_BY if key not in run]:
        raise UserError(
            f"{folder / 'metrics.json'}: {missing[0]}: is missing, so nobody knows how rows were "
            "asked; train again"
        )
    columns, names = parse_columns(args.columns), ", ".join(kept)
    words = [args.template] if isinstance(args.template, str) else args.template
    wanted = [word.partition("=")[0] for word in words]
    if len(kept) == 1:
        (path,) = kept.values()
        own = PromptTemplate.load(str(path), columns=columns)
        if "template" not in args.named or wanted in ([], [own.name], [str(path)]):
            return own
        kept, names = {}, own.name
        if {"head", "verbalizer"} & run.keys():
            raise UserError(
                f"--template {' '.join(words)}: {folder} tells the classes of {own.name} only; "
                "leave it out"
            )
    if len(wanted) != 1 or (kept and wanted[0] not in kept and "template" not in args.named):
        raise UserError(f"--template: the run has {names}; name the one to answer with")
    return PromptTemplate.load(str(kept.get(wanted[0], wanted[0])), columns=columns)
