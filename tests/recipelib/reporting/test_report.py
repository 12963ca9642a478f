import json
import math
import re

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import example, given, settings
from hypothesis import strategies as st
from matplotlib.image import imread

from recipelib.reporting.card import model_card
from recipelib.reporting.figures import plot_loss
from recipelib.runtime.console import print_table
from recipelib.runtime.files import write_json, write_jsonl
from recipelib.runtime.installed import versions

fewer = settings(max_examples=50, deadline=None)


# the table


def test_a_piped_table_is_plain_text_of_at_most_100_columns(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "30")
    rows = {"score": 0.8412345, "rows": 6920, "none": None, "path": "x" * 300, "日本": "[bold]é[/]"}
    print_table("LoRA on [movie_reviews]", rows)
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert max(map(len, out.splitlines())) == 100
    for shown in ("LoRA on [movie_reviews]", "0.8412", "6,920", "日本", "[bold]é[/]"):
        assert shown in out
    assert out.count("x") == 300  # folded, not cut off


@pytest.mark.parametrize(("rank", "printed"), [(None, True), ("0", True), ("1", False)])
def test_only_the_main_process_prints(rank, printed, capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    if rank:
        monkeypatch.setenv("RANK", rank)
    print_table("title", {"a": 1})
    assert bool(capsys.readouterr().out) == printed


def test_control_characters_in_a_value_are_shown_not_obeyed(capsys):
    print_table("t\x07", {"name\x1b[31m": "\x1b]0;title\x07"})
    out = capsys.readouterr().out
    assert not {"\x1b", "\x07"} & set(out)
    assert r"name\x1b[31m" in out


def test_a_terminal_without_utf8_still_gets_its_table(tmp_path, monkeypatch):
    path = tmp_path / "out.txt"
    with path.open("w", encoding="ascii") as stream:
        monkeypatch.setattr("sys.stdout", stream)
        print_table("título", {"日": "±"})
    assert r"\xb1" in path.read_text("ascii")


# JSON


@fewer
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=8,
    )
)
def test_json_comes_back_as_it_was_with_null_for_what_json_lacks(tmp_path_factory, data):
    def expected(value):
        if isinstance(value, float) and not math.isfinite(value):
            return None
        if isinstance(value, dict):
            return {key: expected(item) for key, item in value.items()}
        return [expected(item) for item in value] if isinstance(value, list) else value

    folder = tmp_path_factory.mktemp("json")
    write_json(folder / "one.json", data)
    assert json.loads((folder / "one.json").read_text("utf-8")) == expected(data)
    write_jsonl(folder / "many.jsonl", [data, data])
    lines = (folder / "many.jsonl").read_bytes().split(b"\n")
    assert [json.loads(line) for line in lines[:-1]] == [expected(data)] * 2
    assert lines[-1] == b""


def test_json_is_readable_utf8_and_takes_numpy_numbers_and_lone_surrogates(tmp_path):
    path = tmp_path / "new folder" / "metrics.json"
    data = {"é": np.float32(0.5), "array": np.arange(2), "nan": np.float64("nan"), "path": path}
    write_json(path, data | {"half": "\ud83d"})
    assert '"é": 0.5' in path.read_text("utf-8")
    back = json.loads(path.read_text("utf-8"))
    assert back == {"é": 0.5, "array": [0, 1], "nan": None, "path": str(path), "half": "\ud83d"}


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "predictions.jsonl"
    write_jsonl(path, [{"row": 1}])

    def records():
        yield {"row": 2}
        raise RuntimeError("the model failed")

    with pytest.raises(RuntimeError):
        write_jsonl(path, records())
    with pytest.raises(TypeError):
        write_json(path, {"no JSON": object()})
    assert path.read_text() == '{"row": 1}\n'
    assert list(tmp_path.iterdir()) == [path]


def test_files_have_the_usual_permissions(tmp_path):
    (tmp_path / "plain").write_text("")
    write_json(tmp_path / "metrics.json", {})
    assert (tmp_path / "metrics.json").stat().st_mode == (tmp_path / "plain").stat().st_mode


# the loss curve


def run(losses, rate=2e-4, every=1, evaluations=0):
    log = []
    for i, loss in enumerate(losses, 1):
        log.append({"step": i * every, "epoch": i / len(losses), "grad_norm": 1.0, "loss": loss})
        if rate is not None:
            log[-1]["learning_rate"] = rate * (1 - i / len(losses))
        if evaluations and i % max(1, len(losses) // evaluations) == 0:
            log.append({"step": i * every, "eval_loss": 1.1, "eval_runtime": 2.0})
    return [*log, {"step": len(losses) * every, "train_loss": 1.0, "train_runtime": 3.0}]


def falling(n):
    noise = np.random.default_rng(0).normal(0, 0.1, n)
    return (0.5 + 2 * np.exp(-4 * np.arange(n) / n) + noise).tolist()


def pixels_near(image, color):
    wanted = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return int((np.abs(image[:, :, :3] - wanted).max(axis=2) < 0.05).sum())


BLUE, LIGHT_BLUE, ORANGE, RED = "#0b5394", "#9fc5e8", "#d95f02", "#c00000"


@pytest.fixture
def draw(tmp_path):
    def draw(log, title="movie_reviews", subtitle="SmolLM2"):
        path = tmp_path / "loss.png"
        plot_loss(log, path, title=title, subtitle=subtitle)
        assert list(tmp_path.iterdir()) == [path]
        image = imread(path)
        assert image.shape[:2] == (900, 1600)
        return image

    return draw


@pytest.mark.parametrize(
    "losses",
    [
        falling(1),
        falling(2),
        falling(5),
        falling(19),
        falling(20),
        falling(5000),
        [0.7] * 100,
        [0.0] * 30,
        [1e-9, 2e-9],
        [12.0, 2.0, 1.9, 1.8, 1.7],
        [2.0, math.nan, math.inf, 1.0, None, 0.5],
    ],
    ids=lambda losses: f"{len(losses)} from {losses[0]:.1f}",
)
@pytest.mark.parametrize("evaluations", [0, 3])
def test_a_curve_is_drawn_whatever_the_run(losses, evaluations, draw):
    image = draw(run(losses, evaluations=evaluations))
    assert pixels_near(image, BLUE) > 100
    assert (pixels_near(image, ORANGE) > 100) == bool(evaluations)


@pytest.mark.parametrize(
    "log", [[], [{"step": 3, "train_runtime": 1.0}], run([math.nan] * 5, rate=0)]
)
def test_a_run_without_a_finite_loss_gets_a_figure_that_says_so(log, draw):
    image = draw(log)
    assert pixels_near(image, BLUE) == 0
    assert (image[:, :, :3] < 0.3).any()


def test_losses_that_are_not_finite_are_marked(draw):
    losses = falling(100)
    assert pixels_near(draw(run(losses)), RED) == 0
    losses[40] = math.nan
    assert pixels_near(draw(run(losses)), RED) > 100


def test_the_first_steps_and_a_spike_do_not_flatten_the_curve(draw):
    losses = falling(300)
    height = rows_of(draw(run(losses)), BLUE)
    losses[0], losses[150] = 40.0, 500.0
    assert rows_of(draw(run(losses)), BLUE) > 0.6 * height


def rows_of(image, color):
    """How many pixel rows of the axes, the labels at the right left out, hold the color."""
    part = image[:, :1380]
    return sum(pixels_near(part[i : i + 1], color) > 0 for i in range(len(part)))


def test_a_divergence_at_the_end_stays_in_view(draw):
    losses = [1.0] * 180 + [1.0 + i for i in range(20)]
    assert rows_of(draw(run(losses)), LIGHT_BLUE) > 300


def test_the_learning_rate_has_its_panel_only_where_it_was_logged(draw):
    with_rate, without = draw(run(falling(50))), draw(run(falling(50), rate=None))
    assert rows_of(without, BLUE) > rows_of(with_rate, BLUE) + 100


def test_markup_and_long_text_in_a_title_are_only_text(draw):
    image = draw(run(falling(5)), title="$x_{ costs $5 " * 20, subtitle="a\nb " * 100)
    assert (image[:, 1590:, :3] == 1).all()  # nothing runs over the edge


def test_drawing_leaves_pyplot_alone(draw):
    import sys

    before = "matplotlib.pyplot" in sys.modules
    draw(run(falling(5)))
    assert ("matplotlib.pyplot" in sys.modules) == before
    if before:
        assert sys.modules["matplotlib.pyplot"].get_fignums() == []


def test_smoothing_has_no_pull_towards_zero_and_follows_a_line():
    from recipelib.reporting.figures import _smooth

    assert _smooth(np.full(500, 3.0)) == pytest.approx(np.full(500, 3.0))
    line = np.linspace(2, 1, 8)
    assert _smooth(line) == pytest.approx(line)
    spike = line.copy()
    spike[4] = 50
    assert _smooth(spike).max() <= 2
    noise = 1 + np.random.default_rng(0).normal(0, 0.1, 2000)
    assert _smooth(noise)[200:].std() < 0.3 * noise.std()


# versions and memory


def test_versions_are_those_of_the_imported_libraries():
    import platform

    import torch

    found = versions()
    assert found["python"] == platform.python_version()
    assert found["torch"] == torch.__version__
    assert {"transformers", "trl", "peft", "accelerate", "datasets", "evaluate"} < set(found)


def test_versions_leave_out_what_is_not_installed(monkeypatch):
    import importlib.metadata as metadata

    real = metadata.version

    def version(name):
        if name == "trl":
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(metadata, "version", version)
    assert "trl" not in versions()
    assert "torch" in versions()


# the model card

METRICS = {
    "metric": "accuracy",
    "score": 0.84,
    "stderr": 0.0259,
    "base_score": 0.77,
    "eval_rows": 872,
}


def card(**changes):
    arguments = {
        "title": "Movie reviews",
        "template_description": "Is a movie review positive or negative?",
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "method": "lora_sft",
        "command": "python recipes/lora_sft.py --r 16",
        "metrics": METRICS,
        "versions": {"peft": "0.21.2"},
        "load_snippet": "from peft import AutoPeftModelForCausalLM",
    }
    return model_card(**arguments | changes)


def front_matter(text):
    return yaml.safe_load(re.match(r"---\n(.*?\n)---\n", text, re.DOTALL)[1])


def blocks(text):
    """The code blocks of a Markdown text, by CommonMark's rule for closing fences."""
    found, fence, inside = [], None, []
    for line in text.split("\n"):
        opening = re.fullmatch(r" {0,3}(`{3,})([^`]*)", line)
        if fence is None and opening:
            fence, inside = opening[1], []
        elif fence and re.fullmatch(rf" {{0,3}}`{{{len(fence)},}}\s*", line):
            found.append("\n".join(inside))
            fence = None
        elif fence:
            inside.append(line)
    assert fence is None
    return found


def test_the_card_says_what_the_hub_and_a_reader_need():
    text = card(license="apache-2.0", pipeline_tag="text-generation")
    assert front_matter(text) == {
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "library_name": "peft",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["lora_sft"],
        "metrics": ["accuracy"],
    }
    assert "| before training | 0.770 | 872 |" in text
    assert "| after training | 0.840 ± 0.026 | 872 |" in text
    assert "- peft 0.21.2" in text
    assert blocks(text) == [
        "python recipes/lora_sft.py --r 16",
        "from peft import AutoPeftModelForCausalLM",
    ]


def test_the_hub_reads_the_front_matter():
    data = ModelCard(card(license="mit")).data
    assert data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert (data.library_name, data.license, data.tags) == ("peft", "mit", ["lora_sft"])


def test_what_is_unknown_is_left_out(tmp_path):
    text = card(base_model=str(tmp_path), metrics={"score": math.nan})
    assert set(front_matter(text)) == {"library_name", "tags"}
    assert "nan" not in text.lower().split("# movie reviews")[1]
    assert "None" not in text


def test_a_folder_named_like_a_hub_id_is_no_hub_id(tmp_path, monkeypatch):
    (tmp_path / "runs" / "lora").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert "base_model" not in front_matter(card(base_model="runs/lora"))


PIECES = [
    "```",
    "\n",
    "`",
    "|",
    "#",
    "---",
    ": ",
    "'",
    '"',
    "{",
    "<b>",
    "_",
    "\\",
    "[x]",
    "~~~",
    "é日",
    "a",
]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=8).map("".join)


@fewer
@example("title", "a\n```\nb", "x = '```'\n````", "word")
@given(TEXTS, TEXTS, TEXTS, TEXTS)
def test_no_text_breaks_the_yaml_the_table_or_a_code_block(title, command, snippet, word):
    text = card(
        title=title,
        template_description=word,
        method=word or "x",
        command=command,
        load_snippet=snippet,
        license=word,
        metrics=METRICS | {"metric": word or "x"},
        versions={word: word},
    )
    front = front_matter(text)
    assert (front["tags"], front["license"]) == ([word or "x"], word)
    assert ModelCard(text).data.to_dict()["license"] == word
    assert blocks(text)[:2] == [command.rstrip(), snippet.rstrip()]
    header = next(line for line in text.split("\n") if line.startswith("| | "))
    assert len(re.findall(r"(?<!\\)(?:\\\\)*\|", header)) == 4
