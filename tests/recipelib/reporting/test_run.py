"""What a run shows before it trains, what it leaves behind, and what goes to the hub."""

import io
import json
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, Response
from huggingface_hub.utils import filter_repo_objects
from tiny_llama import tiny_llama
from tokenizers_for_tests import NAMES, tokenizer_for
from transformers import LlamaForCausalLM

from recipelib.encoding.examples import EncodedRows, encode_rows
from recipelib.encoding.prompt_encoder import IGNORED, PromptEncoder
from recipelib.encoding.tokens import TextEncoder
from recipelib.evaluation.scores import TaskScore
from recipelib.models.quantization import count_parameters
from recipelib.prompts.template import PromptTemplate
from recipelib.reporting import run as results
from recipelib.reporting.card import publish
from recipelib.reporting.previews import preview
from recipelib.reporting.run import save_run
from recipelib.runtime.errors import UserError
from recipelib.training.memory import MemoryEstimate
from recipelib.training.plan import show_plan

REFUSED = Response(401, request=SimpleNamespace(url="https://hub.example"))
MEMORY = MemoryEstimate(parameters=1_000, gradients=0, optimizer=2_000, activations=3_000, logits=0)
HUB = {"hub_model_id": None, "hub_token": None, "hub_private_repo": None}


def encoded_rows(*parts: list[tuple[list[int], bool]]) -> EncodedRows:
    """An example for each list of (ids, supervised) runs."""
    encoded = EncodedRows()
    for number, runs in enumerate(parts):
        ids = [one for run, _ in runs for one in run]
        labels = [one if supervised else IGNORED for run, supervised in runs for one in run]
        encoded.add(number, ids, labels)
    return encoded


def body(out: str) -> str:
    """What stands below the ruled headings."""
    return "\n".join(line for line in out.splitlines() if "──" not in line)


# preview


@pytest.mark.parametrize("name", NAMES)
def test_a_preview_shows_the_text_and_marks_exactly_the_supervised_tokens(name, capsys):
    tokenizer = tokenizer_for(name)
    encode = TextEncoder(tokenizer).encode
    question, answer = list(encode("the story\n  is:")), list(encode(" very good"))
    preview(encoded_rows([(question, False), (answer, True)]), tokenizer, 1)
    out = capsys.readouterr().out
    assert f"{len(question + answer)} tokens, {len(answer)} supervised" in out
    # The space in front is shown, though by itself the answer decodes to "very good" in T5.
    assert re.search(r"is ?:⟦ +very good⟧$", body(out).rstrip())
    whole = tokenizer.decode(question + answer)
    assert body(out).replace("⟦", "").replace("⟧", "").strip() == whole.strip()


def test_only_as_many_examples_are_shown_as_asked_for_and_there_are(capsys):
    encoded = encoded_rows(*[[([65], False), ([66], True)]] * 3)
    preview(encoded, tokenizer_for("gpt2"), 2)
    assert len(re.findall(r"example \d", capsys.readouterr().out)) == 2
    preview(encoded, tokenizer_for("gpt2"), 9)
    assert len(re.findall(r"example \d", capsys.readouterr().out)) == 3


def test_every_answer_of_a_conversation_is_marked(capsys):
    encode = partial(tokenizer_for("gpt2").encode, add_special_tokens=False)
    turns = [(encode("who?"), False), (encode(" me"), True)] * 3
    preview(encoded_rows(turns), tokenizer_for("gpt2"), 1)
    assert body(capsys.readouterr().out).strip() == "who?⟦ me⟧" * 3


def test_an_example_that_is_all_answer_is_marked_whole(capsys):
    ids = tokenizer_for("gpt2").encode("good")
    preview(encoded_rows([(ids, True)]), tokenizer_for("gpt2"), 1)
    assert body(capsys.readouterr().out).strip() == "⟦good⟧"


def test_characters_of_several_tokens_and_markup_come_out_whole(capsys):
    tokenizer = tokenizer_for("gpt2")
    text, answer = "日本 [bold]🎬[/bold] größer", " 日👍"
    ids, target = tokenizer.encode(text), tokenizer.encode(answer)
    assert len(target) > len(answer)
    preview(encoded_rows([(ids, False), (target, True)]), tokenizer, 1)
    assert body(capsys.readouterr().out).strip() == f"{text}⟦{answer}⟧"


def test_a_long_line_is_not_broken_and_no_control_character_reaches_the_terminal(capsys):
    tokenizer = tokenizer_for("gpt2")
    ids = tokenizer.encode("good " * 100 + "\x1b[31mred\x07")
    preview(encoded_rows([(ids, False), (tokenizer.encode(" x"), True)]), tokenizer, 1)
    out = capsys.readouterr().out
    assert "good " * 100 + r"\x1b[31mred\x07⟦ x⟧" in out


def test_a_stream_without_the_brackets_still_shows_the_preview(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", stream)
    ids = tokenizer_for("gpt2").encode(" good")
    preview(encoded_rows([([65], False), (ids, True)]), tokenizer_for("gpt2"), 1)
    stream.flush()
    assert rb"\u27e6 good\u27e7" in stream.buffer.getvalue()


def test_a_terminal_shows_the_marks_as_color(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    encode = tokenizer_for("gpt2").encode
    encoded = encoded_rows([(encode("it was"), False), (encode(" good"), True)])
    preview(encoded, tokenizer_for("gpt2"), 1)
    out = capsys.readouterr().out
    assert "⟦" not in out
    assert re.search(r"it was\x1b\[[\d;]+m good\x1b\[0m", out)


# Counting


def test_parameters_that_are_tied_count_once():
    tied = tiny_llama(300)
    config = type(tied.config)(**{**tied.config.to_dict(), "tie_word_embeddings": False})
    separate = LlamaForCausalLM(config)
    assert count_parameters(separate)[1] - count_parameters(tied)[1] == 300 * 32
    assert count_parameters(tied) == (count_parameters(tied)[1],) * 2
    tied.requires_grad_(False)
    tied.model.norm.requires_grad_(True)
    assert count_parameters(tied)[0] == 32


# The run's folder


@pytest.fixture(scope="module")
def task():
    template = PromptTemplate.load("movie_reviews")
    tokenizer = tokenizer_for("gpt2")
    rows = [{"sentence": f"film {n}", "label": "positive"} for n in range(4)]
    encoder = PromptEncoder(template, tokenizer, 200)
    encoded = encode_rows(encoder, rows)
    return SimpleNamespace(template=template, tokenizer=tokenizer, encoder=encoder, encoded=encoded)


@pytest.fixture
def finish(task, tmp_path, monkeypatch):
    """Calls `save_run` as a recipe does on the bundled task, with a trainer that has stopped."""
    monkeypatch.delenv("RANK", raising=False)
    folder = tmp_path / "runs" / "mine"
    folder.mkdir(parents=True)

    def gather(counted):  # a second process: fewer tokens, more memory
        return torch.cat([counted, torch.tensor([[50, 100, 7_000, 8_000]])])

    model = tiny_llama(300)
    model.requires_grad_(False)
    model.model.norm.requires_grad_(True)
    training = SimpleNamespace(output_dir=str(folder), device="cpu", world_size=2, seed=3, **HUB)
    trainer = SimpleNamespace(
        args=training,
        model=model,
        tokens_seen=150,
        slots_seen=300,
        accelerator=SimpleNamespace(
            gather=gather, distributed_type=SimpleNamespace(value="MULTI_CPU")
        ),
        state=SimpleNamespace(global_step=2, log_history=[{"step": 1, "loss": 0.5}]),
        processing_class=task.tokenizer,
        save_state=lambda: (folder / "trainer_state.json").write_text("{}"),
    )
    (folder / "training_args.bin").write_bytes(b"pickle")
    records = [{"row": 0, "prompt": "p", "answer": "a", "prediction": "a", "score": 1.0}]
    base = TaskScore("accuracy", 0.5, 0.1, {}, records, 1, 2, 3.0)
    tuned = TaskScore("accuracy", 0.75, 0.05, {"macro_f1": 0.7}, records, 1, 2, 4.0)

    def call() -> dict:
        return save_run(
            trainer,
            task.encoder,
            task.encoded,
            base,
            tuned,
            method="lora",
            model_name="owner/base",
            load_snippet=f"model = PeftModel.from_pretrained(model, {str(folder)!r})\n",
            estimated=MEMORY,
            peak_memory_bytes=5_000,
            peak_resident_bytes=9_000,
            train_seconds=10.0,
            skipped_rows=6,
        )

    call.folder, call.training = folder, training
    return call


def test_metrics_hold_what_the_design_names(finish, task):
    metrics = finish()
    assert json.loads((finish.folder / "metrics.json").read_text()) == metrics
    counts = task.encoded.counts
    expected = {
        "task": "movie_reviews",
        "rendering": "text",
        "chat_template_kwargs": {},
        "max_length": 200,
        "method": "lora",
        "model": "owner/base",
        "metric": "accuracy",
        "score": 0.75,
        "stderr": 0.05,
        "macro_f1": 0.7,
        "base_score": 0.5,
        "base_stderr": 0.1,
        "eval_rows": 1,
        "eval_rows_left_out": 2,
        "train_rows": 4,
        "train_examples": 4,
        "bad_rows_skipped": 6,
        "train_tokens": 200,  # of both processes
        "supervised_tokens": counts.supervised_tokens,
        "padding_fraction": 0.5,
        "tokens_per_second": 20.0,
        "train_seconds": 10.0,
        "eval_seconds": 4.0,
        "steps": 2,
        "trainable_parameters": 32,
        "total_parameters": count_parameters(tiny_llama(300))[1],
        "peak_memory_bytes": 7_000,  # the largest process
        "peak_resident_bytes": 9_000,
        "estimated_memory_bytes": 6_000,
        "world_size": 2,
        "distributed_type": "MULTI_CPU",
        "seed": 3,
    }
    assert {name: metrics[name] for name in expected} == expected
    assert metrics["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]


def test_everything_stands_beside_the_weights_and_no_pickle(finish, task, capsys):
    finish()
    names = {one.name for one in finish.folder.iterdir()}
    assert {
        *("metrics.json", "predictions.jsonl", "trainer_state.json", "loss.png"),
        *("template.yaml", "tokenizer.json", "README.md"),
    } <= names
    assert not any(one.endswith((".bin", ".pt", ".pkl", ".tmp")) for one in names)
    assert PromptTemplate.load(str(finish.folder / "template.yaml")).name == "movie_reviews"
    record = json.loads((finish.folder / "predictions.jsonl").read_text())
    assert list(record) == ["row", "prompt", "answer", "prediction", "score"]
    assert "accuracy 0.750 ± 0.050 (1 rows)" in capsys.readouterr().out


def test_metrics_come_last_so_that_a_failure_before_leaves_none(finish, monkeypatch):
    def broken(*args, **kwargs):
        raise OSError("disk full")

    for name in ("plot_loss", "write_jsonl", "model_card"):
        with monkeypatch.context() as context:
            context.setattr(results, name, broken)
            with pytest.raises(OSError, match="disk full"):
                finish()
        assert not (finish.folder / "metrics.json").exists()
    finish()
    assert (finish.folder / "metrics.json").exists()


def test_a_run_without_a_step_has_figures_too(finish, monkeypatch):
    monkeypatch.setattr(torch, "cat", lambda rows: torch.zeros(1, 4, dtype=torch.long))
    metrics = finish()
    assert (metrics["padding_fraction"], metrics["tokens_per_second"]) == (0.0, 0.0)


def test_other_processes_write_nothing(finish, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    before = {"trainer_state.json"}  # the trainer's own, who decides for itself
    assert finish()["score"] == 0.75
    assert {one.name for one in finish.folder.iterdir()} == before
    assert capsys.readouterr().out == ""


def test_the_card_shows_the_command_but_no_token(finish, monkeypatch):
    finish.training.hub_token = "hf_secret"
    command = ["recipes/x.py", "--hub_token", "hf_secret", "--dataset", "a b"]
    monkeypatch.setattr("sys.argv", command)
    finish()
    card = (finish.folder / "README.md").read_text()
    assert "hf_secret" not in card
    assert "accelerate launch recipes/x.py --hub_token HUB_TOKEN --dataset 'a b'" in card


def test_the_plan_says_what_is_trained_on_what(task, capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    training = SimpleNamespace(
        model_dtype=(torch.float32, "on a CPU"),
        world_size=2,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=3,
        seed=0,
        data_seed=None,
        train_sampling_strategy="random",
        packing=False,
        learning_rate=5e-4,
        lr_scheduler_type=SimpleNamespace(value="cosine"),
        output_dir="runs/mine",
    )
    model = tiny_llama(300)
    show_plan("owner/base", model, task.encoded, training, {"train": "rows.jsonl"}, MEMORY)
    out = capsys.readouterr().out
    total = count_parameters(model)[1]
    for shown in (
        "owner/base, float32 (on a CPU)",
        f"{total:,} trainable of {total:,} (100.00%)",
        "rows.jsonl",
        "4 from 4 rows; 0 shortened",
        "24 = 4 per device x 3 accumulated x 2 (processes)",
        "0.0005, cosine",
        "runs/mine",
        str(MEMORY),
    ):
        assert shown in out


def test_rows_that_all_do_not_fit_end_in_one_line_before_any_model_is_loaded(task):
    encoder = PromptEncoder(task.template, task.tokenizer, 3)
    with pytest.raises(UserError, match="--max_length 3: no training row fits") as error:
        encode_rows(encoder, [{"sentence": "film", "label": "positive"}])
    assert "\n" not in str(error.value)


# The hub


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


def test_a_model_below_the_published_folder_is_named_as_the_repositorys(finish, api):
    finish()
    folder = finish.training.output_dir
    card = Path(folder) / "README.md"
    card.write_text(f"load({folder + '/base_model'!r})\nload(model, {folder!r})\n")
    finish.training.hub_model_id = "me/mine"
    publish(folder, finish.training)
    said = "load('me/mine', subfolder='base_model')\nload(model, 'me/mine')\n"
    assert card.read_text() == said


def test_a_run_is_published_without_checkpoints_under_the_name_and_token_given(finish, api, capsys):
    finish()
    others = ("samples.jsonl", "pissa_start/a.safetensors", "adapter.safetensors")
    for name in ("checkpoint-20/optimizer.pt", "merged/model.safetensors", *others):
        (finish.folder / name).parent.mkdir(exist_ok=True)
        (finish.folder / name).write_bytes(b"")
    finish.training.hub_model_id = "team/reviews"
    finish.training.hub_token, finish.training.hub_private_repo = "hf_secret", True
    publish(finish.training.output_dir, finish.training)
    token, create, (_, repository, uploaded, card) = api.calls
    assert token == ("token", "hf_secret")
    assert create == ("create", "team/reviews", True, True)
    assert repository == "team/reviews"
    assert not {"predictions.jsonl", "samples.jsonl"} & uploaded  # they hold rows of the user
    assert {"adapter.safetensors", "README.md", "metrics.json", "template.yaml"} <= uploaded
    assert not [one for one in uploaded if one.startswith(("checkpoint", "merged", "pissa"))]
    assert "from_pretrained(model, 'team/reviews')" in card
    assert str(finish.folder) not in card
    assert "pushed to team/reviews" in capsys.readouterr().out


def test_without_a_name_the_folder_gives_it_and_the_hub_the_owner(finish, api):
    finish()
    publish(finish.training.output_dir + "/", finish.training)
    assert api.calls[1] == ("create", "mine", None, True)
    assert api.calls[2][1] == "someone/mine"


def test_other_processes_upload_nothing(finish, api, monkeypatch):
    finish()
    monkeypatch.setenv("RANK", "1")
    publish(finish.training.output_dir, finish.training)
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
def test_a_hub_that_refuses_is_one_line_with_the_cure(finish, api, step, failure):
    finish()
    api.failure[step] = failure
    with pytest.raises(UserError, match=r"^--push_to_hub: ") as error:
        publish(finish.training.output_dir, finish.training)
    line = str(error.value)
    assert "\n" not in line
    for shown in ("hf auth login", f"hf upload mine {finish.folder}", str(failure).strip()[:10]):
        assert shown in line
    assert (finish.folder / "metrics.json").exists()


@pytest.mark.parametrize(
    ("name", "said"), [(None, "refused"), ("two words", "Repo id must use"), ("a/b/c", "Repo id")]
)
def test_the_hubs_own_client_fails_in_one_line_too(finish, name, said, monkeypatch):
    finish()
    monkeypatch.delenv("RANK", raising=False)
    # A closed port of this machine stands for a network that is down.
    offline = partial(huggingface_hub.HfApi, endpoint="http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub, "HfApi", offline)
    finish.training.hub_model_id, finish.training.hub_token = name, "hf_secret"
    with pytest.raises(UserError, match=said) as error:
        publish(finish.training.output_dir, finish.training)
    assert "\n" not in str(error.value)
    assert "hf_secret" not in str(error.value)
