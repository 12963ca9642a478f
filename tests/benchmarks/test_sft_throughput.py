"""The benchmark beside TRL's script: run whole on a tiny model, its parts on made-up runs."""

import importlib.util
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from tiny_llama import save_tiny_llama

from recipelib.models.loading import load_tokenizer
from recipelib.runtime.errors import UserError

ROOT = Path(__file__).parents[2]
SCRIPT = "benchmarks/sft_throughput.py"


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


word_problems = load("word_problems")  # first: the benchmark imports it
bench = load("sft_throughput")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("model"))


def command(*arguments: object) -> subprocess.CompletedProcess:
    words = [sys.executable, SCRIPT, *map(str, arguments)]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True)


# The whole benchmark


@pytest.fixture(scope="module")
def finished(model_folder, tmp_path_factory) -> tuple[list[str], Path]:
    """The lines that a short real run prints, and the folder that it keeps."""
    keep = tmp_path_factory.mktemp("keep")
    steps = ["--quick", "--steps", 3, "--keep", keep]
    done = command("--model_name_or_path", model_folder, *steps)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines(), keep


@pytest.mark.slow
def test_the_last_line_holds_the_ratio_to_the_faster_of_trls_runs(finished):
    result = json.loads(finished[0][-1])
    assert next(iter(result)) == "ratio"
    speeds = {arm: one["tokens_per_second"] for arm, one in result["arms"].items()}
    bare = "trl, also without dropout"
    assert set(speeds) == {"ours", "trl", "trl without activation checkpointing", bare}
    for one in result["arms"].values():
        assert one["tokens_per_second"] == pytest.approx(one["tokens"] / one["seconds"][0])
        assert 50 * 2**20 < one["peak_memory_bytes"] < 20 * 2**30
    ours = speeds.pop("ours")
    assert result["ratio_without_dropout"] == pytest.approx(ours / speeds.pop(bare))
    assert result["faster_trl"] == max(speeds, key=speeds.get)
    assert result["ratio"] == pytest.approx(ours / max(speeds.values()))


@pytest.mark.slow
def test_all_arms_train_the_same_tokens_from_the_same_loss(finished):
    lines, keep = finished
    result = json.loads(lines[-1])
    assert {one["tokens"] for one in result["arms"].values()} == {result["arms"]["ours"]["tokens"]}
    losses = {}
    bare = bench.TRL_BARE
    for folder, arm in (("ours_1", "ours"), (f"{bare.replace(' ', '_')}_1/checkpoint-3", bare)):
        history = json.loads((keep / folder / "trainer_state.json").read_text())["log_history"]
        losses[arm] = [entry["loss"] for entry in history if "loss" in entry]
        assert len(losses[arm]) == 3
        assert result["arms"][arm]["mean_loss"] == pytest.approx(np.mean(losses[arm]))
    differences = np.abs(np.subtract(losses["ours"], losses[bare]))
    assert differences[0] < 1e-4
    assert result["first_loss_difference"] < 1e-4
    assert result["max_loss_difference"] == pytest.approx(max(differences), abs=1e-5)
    assert result["mean_loss_difference"] == pytest.approx(np.mean(differences), abs=1e-5)


@pytest.mark.slow
def test_the_arms_differ_in_what_their_names_say_and_in_micro_batches_only(finished):
    targets = []
    for arm in bench.ARMS:
        folder = finished[1] / f"{arm}_1".replace(" ", "_")
        config = json.loads((folder / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"]) == (16, 32)
        assert config["lora_dropout"] == (0.0 if arm in (bench.OURS, bench.TRL_BARE) else 0.05)
        targets.append(sorted(config["target_modules"]))
    assert all(one == targets[0] for one in targets)


@pytest.mark.slow
def test_the_tables_show_every_arm_and_the_loss_of_every_step(finished):
    text = "\n".join(finished[0])
    for arm in bench.ARMS:
        assert re.search(rf"│ {arm} +│ +\d", text)
        assert f"{arm}: 3 steps" in text  # as it starts
    assert len(re.findall(r"│ +[123] │ \d\.\d{5} │ \d\.\d{5} │ .*[+-]\d\.\d{5} │", text)) == 3


@pytest.mark.slow
def test_a_script_that_crashes_is_one_line_with_its_last_words(model_folder, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in model_folder.iterdir():
        content = file.read_bytes()
        (broken / file.name).write_bytes(content[:100] if "safetensors" in file.name else content)
    done = command("--model_name_or_path", broken, "--quick")
    assert done.returncode == 1
    assert re.fullmatch(
        r"error: ours: ended with exit code 2: .+ \(--keep DIR keeps .+\)\n", done.stderr
    )


def test_a_benchmark_that_is_ended_leaves_nothing_running(model_folder, tmp_path):
    words = [sys.executable, SCRIPT, "--model_name_or_path", model_folder, "--keep", tmp_path]
    benchmark = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL)
    children, deadline = [], time.monotonic() + 60
    try:
        # Not in the moment in which it starts the recipe, but once that has worked for a while.
        while not any(
            "lora_sft.py" in " ".join(one.cmdline()) and one.cpu_times().user > 0.3
            for one in children
        ):
            assert time.monotonic() < deadline
            time.sleep(0.05)
            children = psutil.Process(benchmark.pid).children()
        benchmark.terminate()
        assert benchmark.wait(30) == 143
        assert psutil.wait_procs(children, 30)[1] == []
    finally:
        benchmark.kill()


# Its parts


def fake(tokens=100, seconds=1.0, losses=(2.0, 1.0), memory=2**30, padding=None):
    return bench.Run(tokens, seconds, list(losses), memory, padding)


@pytest.fixture
def start(monkeypatch, tmp_path, capsys):
    """Runs `main` with made-up runs of the arms; gives its result and the order of the runs."""

    def run(*argv: str, **made):
        order = []

        def run_arm(arm, folder, model, steps, name):
            order.append((arm, steps))
            return made.get(arm.split()[-1], fake())

        monkeypatch.setattr(bench, "run_arm", run_arm)
        monkeypatch.setattr(bench, "resolve_apart", lambda name: "model")
        result = bench.main(list(argv))
        assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
        return result, order

    return run


def test_rounds_alternate_after_a_warm_up_of_each_side(start):
    result, order = start("--rounds", "2")
    assert order[:2] == [("ours", 2), ("trl", 2)]
    assert order[2:] == [(arm, 50) for arm in bench.ARMS] * 2
    assert result["arms"]["trl"]["seconds"] == [1.0, 1.0]


def test_a_quick_run_has_few_steps_and_no_warm_up(start):
    result, order = start("--quick")
    assert order == [(arm, bench.QUICK_STEPS) for arm in bench.ARMS]
    assert result["warm_up"] is False


def test_the_ratio_is_against_the_faster_arm_with_dropout_and_losses_against_the_one_without(start):
    slow, fast = fake(seconds=4.0), fake(seconds=3.0)
    bare = fake(seconds=2.0, losses=(2.0, 1.5))
    result, _ = start("--quick", trl=slow, checkpointing=fast, dropout=bare)
    assert result["ratio"] == pytest.approx(3)
    assert result["ratio_without_dropout"] == pytest.approx(2)
    assert result["max_loss_difference"] == 0.5
    result, _ = start("--quick", trl=fast, checkpointing=slow)
    assert result["ratio"] == pytest.approx(3)
    assert result["faster_trl"] == "trl"


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (fake(tokens=101), "trl: 101 tokens, but 100 with ours"),
        (fake(losses=[2.0]), "trl: 1 logged losses, but 2 with ours"),
        (fake(losses=[2.0002, 1.0]), "trl: loss 2.000200 in step 1, but 2.000000 with ours"),
        (fake(losses=[float("nan"), 1.0]), "trl: loss nan in step 1"),
    ],
)
def test_other_work_is_no_comparison(start, other, said):
    with pytest.raises(bench.ArmFailed, match=said):
        start("--quick", trl=other)


def test_threads_are_the_users_or_one_for_each_core(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert bench.threads() == "7"
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert bench.threads() == str(bench.cores())


def test_the_peak_is_that_of_the_process_alone(tmp_path):
    # From a process as small as the benchmark's, for a child's count starts at its parent's peak.
    code = (
        "import sys; sys.path.insert(0, 'benchmarks'); import sft_throughput as bench\n"
        "from pathlib import Path; folder = Path(sys.argv[1])\n"
        "for mib in 1, 300:\n"
        "    touched = f'bytearray({mib} << 20)[::4096] = bytes(256 * {mib})'\n"
        "    words = [sys.executable, '-c', touched]\n"
        "    print(bench.run_process(words, folder / 'log', folder, 'arm') >> 20)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    small, large = map(int, done.stdout.split())
    assert small < 200
    assert 300 < large < 400


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--steps", "0"], "--steps 0: must be 1 or more"),
        (["--rounds", "0"], "--rounds 0: must be 1 or more"),
        (["--keep", "benchmarks"], "--keep benchmarks: is not empty"),
        (["--keep", "README.md"], "--keep README.md: File exists"),
        (["--dataset", "no.jsonl"], "--dataset no.jsonl: cannot be read"),
        (["--dataset", "README.md"], "README.md:1: no row of GSM8K"),
        (["--model_name_or_path", "./none"], "./none: no such folder"),
    ],
)
def test_a_mistake_is_one_line(arguments, said):
    done = command(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {said}")
    assert done.stderr.count("\n") == 1


# The rows


def test_generated_rows_are_the_same_every_time_and_all_different():
    rows = word_problems.generate_problems(400)
    assert rows == word_problems.generate_problems(400)
    assert rows[:100] == word_problems.generate_problems(100)
    assert rows != word_problems.generate_problems(400, seed=1)
    assert len({row["prompt"] for row in rows}) == 400


def test_the_worked_steps_are_right_and_lead_to_the_answer():
    for row in word_problems.generate_problems(300, seed=3):
        assert re.fullmatch(r"Question: .+\?\nAnswer:", row["prompt"])
        steps = re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)", row["completion"])
        assert len(steps) >= 2
        for a, sign, b, result in steps:
            a, b = int(a), int(b)
            assert {"+": a + b, "-": a - b, "*": a * b, "/": a / b}[sign] == int(result)
        assert row["completion"].startswith(" ")
        assert row["completion"].endswith(f"\nThe answer is {steps[-1][-1]}")


def test_generated_rows_are_as_long_as_gsm8ks_and_spread_as_much():
    # Of GSM8K's first 400 training rows, with the bundled tokenizer: mean, standard deviation.
    gsm8k = {"prompt": (66.1, 21.4), "completion": (99.8, 45.8), "total": (166.0, 59.4)}
    encode = load_tokenizer().encode
    rows = word_problems.generate_problems(400)
    prompt, completion = (
        np.array([len(encode(row[part], add_special_tokens=False)) for row in rows])
        for part in ("prompt", "completion")
    )
    completion += 1  # the end marker
    lengths = {"prompt": prompt, "completion": completion, "total": prompt + completion}
    for part, (mean, deviation) in gsm8k.items():
        assert lengths[part].mean() == pytest.approx(mean, rel=0.1), part
        assert lengths[part].std() == pytest.approx(deviation, rel=0.1), part
    assert np.percentile(lengths["total"], 95) == pytest.approx(268, rel=0.15)


def write_gsm8k(path: Path, lines: list[str]) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


GOOD = json.dumps({"question": "1 + 1?", "answer": "It is 1+1=<<1+1=2>>2.\n#### 2"})


def test_gsm8ks_rows_lose_the_calculators_marks(tmp_path):
    rows = word_problems.read_gsm8k(write_gsm8k(tmp_path / "rows.jsonl", [GOOD] * 3), 2)
    assert (
        rows
        == [{"prompt": "Question: 1 + 1?\nAnswer:", "completion": " It is 1+1=2.\nThe answer is 2"}]
        * 2
    )


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([GOOD, '{"question": "1?", "answer": "1"}'], "rows.jsonl:2: no row of GSM8K"),
        ([GOOD, "[1]"], "rows.jsonl:2: no row of GSM8K"),
        ([GOOD, '{"question": 1, "answer": "#### 1"}'], "rows.jsonl:2: no row of GSM8K"),
        ([GOOD], "rows.jsonl: holds 1 rows; 2 are needed"),
    ],
)
def test_a_file_that_is_not_gsm8k_is_refused(lines, said, tmp_path):
    path = write_gsm8k(tmp_path / "rows.jsonl", lines)
    with pytest.raises(UserError, match=said):
        word_problems.read_gsm8k(path, 2)
