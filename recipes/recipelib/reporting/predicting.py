"""--predict: rows without answers in, predictions out, with what a run left in its folder."""

from __future__ import annotations

import os
from pathlib import Path

from peft import PeftConfig, PeftModel

import recipelib.adapters.bottleneck  # noqa: F401  PEFT knows its adapters from here on
from recipelib.data.rows import load_questions, parse_columns
from recipelib.encoding.prompt_encoder import PromptEncoder
from recipelib.evaluation.evaluation import evaluate_task
from recipelib.models.loading import load_model, load_tokenizer
from recipelib.models.quantization import four_bit_loading, prepare_four_bit
from recipelib.prompts.template import PromptTemplate
from recipelib.runtime.console import is_main_process, say
from recipelib.runtime.errors import UserError
from recipelib.runtime.files import read_metrics, write_jsonl


def answer_file(args, training) -> None:
    """Answer the rows of `args.predict` with what `training.output_dir` holds: an adapter, on the
    model that it was trained on unless another is named, or a whole model; and the template that is
    kept there, of several the one that `args.template` names.

    The predictions go to `predictions_<file>.jsonl` in that folder.

    Raises:
        UserError: no finished run there, or rows that the template cannot read.
    """
    folder = Path(training.output_dir)
    if not (folder / "metrics.json").exists():
        raise UserError(f"--output_dir {folder}: holds no finished run; train one first")
    template = PromptTemplate.load(
        str(_kept_template(folder, args.template)), columns=parse_columns(args.columns)
    )
    if template.messages:
        raise UserError(
            f"--predict: {folder} was trained on conversations, which have no answer to read; chat "
            "with it through transformers' pipeline, as its README.md loads it"
        )
    rows = load_questions(template, args)
    # Asked as it was trained.
    run = read_metrics(folder)
    tokenizer = load_tokenizer(str(folder))
    quantized = four_bit_loading(training) if run.get("quantization") else {}
    # Nothing is sharded here: every process answers its part of the rows with a model of its own,
    # of which transformers would otherwise read the weights in one process only.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    adapted = (folder / "adapter_config.json").exists()
    kept = PeftConfig.from_pretrained(folder) if adapted else None
    base = kept.base_model_name_or_path if adapted else str(folder)
    revision = args.revision
    if adapted and not args.model_name_or_path:
        revision = revision or kept.revision
    model = load_model(
        (args.model_name_or_path or base) if adapted else base,
        dtype=training.model_dtype[0],
        revision=revision,
        attn_implementation=args.attn_implementation,
        trust_remote_code=training.trust_remote_code,
        **quantized,
    )
    model = model.to(training.device)
    if adapted:
        model = PeftModel.from_pretrained(model, folder)
    if quantized:
        prepare_four_bit(model)
    encoder = PromptEncoder(
        template, tokenizer, run["max_length"], run["rendering"], run["chat_template_kwargs"]
    )
    result = evaluate_task(
        model,
        encoder,
        rows.rows,
        max_new_tokens=args.max_new_tokens or run["max_new_tokens"],
        batch_tokens=args.eval_batch_tokens,
        answers=False,
        description="answering",
    )
    target = folder / f"predictions_{Path(args.predict).stem}.jsonl"
    if is_main_process():
        write_jsonl(target, result.records)
    say(f"{result.rows} rows answered, {result.left_out} left out as too long: {target}")


def _kept_template(folder: Path, named: str | list[str]) -> Path:
    """The template that a run has kept; of several the one that is named."""
    if (folder / "template.yaml").exists():
        return folder / "template.yaml"
    kept = {path.stem: path for path in sorted((folder / "templates").glob("*.yaml"))}
    wanted = [named] if isinstance(named, str) else named
    if len(wanted) != 1 or wanted[0] not in kept:
        raise UserError(f"--template: the run has {', '.join(kept)}; name the one to answer with")
    return kept[wanted[0]]
