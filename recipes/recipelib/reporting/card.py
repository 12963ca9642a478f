"""The model card of a trained result, and its way to the hub."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path

from recipelib.adapters import BASE
from recipelib.models import bare_model, is_masked_model
from recipelib.runtime import LOCK, UserError, first_line, is_main_process, say


def load_snippet(model, folder: str) -> str:
    """Python that loads what a run has saved, without these recipes, for its model card.

    Args:
        model: as it was trained: adapted by PEFT or whole, with a soft verbalizer or without.
        folder: where it was saved.
    """
    bare, config = bare_model(model), getattr(model, "active_peft_config", None)
    kind = f"AutoModelFor{'Masked' if is_masked_model(model) else 'Causal'}LM"
    if type(bare).__name__.endswith("ForSequenceClassification"):
        kind = "AutoModelForSequenceClassification"
    # Of an adapter nobody reads the generation config by himself; a whole model brings its own.
    ends = config is not None and Path(folder, "generation_config.json").is_file()
    names = [kind, "AutoTokenizer", *(["GenerationConfig"] if ends else [])]
    lines, base = [f"from transformers import {', '.join(names)}"], f"{folder!r}"
    if config is not None:
        lines.insert(0, "from peft import PeftModel")
        base = f"{bare.name_or_path!r}"
        tuned = any(
            parameter.requires_grad
            for name, parameter in bare.named_parameters()
            if not name.startswith("soft_verbalizer.")
        )
        if config.is_prompt_learning and tuned:  # together with the prompt
            base = repr(f"{folder}/{BASE}")
        elif config.revision:
            base += f", revision={config.revision!r}"
    if getattr(config, "peft_type", None) == "BOTTLENECK":
        note = "a file of this folder: put it beside your script; PEFT learns the method"
        lines.insert(0, f"import peft_bottleneck  # {note}")
    lines += ["", f"model = {kind}.from_pretrained({base})"]
    if ends:
        lines.append(
            "# Answers end where they did in training; a server reads that of a merged model."
        )
        lines.append(f"model.generation_config = GenerationConfig.from_pretrained({folder!r})")
    if config is not None:
        lines.append(f"model = PeftModel.from_pretrained(model, {folder!r})")
    lines.append(f"tokenizer = AutoTokenizer.from_pretrained({folder!r})")
    if getattr(config, "is_prompt_learning", False) and config.peft_type != "PREFIX_TUNING":
        place = f"logits[:, {config.num_virtual_tokens} + n]"
        lines.append(f"# The prompt stands in front: behind the n-th token the model says {place}.")
    if getattr(bare, "soft_verbalizer", None) is not None:
        lines += [
            "",
            "import sys",
            "",
            'sys.path.append("recipes")  # of the collection',
            "from recipelib.adapters import load_soft_verbalizer",
            "",
            f"load_soft_verbalizer({folder!r}, model)  # its logits are now those of the labels",
        ]
    return "\n".join(lines) + "\n"


def publish(output_dir: str, training) -> None:
    """Upload a finished run, its model card included, its checkpoints not, to the hub.

    The card then names the repository where it named the folder.

    Raises:
        UserError: the hub refused or cannot be reached; the run itself stays in `output_dir`.
    """
    if not is_main_process():
        return
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, HTTPError

    name = training.hub_model_id or os.path.basename(os.path.abspath(output_dir))
    api = HfApi(token=training.hub_token)
    try:
        repository = api.create_repo(name, private=training.hub_private_repo, exist_ok=True).repo_id
        card = Path(output_dir) / "README.md"
        text = card.read_text(encoding="utf-8")
        # A model below the folder is one of the repository's own folders.
        text = re.sub(f"'{re.escape(output_dir)}/(\\w+)'", rf"{repository!r}, subfolder='\1'", text)
        card.write_text(text.replace(repr(output_dir), repr(repository)), encoding="utf-8")
        api.upload_folder(
            repo_id=repository,
            folder_path=output_dir,
            # Predictions and samples hold the user's rows, which nobody asked to publish.
            ignore_patterns=[
                *("checkpoint-*", "merged/*", "pissa_start/*"),
                *("predictions*.jsonl", "samples.jsonl", LOCK),
            ],
        )
    except (HTTPError, HFValidationError, OSError) as error:
        raise UserError(
            f"--push_to_hub: {first_line(error)}; the run is kept in {output_dir}: log in with "
            f"'hf auth login' and upload it with 'hf upload {name} {output_dir}'"
        ) from None
    say(f"pushed to {repository}")


def model_card(
    *,
    title: str,
    template_description: str,
    base_model: str,
    method: str,
    command: str,
    metrics: Mapping,
    versions: Mapping,
    load_snippet: str,
    license: str | None = None,
    library_name: str = "peft",
    pipeline_tag: str | None = None,
    adapter: str | None = None,
) -> str:
    """A README.md for the trained result, with the front matter that the Hugging Face hub reads.

    Args:
        title: the heading.
        template_description: what the task is, from the template.
        base_model: a hub id, or a folder; only a hub id can stand in the front matter.
        method: as in `metrics.json`; also a tag on the hub.
        command: the command line that trained it.
        metrics: as in `metrics.json`: the scores, those of the majority class, and the rows.
        versions: as `versions()` gives them.
        load_snippet: Python that loads the result without these recipes.
        license: the base model's, where known.
        library_name: what loads it: `peft`, or `transformers` for a whole model.
        pipeline_tag: such as `text-generation` or `fill-mask`, where known.
        adapter: a folder or hub id, of the one that was trained further.

    Returns:
        Markdown. No text given can end a code block, start a new table cell or leave the YAML.
    """
    from huggingface_hub import ModelCardData

    scored = metrics.get("tasks", {}).values() or [metrics]
    front = ModelCardData(
        base_model=base_model if _is_hub_id(base_model) else None,
        library_name=library_name,
        license=license,
        pipeline_tag=pipeline_tag,
        tags=[method],
        metrics=sorted({one["metric"] for one in scored if one.get("metric")}) or None,
    )
    start = f", further from the adapter {_code(adapter)}" if adapter else ""
    used = "\n".join(f"- {_plain(name)} {_plain(version)}" for name, version in versions.items())
    return f"""---
{front.to_yaml()}
---

# {_plain(title)}

{_plain(template_description)}

{_code(base_model)}, trained with the method {_code(method)}{start}:

{_fenced("bash", command)}

## Results

{_scores(metrics)}

## Use

{_fenced("python", load_snippet)}

## Versions

{used}
"""


def _scores(metrics: Mapping) -> str:
    """A table with a line for each metric, of several tasks each."""
    tasks = metrics.get("tasks") or {"": metrics}
    header = ["metric", "majority class", "before training", "after training", "rows"]
    lines = [["task", *header] if "tasks" in metrics else header]
    lines.append(["---"] * len(lines[0]))
    for task, figures in tasks.items():
        named = [_plain(task) + " (held out)" * figures.get("heldout", False)]
        by_metric = figures.get("metrics") or {figures.get("metric"): figures}
        for metric, one in by_metric.items():
            always, after = _figure(one.get("majority_score")), _figure(one.get("score"))
            if "majority_class" in figures:
                always += f" (always {_plain(figures['majority_class'])}"
                if "accuracy" not in by_metric:
                    always += f", accuracy {_figure(figures['majority_accuracy'])}"
                always += ")"
            if error := _figure(one.get("stderr")):
                after += f" ± {error}"
            lines.append(
                [
                    *(named if "tasks" in metrics else []),
                    *(_plain(metric or "score"), always, _figure(one.get("base_score"))),
                    *(after, _figure(figures.get("eval_rows"))),
                ]
            )
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _is_hub_id(name: str) -> bool:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).exists()


def _figure(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}"


def _plain(text: object) -> str:
    """One line in which no character means anything to Markdown."""
    return re.sub(r"([\\`*_{}\[\]<>#|~&])", r"\\\1", " ".join(str(text).split()))


def _code(text: str) -> str:
    ticks = "`" * (_longest_ticks(text) + 1)
    pad = " " if "`" in text else ""  # else a backtick at an end would join the delimiter
    return f"{ticks}{pad}{' '.join(text.split())}{pad}{ticks}"


def _fenced(language: str, text: str) -> str:
    ticks = "`" * max(3, _longest_ticks(text) + 1)
    return f"{ticks}{language}\n{text.rstrip()}\n{ticks}"


def _longest_ticks(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)
