"""Long evaluations go block by block: the results are those of one block, and neither prompts nor
what is asked of rows stays in memory.
"""

import gc
import json
import re

import pytest
from scoring_process import TOKENIZER, outspoken_llama
from template_cases import CASES

from recipelib.data.demonstrations import Demonstrations
from recipelib.encoding.asking import CausalAsker
from recipelib.encoding.prompt_encoder import EncodedPrompt, PromptEncoder
from recipelib.evaluation import scores
from recipelib.evaluation.answers import score_answers
from recipelib.evaluation.labels import score_labels
from recipelib.evaluation.losses import score_losses
from recipelib.prompts.template import PromptTemplate
from recipelib.runtime import write_jsonl

MODEL = outspoken_llama()


def score(name: str, how: str, rows: list[dict], draws: int, **options):
    template = PromptTemplate.load(name)
    encoder = PromptEncoder(template, TOKENIZER, 250)
    drawn = [Demonstrations(template, rows, 2, "random", draw=draw) for draw in range(draws)]
    if how == "labels":
        return score_labels(MODEL, CausalAsker(encoder), rows, drawn)
    if how == "losses":
        return score_losses(MODEL, encoder, rows, drawn)
    return score_answers(MODEL, encoder, rows, drawn, max_new_tokens=5, **options)


def rows_of(name: str, count: int) -> list[dict]:
    some = CASES[name].rows
    return [
        {
            key: f"{value} {number}" if key in ("sentence", "input", "question") else value
            for key, value in some[number % len(some)].items()
        }
        for number in range(count)
    ]


def lines(result, folder) -> list[dict]:
    """What predictions.jsonl says, its numbers as close as passes of other sizes have them."""
    records = [record for draw in result.draws for record in draw.records]
    write_jsonl(folder / "predictions.jsonl", records)
    text = (folder / "predictions.jsonl").read_text()
    rounded = re.sub(r"-?\d+\.\d+(e-?\d+)?", lambda found: f"{float(found[0]):.3f}", text)
    return [json.loads(line) for line in rounded.splitlines()]


@pytest.mark.parametrize(
    ("name", "how", "options"),
    [
        ("movie_reviews", "labels", {}),
        ("next_sentence", "labels", {}),
        ("alpaca", "losses", {}),
        ("gsm8k", "answers", {}),
        ("gsm8k", "answers", {"samples": 3, "temperature": 1.5, "seed": 5}),
        ("gsm8k", "answers", {"trigger": "Hm:"}),
    ],
)
def test_blocks_change_nothing(name, how, options, tmp_path, monkeypatch):
    # The draws of samples depend on a prompt's number, which several draws of demonstrations share.
    rows, draws = rows_of(name, 7), 1 if "samples" in options else 2
    whole = score(name, how, rows, draws, **options)
    assert all(isinstance(record["answer"], str | list) for record in whole.draws[0].records)
    monkeypatch.setattr(scores, "_BLOCK", 2 * draws)
    parts = score(name, how, rows, draws, **options)
    assert lines(parts, tmp_path) == lines(whole, tmp_path)
    for one, other in zip(parts.draws, whole.draws, strict=True):
        assert one.score == pytest.approx(other.score, nan_ok=True)
        assert (one.rows, one.left_out) == (other.rows, other.left_out)
    assert parts.by_score == whole.by_score
    assert parts.asked == whole.asked


@pytest.mark.parametrize("how", ["labels", "answers", "losses"])
def test_prompts_are_kept_for_a_block_only(how, monkeypatch):
    rows, most = rows_of("movie_reviews", 12), 0

    def held(result=None) -> int:
        gc.collect()
        found = (one for one in gc.get_objects() if isinstance(one, EncodedPrompt) and one.ids)
        return sum(1 for _ in found)

    known = PromptEncoder.prompt

    def prompt(*args, **options):
        nonlocal most
        most = max(most, held())
        return known(*args, **options)

    monkeypatch.setattr(scores, "_BLOCK", 4)
    before = held()
    monkeypatch.setattr(PromptEncoder, "prompt", prompt)
    result = score("movie_reviews", how, rows, 1)
    assert len(result.draws[0].records) == 12
    assert most - before <= 8  # of a block and of the next
    assert held() == before
    texts = [record["prompt"] for record in result.draws[0].records]
    assert not any(isinstance(text, str) for text in texts)
    assert "film" in str(texts[0])
