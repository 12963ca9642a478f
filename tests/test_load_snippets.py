"""What a run leaves is loaded in new processes: as its model card shows, without these recipes, and
by recipes that did not train it.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import adapter_sft
import cloze_sft
import cot_sft
import instruction_sft
import lora_sft
import prompt_tuning
import pytest
import torch
from cloze_runs import shown_code
from peft import PeftModel
from run_files import read_jsonl
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

ROOT = Path(__file__).resolve().parents[1]
IDS = torch.tensor([[5, 17, 42, 99, 7, 3, 64, 12]])
CLOZE = {"max_length": 100}
PROMPT = {**CLOZE, "virtual_tokens": 5}
RUNS = {
    "lora": (lora_sft, {}),
    "adapter": (adapter_sft, {"bottleneck_size": 8, "learning_rate": 0.01}),
    "cot_full": (cot_sft, {"full": True, "template": "gsm8k", "max_new_tokens": 4}),
    "instruction": (instruction_sft, {"max_eval_samples": 2}),
    "prefix": (prompt_tuning, {**PROMPT, "tune": "prefix"}),
    "p_tuning": (prompt_tuning, {**PROMPT, "tune": "p_tuning"}),
    "cloze": (cloze_sft, CLOZE),
    "cloze_and_prompt": (cloze_sft, {**PROMPT, "soft_prompt": True}),
}
# The libraries are imported once, and each script runs in a process that knows nothing else.
FORKS = """
import json, os, runpy, sys, traceback
import peft, torch, transformers

for argv in json.loads(sys.argv[1]):
    child = os.fork()
    if not child:
        sys.argv, sys.path[0], code = argv, os.path.dirname(argv[0]), 1
        try:
            runpy.run_path(argv[0], run_name="__main__")
            code = 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(code)
    if os.waitpid(child, 0)[1]:
        sys.exit(f"failed: {argv}")
"""
AFTER = f"""
import sys
import torch

ids = torch.tensor({IDS.tolist()})
with torch.no_grad():
    out = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
torch.save(out, sys.argv[1])
assert not [name for name in sys.modules if name.split(".")[0] == "recipelib"]
"""


@pytest.fixture(scope="module")
def finished(start, sums, masked_model, tmp_path_factory) -> dict[str, Path]:
    """The folder of each run."""
    root, folders = tmp_path_factory.mktemp("runs"), {}
    for name, (recipe, options) in RUNS.items():
        options = {"max_steps": 2, **options}
        if recipe is cot_sft:
            options["dataset"] = sums
        if recipe is instruction_sft:
            options |= {"template": ["gsm8k"], "dataset": sums, "max_new_tokens": 4, "lora": True}
        if recipe is cloze_sft:
            options["model_name_or_path"] = masked_model
        folders[name] = start(recipe, root / name, **options)
    return folders


@pytest.fixture(scope="module")
def loaded(finished, reviews, tmp_path_factory) -> Path:
    """The folder of what the scripts have computed, each by what it loaded."""
    root, scripts = tmp_path_factory.mktemp("scripts"), []
    for name, folder in finished.items():
        (root / name).mkdir()
        script = root / name / "load.py"
        script.write_text(shown_code(folder) + AFTER)
        scripts.append([str(script), str(root / f"{name}.pt")])
    shutil.copy(finished["adapter"] / "peft_bottleneck.py", root / "adapter")
    icl = [
        *(str(ROOT / "recipes" / "icl_eval.py"), "--adapter", str(finished["adapter"])),
        *("--template", str(finished["adapter"] / "template.yaml"), "--dataset", str(reviews)),
        *("--shots", "0", "--output_dir", str(root / "icl"), "--max_length", "512"),
    ]
    done = subprocess.run(
        [sys.executable, "-c", FORKS, json.dumps([*scripts, icl])], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return root


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits


@pytest.mark.parametrize("name", RUNS)
def test_a_model_card_shows_how_to_load_the_run(name, finished, loaded, causal_model, masked_model):
    folder, masked = finished[name], RUNS[name][0] is cloze_sft
    kind = AutoModelForMaskedLM if masked else AutoModelForCausalLM
    untouched = kind.from_pretrained(masked_model if masked else causal_model)
    before = logits(untouched)
    if name == "cloze_and_prompt":
        expected = logits(
            PeftModel.from_pretrained(kind.from_pretrained(folder / "base_model"), folder)
        )
    elif (folder / "adapter_config.json").exists():
        expected = logits(PeftModel.from_pretrained(untouched, folder))
    else:
        expected = logits(kind.from_pretrained(folder))
    found = torch.load(loaded / f"{name}.pt")
    assert torch.allclose(found, expected, atol=1e-6)
    assert not torch.allclose(found[:, -IDS.shape[1] :], before, atol=1e-4), "nothing was learned"


def test_icl_eval_scores_a_bottleneck_adapter_as_its_run_did(finished, loaded):
    scored = read_jsonl(loaded / "icl" / "predictions.jsonl")
    own = read_jsonl(finished["adapter"] / "predictions.jsonl")
    for record, other in zip(scored, own, strict=True):
        assert record["scores"]["sum"] == pytest.approx(other["log_likelihoods"], abs=1e-4)
