"""A task's score by the blanks of its rows, and the answers that a finished run of prompt tuning
gives to rows without them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM

from recipelib.data.rows import load_questions, parse_columns
from recipelib.encoding.cloze_rows import BlankRows, ClozeAsker, encode_blanks, example_of
from recipelib.encoding.prompt_encoder import PromptEncoder
from recipelib.evaluation.evaluation import TaskScore, finish, record_of
from recipelib.evaluation.few_shot import CausalAsker, MaskedAsker
from recipelib.evaluation.metrics import score_rows
from recipelib.inference.cloze_scoring import SoftVerbalizer, score_examples
from recipelib.models.head import bare_model
from recipelib.models.loading import is_masked, load_model, load_tokenizer, stored_config
from recipelib.prompts.template import PromptTemplate
from recipelib.prompts.values import RowError
from recipelib.prompts.verbalizer import combine_words
from recipelib.reporting.report import read_metrics, write_jsonl
from recipelib.runtime.errors import UserError
from recipelib.runtime.launch import is_main_process, say

SOFT_VERBALIZER = "soft_verbalizer.safetensors"
BASE = "base_model"  # where a model is kept that was tuned together with a soft prompt


def asker_of(encoder: PromptEncoder, masked: bool, cloze: bool) -> CausalAsker | MaskedAsker:
    """How a model is asked: a masked one by the cloze; a causal one by the prompt, or the cloze."""
    return MaskedAsker(encoder) if masked else (ClozeAsker if cloze else CausalAsker)(encoder)


def evaluate_blanks(
    model,
    asker: CausalAsker | MaskedAsker,
    rows: BlankRows,
    *,
    combine: str = "logsumexp",
    calibrate: bool = False,
    batch_tokens: int = 4096,
    answers: bool = True,
    description: str | None = "scoring",
) -> TaskScore:
    """Fill the blank of every row with each label word and compare with the gold labels.

    Args:
        rows: as `encode_blanks` gives them.
        combine: how words make a label's score, see `verbalizer.combine_words`.
        calibrate: whether the labels' scores are calibrated. Where it is possible the metric of the
            other way is kept among the details.
        answers: False for rows without answers: the records then hold predictions only.
    Raises:
        UserError: `calibrate` without inputs free of content.
    """
    encoder, template = asker.encoder, asker.encoder.template
    start, classes = time.perf_counter(), list(template.verbalizer)
    soft = getattr(bare_model(model), "soft_verbalizer", None) is not None
    free = [] if soft else _without_content(asker, rows)
    if calibrate and not free:
        raise UserError(
            f"--calibrate: needs content_free in {template.path.name}, such as ['', 'N/A'], and "
            "label words that are answers"
        )
    model.eval()
    examples = rows.encoded.examples
    words = score_examples(model, examples, batch_tokens=batch_tokens, description=description)
    labels = torch.tensor(examples[0]["word_labels"])
    ways = {"uncalibrated": combine_words(words, labels, combine)}
    if free:
        # The mean of the probabilities over the texts without content; its scale cancels.
        prior = score_examples(model, free, batch_tokens=batch_tokens).log_softmax(-1).logsumexp(0)
        ways["calibrated"] = combine_words(words, labels, combine, prior)
    way = "calibrated" if calibrate else "uncalibrated"
    said = {key: [classes[best] for best in some.argmax(-1)] for key, some in ways.items()}
    records = []
    for one, prediction, scores in zip(rows.asked, said[way], ways[way].tolist(), strict=True):
        record = record_of(encoder, one, one.questions[0].label, prediction, None)
        records.append({**record, "log_likelihoods": dict(zip(classes, scores, strict=True))})
    result = finish(template, records, rows.encoded.counts.rows, answers)
    if answers:
        golds = [record["answer"] for record in records]
        for key in said.keys() - {way}:
            result.details[key] = score_rows(template.metric, said[key], golds)[0]
    result.seconds = time.perf_counter() - start
    return result


def _without_content(asker: CausalAsker | MaskedAsker, rows: BlankRows) -> list[dict]:
    """The blank with texts without content in the place of all that a row brings."""
    template, (question, *more) = asker.encoder.template, rows.asked[0].questions
    if more:  # asked once per candidate, as yes or no
        return []
    found = []
    for text in template.content_free:
        emptied = question.change(**dict.fromkeys(template.prompt_variables, text))
        try:
            requests = asker.requests(emptied, asker.prompt(emptied, ()), ())
        except RowError as error:
            raise UserError(f"{template.path}: content_free: {text!r}: {error}") from None
        found.append(example_of(requests, list(template.verbalizer), None))
    return found


def load_soft_verbalizer(folder: Path | str, model) -> None:
    """Put the trained label embeddings of a run into its model: its logits are then those of the
    labels, [rows, tokens, labels], in the order of the template's verbalizer.
    """
    SoftVerbalizer(**load_file(Path(folder) / SOFT_VERBALIZER)).into(model)


def load_tuned(folder: Path | str, metrics: Mapping, model_name_or_path: str | None = None, **load):
    """The model of a finished run: PEFT's soft prompt or prefix on the model that it was trained
    with, or a tuned model; with the soft verbalizer where there is one.

    Args:
        metrics: what its metrics.json holds.
        model_name_or_path: of the untouched model behind a soft prompt, if it lies elsewhere now.
        load: options of `load_model`.
    """
    folder = Path(folder)
    adapted = (folder / "adapter_config.json").exists()
    base = str(folder)
    if metrics["tune"] == "both":
        base = str(folder / BASE)
    elif adapted:
        kept = PeftConfig.from_pretrained(folder)
        base = model_name_or_path or kept.base_model_name_or_path
        if not model_name_or_path and not load.get("revision"):
            load["revision"] = kept.revision
    masked = is_masked(stored_config(base, revision=load.get("revision")))
    model = load_model(base, model_class=AutoModelForMaskedLM if masked else None, **load)
    if adapted:
        model = PeftModel.from_pretrained(model, folder)
    if metrics["verbalizer"] == "soft":
        load_soft_verbalizer(folder, model)
    return model


def answer_blank_file(args, training) -> None:
    """Answer the rows of `args.predict` with what a run left in `training.output_dir`.

    Raises:
        UserError: no finished run there, or rows that the template cannot read.
    """
    folder = Path(training.output_dir)
    run = read_metrics(folder)
    if not run.get("trainable_parameters") or not (folder / "template.yaml").exists():
        draws = " (its folders draw_N do)" if (folder / "draw_0").exists() else ""
        raise UserError(f"--output_dir {folder}: holds no trained result{draws}; train one first")
    if "verbalizer" not in run:
        raise UserError(
            f"--output_dir {folder}: was made by another recipe (method: {run.get('method')}), "
            "which has a --predict, too"
        )
    template = PromptTemplate.load(
        str(folder / "template.yaml"), columns=parse_columns(args.columns)
    )
    rows = load_questions(template, args)
    tokenizer = load_tokenizer(str(folder))
    # Nothing is sharded here, see `predicting.answer_file`.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    model = load_tuned(
        folder,
        run,
        args.model_name_or_path,
        dtype=training.model_dtype[0],
        revision=args.revision,
        attn_implementation=args.attn_implementation,
        trust_remote_code=training.trust_remote_code,
    ).to(training.device)
    encoder = PromptEncoder(
        template, tokenizer, run["max_length"], run["rendering"], run["chat_template_kwargs"]
    )
    asker = asker_of(encoder, run["masked"], run["cloze"])
    encoded = encode_blanks(asker, rows.rows, soft=run["verbalizer"] == "soft", answers=False)
    result = evaluate_blanks(
        model,
        asker,
        encoded,
        combine=run["combine"],
        calibrate=run["calibrate"],
        batch_tokens=args.eval_batch_tokens,
        answers=False,
        description="answering",
    )
    target = folder / f"predictions_{Path(args.predict).stem}.jsonl"
    if is_main_process():
        write_jsonl(target, result.records)
    say(f"{result.rows} rows answered, {result.left_out} left out as too long: {target}")
