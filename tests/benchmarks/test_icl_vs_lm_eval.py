"""The benchmark beside lm-eval."""

import io
import json
import re
import sys
from collections import Counter
from pathlib import Path

import few_shot_arm
import icl_vs_lm_eval
import pytest
import torch
from transformers import AutoModelForCausalLM


@pytest.fixture(scope="module")
def model_folder(model_folder, tmp_path_factory):
    """With weights so large that a prompt's tokens show in its scores."""
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    with torch.no_grad():
        for weight in model.parameters():
            weight *= 8 if weight.dim() > 1 else 1
    folder = tmp_path_factory.mktemp("opinions")
    for file in model_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    model.save_pretrained(folder)
    return folder


class ArmHere:
    """A side that answers in this process. lm-eval is not installed where tests run: ours takes its
    place.
    """

    def __init__(self, python, side, model, batch_size, log):
        self.side = side
        self.words = [{"lm_eval": "ours"}.get(side, side), model, str(batch_size)]

    def ask(self, **request) -> dict:
        if self.side == "lm_eval" and "case" in request:  # which knows no template
            case = json.loads(Path(request["case"]).read_text())
            case.pop("template", None)
            request["case"] += ".plain"
            Path(request["case"]).write_text(json.dumps(case))
        return self._lines(json.dumps(request))[1]

    def read(self) -> dict:
        return self._lines("")[0]

    def _lines(self, asked: str) -> list[dict]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["few_shot_arm.py", *self.words])
            patch.setattr(sys, "stdin", io.StringIO(asked))
            patch.setattr(sys, "stdout", out := io.StringIO())
            few_shot_arm.main()
        return [json.loads(line) for line in out.getvalue().splitlines()]

    def close(self) -> None:
        pass


def test_the_sides_score_and_write_alike(start, monkeypatch):
    monkeypatch.setattr(icl_vs_lm_eval, "Arm", ArmHere)
    monkeypatch.setattr(icl_vs_lm_eval, "QUICK_WRITTEN_ROWS", 3)
    cases = ["--cases", "zero", "options", "written", "--lm_eval_python", "none"]
    result, shown = start(icl_vs_lm_eval, "--quick", "--rows", 3, *cases)
    assert next(iter(result)) == "ratio"
    zero, options, written = result["cases"].values()
    assert result["ratio"] == zero["ratio"]
    for case in (zero, options, written):
        ours, theirs = case["seconds"]
        assert case["ratio"] == pytest.approx(sum(theirs) / sum(ours))
    assert (zero["rows"], zero["peer"]) == (3, "lm_eval")
    assert zero["difference"] < 1e-4
    assert options["difference"] < 1e-4  # through a template, and from prompts and choices
    assert zero["floor"] > 0
    assert (written["rows"], written["peer"]) == (3, "generate")
    assert written["same_texts"] >= 2
    assert f"{written['same_texts']} texts same" in shown


@pytest.mark.parametrize(("name", "shots"), [("few", 16), ("zero", 0)])
def test_all_prompts_have_the_same_demonstrations_equally_many_of_each_class(name, shots):
    case = icl_vs_lm_eval.make_cases(None, 5, 1, [name])[name]
    parts = [prompt.rpartition("\n\n") for prompt in case["prompts"]]
    assert len({asked for _, _, asked in parts}) == 5
    (shown,) = {shown for shown, _, _ in parts}
    answers = [re.sub(r"(?s).*review is", "", text) for text in shown.split("\n\n")]
    words = case["choices"][0]
    assert Counter(filter(None, answers)) == {word: shots // 2 for word in words if shots}
    assert all(not prompt.endswith(" ") for prompt in case["prompts"])
