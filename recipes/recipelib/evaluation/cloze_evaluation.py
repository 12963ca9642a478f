"""A task's score by the blanks of its rows, and the answers that a finished run of prompt tuning
gives to rows without them.
"""

from __future__ import annotations

import os
from pathlib import Path

from recipelib.adapters.saved import load_tuned
from recipelib.data.rows import load_questions, parse_columns
from recipelib.encoding.asking import asker_of
from recipelib.encoding.cloze_rows import encode_cloze_rows
from recipelib.encoding.prompt_encoder import PromptEncoder
from recipelib.evaluation.labels import score_cloze
from recipelib.models.loading import load_tokenizer
from recipelib.prompts.template import PromptTemplate
from recipelib.runtime.console import is_main_process, say
from recipelib.runtime.errors import UserError
from recipelib.runtime.files import read_metrics, write_jsonl


def answer_cloze_file(args, training) -> None:
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
    encoded = encode_cloze_rows(asker, rows.rows, soft=run["verbalizer"] == "soft", answers=False)
    result = score_cloze(
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
