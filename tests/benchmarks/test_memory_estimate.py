"""The benchmark of the memory estimate."""

import json

import memory_estimate
import pytest


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_case_is_estimated_and_measured(method, model_folder, tmp_path, capfd):
    words = ["--measure", "--methods", method, "--batch", 2, "--length", 60, "--steps", 1]
    words += ["--model_name_or_path", model_folder, "--output_dir", tmp_path]
    memory_estimate.main([*map(str, words)])
    case = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert case["estimated"] > 0 < case["measured"]
