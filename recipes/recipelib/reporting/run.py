"""What a run shows before it trains and leaves in its folder when it is done."""

from __future__ import annotations

import math
import os
import re
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from recipelib.encoding.examples import EncodedRows
from recipelib.encoding.prompt_encoder import IGNORED, PromptEncoder
from recipelib.evaluation.evaluation import TaskScore
from recipelib.models.bundled import first_line
from recipelib.models.quantization import describe_quantization
from recipelib.prompts.template import PromptTemplate
from recipelib.reporting.report import (
    model_card,
    plot_loss,
    print_table,
    printable,
    versions,
    write_json,
    write_jsonl,
)
from recipelib.runtime.errors import UserError
from recipelib.runtime.launch import is_main_process, say
from recipelib.training.batches import expected_padding
from recipelib.training.memory import MemoryEstimate, gib


def preview(encoded: EncodedRows, tokenizer, count: int) -> None:
    """Show training examples token by token as the model will see them, the supervised ones marked.

    In a terminal they are colored; elsewhere they stand in ⟦ ⟧.
    """
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    for number, example in enumerate(encoded.examples[:count]):
        supervised = [label != IGNORED for label in example["labels"]]
        tokens = f"{len(supervised)} tokens, {sum(supervised)} supervised"
        console.rule(f"example {number + 1}: {tokens}")
        text, shown, start = Text(), "", 0
        for end in range(1, len(supervised) + 1):
            if end < len(supervised) and supervised[end] == supervised[start]:
                continue
            # Decoded from the beginning: a piece by itself may lose the space in front of it.
            whole = tokenizer.decode(example["input_ids"][:end], clean_up_tokenization_spaces=False)
            piece, shown = whole[len(shown) :], whole
            if not supervised[start]:
                text.append(printable(piece))
            elif console.is_terminal:
                text.append(printable(piece), style="bold white on dark_green")
            else:
                text.append(printable(f"⟦{piece}⟧"))
            start = end
        console.print(text)


def count_parameters(model) -> tuple[int, int]:
    """Trainable and all parameters; one that is tied counts once, 4-bit ones by their real size."""
    packed = {  # by the layer, since a shard does not know what it is a shard of
        id(one.weight): one.quant_state.shape.numel()
        for one in model.modules()
        if getattr(one, "quant_state", None) is not None
    }
    sizes = [(packed.get(id(one), one.numel()), one.requires_grad) for one in model.parameters()]
    return sum(size for size, trainable in sizes if trainable), sum(size for size, _ in sizes)


def show_plan(
    model_name: str,
    model,
    encoded: EncodedRows,
    training,
    sources: dict[str, str],
    memory: MemoryEstimate,
) -> None:
    """The summary before training: what is trained, on what, and how much of it."""
    dtype, why = training.model_dtype
    frozen = describe_quantization(model)
    trainable, total = count_parameters(model)
    if trainable == total and model.dtype != dtype:
        computed = str(dtype).removeprefix("torch.")
        dtype, why = model.dtype, f"which training needs; computed in {computed}"
    counts, world = encoded.counts, training.world_size
    batch = training.per_device_train_batch_size * training.gradient_accumulation_steps * world
    lengths = [len(example["input_ids"]) for example in encoded.examples]
    padding = expected_padding(lengths, training)
    left_out = f", {counts.left_out} left out: too long" if counts.left_out else ""
    print_table(
        "Before training",
        {
            "model": f"{model_name}, {str(dtype).removeprefix('torch.')} ({why})",
            **({"frozen weights": frozen} if frozen else {}),
            "parameters": f"{trainable:,} trainable of {total:,} ({trainable / total:.2%})",
            **sources,
            "examples": f"{counts.examples:,} from {counts.rows:,} rows; "
            f"{counts.shortened:,} shortened{left_out}",
            "tokens": f"{counts.tokens:,}, of which {counts.supervised_tokens:,} supervised; "
            f"{padding:.0%} padding",
            "batch": f"{batch} = {training.per_device_train_batch_size} per device x "
            f"{training.gradient_accumulation_steps} accumulated x {world} (processes)",
            "learning rate": f"{training.learning_rate:g}, {training.lr_scheduler_type.value}",
            "memory per process": memory,
            "output": training.output_dir,
        },
    )


def save_run(
    trainer,
    encoder: PromptEncoder,
    encoded: EncodedRows,
    base: TaskScore,
    tuned: TaskScore,
    *,
    method: str,
    model_name: str,
    load_snippet: str,
    estimated: MemoryEstimate,
    peak_memory_bytes: int,
    peak_resident_bytes: int,
    train_seconds: float,
    skipped_rows: int = 0,
    templates: Sequence[PromptTemplate] = (),
    more: Mapping[str, Any] | None = None,
) -> dict:
    """Write everything beside the weights: metrics.json last, so that where it stands the run is
    whole.

    Args:
        encoder: how rows are asked; its template is kept as template.yaml.
        templates: of a run with several tasks, each is kept as templates/NAME.yaml instead.
        more: further figures for metrics.json.
    Returns:
        The content of metrics.json.
    """
    training, folder = trainer.args, Path(trainer.args.output_dir)
    templates = list(templates) or [encoder.template]
    task = "+".join(template.name for template in templates)
    trainer.save_state()
    (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle, which nobody should load
    trainable, total = count_parameters(trainer.model)
    counted = [trainer.tokens_seen, trainer.slots_seen, peak_memory_bytes, peak_resident_bytes]
    processes = trainer.accelerator.gather(torch.tensor([counted], device=training.device))
    tokens_seen, slots_seen = processes[:, :2].sum(0).tolist()
    peak, resident = processes[:, 2:].amax(0).tolist()
    metrics = {
        "task": task,
        "method": method,
        "model": model_name,
        "metric": tuned.metric,
        "score": tuned.score,
        "stderr": tuned.stderr,
        **tuned.details,
        "unreadable": tuned.unreadable,
        "base_score": base.score,
        "base_stderr": base.stderr,
        "eval_rows": tuned.rows,
        "eval_rows_left_out": tuned.left_out,
        "train_rows": encoded.counts.rows,
        "train_examples": encoded.counts.examples,
        "train_examples_shortened": encoded.counts.shortened,
        "train_examples_left_out": encoded.counts.left_out,
        "bad_rows_skipped": skipped_rows,
        "train_tokens": tokens_seen,
        "supervised_tokens": encoded.counts.supervised_tokens,
        "padding_fraction": 1 - tokens_seen / slots_seen if slots_seen else 0.0,
        "tokens_per_second": tokens_seen / train_seconds if train_seconds else 0.0,
        "train_seconds": train_seconds,
        "eval_seconds": tuned.seconds,
        "steps": trainer.state.global_step,
        "trainable_parameters": trainable,
        "total_parameters": total,
        "peak_memory_bytes": peak,
        "peak_resident_bytes": resident,
        "estimated_memory_bytes": estimated.total,
        "quantization": describe_quantization(trainer.model),
        "rendering": "chat" if encoder.chat else "text",
        "chat_template_kwargs": encoder.text.chat_template_kwargs,
        "max_length": encoder.max_length,
        "world_size": training.world_size,
        "distributed_type": str(trainer.accelerator.distributed_type.value),
        "seed": training.seed,
        "versions": versions(),
        **(more or {}),
    }
    losses = {log["step"]: log["loss"] for log in trainer.state.log_history if "loss" in log}
    if bad := [step for step, loss in losses.items() if not math.isfinite(loss)]:
        say(
            f"warning: the loss is not finite from step {bad[0]} on, so nothing was learned: lower "
            "--learning_rate"
        )
    if is_main_process():
        # What an earlier run of another kind left here would be taken for this one's.
        (folder / "template.yaml").unlink(missing_ok=True)
        shutil.rmtree(folder / "templates", ignore_errors=True)
        if not isinstance(trainer.model, PeftModel):
            for name in ("adapter_config.json", "adapter_model.safetensors"):
                (folder / name).unlink(missing_ok=True)
        for template in templates:
            place = folder / "templates" / f"{template.name}.yaml"
            place = place if len(templates) > 1 else folder / "template.yaml"
            place.parent.mkdir(parents=True, exist_ok=True)
            template.save(place)
        trainer.processing_class.save_pretrained(folder)
        write_jsonl(folder / "predictions.jsonl", tuned.records)
        plot_loss(
            trainer.state.log_history,
            folder / "loss.png",
            title=f"{task}: {method}",
            subtitle=f"{model_name}, {encoded.counts.examples:,} examples, "
            f"{metrics['steps']:,} steps",
        )
        command = shlex.join(["accelerate", "launch", *sys.argv])
        if training.hub_token:  # the card may be published
            command = command.replace(training.hub_token, "HUB_TOKEN")
        card = model_card(
            title=f"{task} ({method})",
            template_description=" ".join(template.description for template in templates),
            base_model=model_name,
            method=method,
            command=command,
            metrics=metrics,
            versions=metrics["versions"],
            load_snippet=_with_revision(load_snippet, trainer.model),
            library_name="peft" if isinstance(trainer.model, PeftModel) else "transformers",
        )
        (folder / "README.md").write_text(card, encoding="utf-8")
        write_json(folder / "metrics.json", metrics)
        print_table(
            "Done",
            {
                "base model": base,
                "tuned": tuned,
                "training": f"{train_seconds:.0f} s, {metrics['tokens_per_second']:.0f} tokens/s, "
                f"{metrics['padding_fraction']:.0%} padding",
                "peak memory": f"{gib(peak)} GiB (estimated {gib(estimated.total)})",
                "written to": f"{folder}/: weights, metrics.json, predictions.jsonl, loss.png",
            },
        )
    return metrics


def _with_revision(snippet: str, model) -> str:
    """The lines that load a run, with the revision of the base that an adapter was trained on."""
    config = getattr(model, "active_peft_config", None)
    if not getattr(config, "revision", None):
        return snippet
    base = f"from_pretrained({config.base_model_name_or_path!r}"
    return snippet.replace(base, f"{base}, revision={config.revision!r}")


def say_wrong(result: TaskScore, count: int = 3) -> None:
    """Show the first wrong answers; all of them stand in predictions.jsonl."""
    wrong = [one for one in result.records if one["score"] is not None and one["score"] < 1]
    shown = {
        f"row {one['row']}": f"{one['prompt']}\n\n"
        f"written: {one.get('generated', one['prediction'])}\n"
        f"read: {one['prediction']}; right: {one['answer']}"
        for one in wrong[:count]
    }
    if shown:
        print_table(f"{len(wrong)} of {result.rows} are wrong, such as", shown)


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
                *("predictions*.jsonl", "samples.jsonl"),
            ],
        )
    except (HTTPError, HFValidationError, OSError) as error:
        raise UserError(
            f"--push_to_hub: {first_line(error)}; the run is kept in {output_dir}: log in with "
            f"'hf auth login' and upload it with 'hf upload {name} {output_dir}'"
        ) from None
    say(f"pushed to {repository}")
