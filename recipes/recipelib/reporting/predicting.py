"""--predict: rows without answers in, predictions out, with what a run of any recipe left."""

from __future__ import annotations

import os
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
    prompt, on the model that it was trained on unless another is named, or a whole model; and the
    template that is kept there, of several the one that `args.template` names.

    The predictions go to `predictions_<file>.jsonl` in that folder.

    Raises:
        UserError: no finished run there, or rows that the template cannot read.
    """
    folder = Path(training.output_dir)
    run = read_metrics(folder)
    template = PromptTemplate.load(
        str(_kept_template(folder, run, args.template)), columns=parse_columns(args.columns)
    )
    if template.conversation:
        raise UserError(
            f"--predict: {folder} was trained on conversations, which have no answer to read; chat "
            "with it through transformers' pipeline, as its README.md loads it"
        )
    store = Store.of(training)
    rows = load_questions(template, args, store)
    store.say_what_was_kept()
    # Asked as it was trained.
    encoder = PromptEncoder(
        template,
        load_tokenizer(str(folder)),
        run["max_length"],
        run["rendering"],
        run["chat_template_kwargs"],
    )
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
        longest = args.max_new_tokens or run.get("max_new_tokens", 256)
        result = evaluate_task(
            model, encoder, rows.rows, max_new_tokens=longest, answers=False, **budget
        )
    _write(folder, args, result)


def _write(folder: Path, args, result: TaskScore) -> None:
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
    _write(folder, args, score_chosen(encoder, encoded, probe.scores(features), answers=False))


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


def _kept_template(folder: Path, run: dict, named: str | list[str]) -> Path:
    """The template that a run has kept; of several the one that is named."""
    kept = kept_templates(folder)
    if not run.get("trainable_parameters") or not kept:
        draws = " (its folders draw_N do)" if (folder / "draw_0").exists() else ""
        raise UserError(f"--output_dir {folder}: holds no trained result{draws}; train one first")
    if missing := [key for key in _ASKED_BY if key not in run]:
        raise UserError(
            f"{folder / 'metrics.json'}: {missing[0]}: is missing, so nobody knows how rows were "
            "asked; train again"
        )
    if folder / "template.yaml" in kept.values():
        return folder / "template.yaml"
    wanted = [named] if isinstance(named, str) else named
    if len(wanted) != 1 or wanted[0] not in kept:
        raise UserError(f"--template: the run has {', '.join(kept)}; name the one to answer with")
    return kept[wanted[0]]
