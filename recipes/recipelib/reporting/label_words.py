"""The label words that a search has found, shown and written into a template."""

from __future__ import annotations

import os
from pathlib import Path

from recipelib.evaluation import LabelWords
from recipelib.prompts import TEMPLATE_FOLDER, PromptTemplate
from recipelib.runtime import is_main_process, print_table, printable


def save_label_words(search: LabelWords, template: PromptTemplate, output_dir: str) -> Path:
    """Write the template with the words, show them beside others, and say how to go on."""
    path = Path(output_dir) / "template.yaml"
    if is_main_process():
        fields = {**template.fields, "verbalizer": {k: [word] for k, word in search.words.items()}}
        path.parent.mkdir(parents=True, exist_ok=True)
        if rows := fields.get("dataset", {}).get("path"):
            beside = template.path.parent / rows
            if beside.exists() and not (TEMPLATE_FOLDER / rows).exists():  # as seen from there
                fields["dataset"] = {
                    **fields["dataset"],
                    "path": os.path.relpath(beside, output_dir),
                }
        PromptTemplate(fields, template.path).save(path)
        shown = {
            f"instead, {label}": printable(
                ", ".join(f"{word} {train:.2f}/{held:.2f}" for word, train, held in best)
            )
            for label, best in search.others.items()
        }
        print_table(
            "Label words (accuracy on training / evaluation rows, without training)",
            {
                **{label: printable(word) for label, word in search.words.items()},
                "together": f"{search.train:.3f} / {search.evaluation:.3f}",
                **shown,
                "written to": f"{path}; edit it and pass it as --template",
            },
        )
    return path
