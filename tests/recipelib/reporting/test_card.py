"""The model card is what the hub and a reader need, its snippet loads the model, and the hub gets
the run.
"""

import math
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, Response
from huggingface_hub.utils import filter_repo_objects
from hypothesis import example, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from tiny_bert import tiny_bert
from tiny_llama import save_tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipelib.adapters.bottleneck import BottleneckConfig
from recipelib.adapters.soft_verbalizer import SoftVerbalizer
from recipelib.models.head import bare_model
from recipelib.reporting.card import load_snippet, model_card, publish
from recipelib.runtime.errors import UserError

fewer = settings(max_examples=50, deadline=None)

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
    assert "| accuracy |  | 0.770 | 0.840 ± 0.026 | 872 |" in text
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
    header = next(line for line in text.split("\n") if "±" in line)
    assert len(re.findall(r"(?<!\\)(?:\\\\)*\|", header)) == 6


# The hub

REFUSED = Response(401, request=SimpleNamespace(url="https://hub.example"))


class FakeApi:
    """Keeps what it was asked for; `failure` is raised by the step named."""

    calls: list
    failure: dict

    def __init__(self, token=None):
        self.calls.append(("token", token))

    def create_repo(self, name, *, private, exist_ok):
        self.calls.append(("create", name, private, exist_ok))
        if "create" in self.failure:
            raise self.failure["create"]
        return SimpleNamespace(repo_id=name if "/" in name else f"someone/{name}")

    def upload_folder(self, *, repo_id, folder_path, ignore_patterns):
        if "upload" in self.failure:
            raise self.failure["upload"]
        card = (Path(folder_path) / "README.md").read_text()
        files = [
            str(one.relative_to(folder_path))
            for one in Path(folder_path).rglob("*")
            if one.is_file()
        ]
        uploaded = set(filter_repo_objects(files, ignore_patterns=ignore_patterns))
        self.calls.append(("upload", repo_id, uploaded, card))


@pytest.fixture
def api(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    fake = type("Api", (FakeApi,), {"calls": [], "failure": {}})
    monkeypatch.setattr(huggingface_hub, "HfApi", fake)
    return fake


@pytest.fixture
def finished(tmp_path):
    """The folder of a finished run."""
    folder = tmp_path / "runs" / "mine"
    folder.mkdir(parents=True)
    for name in ("metrics.json", "predictions.jsonl", "template.yaml", "adapter.safetensors"):
        (folder / name).write_text("{}")
    (folder / "README.md").write_text(f"PeftModel.from_pretrained(model, {str(folder)!r})\n")
    return folder


@pytest.fixture
def training(finished):
    return SimpleNamespace(
        output_dir=str(finished), hub_model_id=None, hub_token=None, hub_private_repo=None
    )


def test_a_model_below_the_published_folder_is_named_as_the_repositorys(finished, training, api):
    folder, card = training.output_dir, finished / "README.md"
    card.write_text(f"load({folder + '/base_model'!r})\nload(model, {folder!r})\n")
    training.hub_model_id = "me/mine"
    publish(folder, training)
    said = "load('me/mine', subfolder='base_model')\nload(model, 'me/mine')\n"
    assert card.read_text() == said


def test_a_run_is_published_without_checkpoints_under_the_name_and_token_given(
    finished, training, api, capsys
):
    others = ("samples.jsonl", ".run.lock", "pissa_start/a.safetensors")
    for name in ("checkpoint-20/optimizer.pt", "merged/model.safetensors", *others):
        (finished / name).parent.mkdir(exist_ok=True)
        (finished / name).write_bytes(b"")
    training.hub_model_id = "team/reviews"
    training.hub_token, training.hub_private_repo = "hf_secret", True
    publish(training.output_dir, training)
    token, create, (_, repository, uploaded, card) = api.calls
    assert token == ("token", "hf_secret")
    assert create == ("create", "team/reviews", True, True)
    assert repository == "team/reviews"
    # They hold rows of the user, and who is publishing.
    assert not {"predictions.jsonl", "samples.jsonl", ".run.lock"} & uploaded
    assert {"adapter.safetensors", "README.md", "metrics.json", "template.yaml"} <= uploaded
    assert not [one for one in uploaded if one.startswith(("checkpoint", "merged", "pissa"))]
    assert "from_pretrained(model, 'team/reviews')" in card
    assert str(finished) not in card
    assert "pushed to team/reviews" in capsys.readouterr().out


def test_without_a_name_the_folder_gives_it_and_the_hub_the_owner(finished, training, api):
    publish(training.output_dir + "/", training)
    assert api.calls[1] == ("create", "mine", None, True)
    assert api.calls[2][1] == "someone/mine"


def test_other_processes_upload_nothing(finished, training, api, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    publish(training.output_dir, training)
    assert api.calls == []


@pytest.mark.parametrize("step", ["create", "upload"])
@pytest.mark.parametrize(
    "failure",
    [
        HfHubHTTPError("\n401 Client Error.\n\nInvalid username", response=REFUSED),
        LocalTokenNotFoundError("Token is required\n(`token=True`)"),
        OSError(),
    ],
    ids=["refused", "not logged in", "without a word"],
)
def test_a_hub_that_refuses_is_one_line_with_the_cure(finished, training, api, step, failure):
    api.failure[step] = failure
    with pytest.raises(UserError, match=r"^--push_to_hub: ") as error:
        publish(training.output_dir, training)
    line = str(error.value)
    assert "\n" not in line
    for shown in ("hf auth login", f"hf upload mine {finished}", str(failure).strip()[:10]):
        assert shown in line
    assert (finished / "metrics.json").exists()


@pytest.mark.parametrize(
    ("name", "said"), [(None, "refused"), ("two words", "Repo id must use"), ("a/b/c", "Repo id")]
)
def test_the_hubs_own_client_fails_in_one_line_too(finished, training, name, said, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    # A closed port of this machine stands for a network that is down.
    offline = partial(huggingface_hub.HfApi, endpoint="http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub, "HfApi", offline)
    training.hub_model_id, training.hub_token = name, "hf_secret"
    with pytest.raises(UserError, match=said) as error:
        publish(training.output_dir, training)
    assert "\n" not in str(error.value)
    assert "hf_secret" not in str(error.value)


# How it is loaded


def run_snippet(snippet: str) -> dict:
    """The names that the snippet has made, as a reader would have them."""
    names: dict = {}
    exec(snippet, names)
    return names


IDS = torch.tensor([[5, 17, 42, 99]])


def adapted(base_folder, config):
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(base_folder)
    model = get_peft_model(base, config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.normal_(std=0.3)
    return model.eval()


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    return str(save_tiny_llama(tmp_path_factory.mktemp("base") / "tiny"))


SOFT = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
ADAPTERS = {
    "none": None,
    "lora": LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    "soft prompt": SOFT,
    "prefix": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_what_the_card_says_loads_the_model_as_it_was_trained(kind, base_folder, tmp_path):
    config = ADAPTERS[kind]
    if config is None:
        model = AutoModelForCausalLM.from_pretrained(base_folder).eval()
        with torch.no_grad():
            model.model.norm.weight *= 2
    else:
        model = adapted(base_folder, config)
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(base_folder).save_pretrained(tmp_path)
    names = run_snippet(load_snippet(model, str(tmp_path)))
    with torch.no_grad():
        found, wanted = (one.eval()(IDS).logits for one in (names["model"], model))
    torch.testing.assert_close(found, wanted)
    assert names["tokenizer"]("the capital")["input_ids"]
    said = load_snippet(model, str(tmp_path))
    assert ("The prompt stands in front" in said) == (kind == "soft prompt")
    assert found.shape[1] == len(IDS[0]) + 3 * (kind == "soft prompt")


def test_the_card_of_an_adapter_names_the_revision_of_its_base(base_folder):
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base_folder), ADAPTERS["lora"], revision="v1"
    )
    said = load_snippet(model, "runs/mine")
    assert f"from_pretrained({base_folder!r}, revision='v1')" in said


def test_of_a_prompt_that_was_trained_with_its_model_the_tuned_model_is_loaded(base_folder):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base_folder), SOFT)
    model.requires_grad_(True)
    said = load_snippet(model, "runs/mine")
    assert "AutoModelForCausalLM.from_pretrained('runs/mine/base_model')" in said
    assert "PeftModel.from_pretrained(model, 'runs/mine')" in said


def test_a_masked_model_a_method_of_ours_and_label_embeddings_are_said():
    model = get_peft_model(tiny_bert(60), BottleneckConfig(bottleneck_size=4))
    said = load_snippet(model, "runs/mine")
    assert said.startswith("import peft_bottleneck  # a file of this folder")
    assert "AutoModelForMaskedLM" in said
    assert "soft_verbalizer" not in said
    SoftVerbalizer.at_words(bare_model(model), {"a": [[5]], "b": [[6]]}).into(bare_model(model))
    assert "load_soft_verbalizer('runs/mine', model)" in load_snippet(model, "runs/mine")
