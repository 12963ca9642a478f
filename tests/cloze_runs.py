"""What runs through a cloze leave, scored again."""

from pathlib import Path

from run_files import read_json
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from recipelib.adapters.saved import load_tuned
from recipelib.data.rows import load_rows
from recipelib.encoding.asking import asker_of
from recipelib.encoding.cloze_rows import encode_cloze_rows
from recipelib.encoding.prompt_encoder import PromptEncoder
from recipelib.evaluation.labels import score_cloze
from recipelib.models.loading import load_tokenizer
from recipelib.prompts.template import PromptTemplate

KINDS = {"causal": AutoModelForCausalLM, "masked": AutoModelForMaskedLM}
# Few tokens, so that the tiny models' positions suffice.
QUICK = {"max_steps": 4, "max_length": 100}
PROMPT = {**QUICK, "virtual_tokens": 5}


def flat(records: list[dict]) -> list[float]:
    """The labels' scores of predictions, row by row."""
    return [score for record in records for score in record["scores"].values()]


def scores(folder: Path, rows: Path, model=None) -> list[float]:
    """The labels' scores that what a run left gives to the evaluation rows, row by row.

    Args:
        rows: the folder of data.
        model: by default the run's, as --predict loads it.
    """
    metrics = read_json(folder / "metrics.json")
    model = load_tuned(folder, metrics) if model is None else model
    template = PromptTemplate.load(str(folder / "template.yaml"))
    encoder = PromptEncoder(template, load_tokenizer(str(folder)), 95)
    asker = asker_of(encoder, metrics["masked"], metrics["cloze"])
    asked = load_rows(template, str(rows), "validation").rows
    encoded = encode_cloze_rows(asker, asked, soft=metrics["verbalizer"] == "soft")
    return flat(score_cloze(model, asker, encoded, combine=metrics["combine"]).records)


def shown_code(folder: Path) -> str:
    """The Python of a run's model card."""
    (code,) = (folder / "README.md").read_text().split("```python\n")[1:]
    return code.split("```")[0]
