"""What a run prepares is found again by all that it depends on, and by nothing else; a run that is
killed while it prepares leaves nothing that the next one takes for whole.
"""

import copy
import os
import shutil
import signal
import tracemalloc
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import instruction_sft
import lora_sft
import prompt_tuning
import pytest
from recipe_runs import REVIEWS, write_rows
from tiny_llama import tiny_llama
from tiny_task import plain
from tokenizers_for_tests import tokenizer_for
from transformers import AutoTokenizer

from recipelib import cli
from recipelib.data import mixture_counts
from recipelib.encoding import prompt_encoder
from recipelib.runtime import cut, prepared
from recipelib.task import load_cloze_task, load_task, load_tasks, mix
from recipelib.task import task as one_task

FORK = get_context("fork")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class Place:
    """A run's rows, template, tokenizer and cache, to change and to prepare again."""

    def __init__(self, folder: Path, monkeypatch):
        self.folder, self.cache, self._patch = folder, folder / "cache", monkeypatch
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", self.cache)
        self.rows = write_rows(folder / "rows", train=REVIEWS, validation=REVIEWS[:4])
        bundled = Path(lora_sft.__file__).parents[1] / "data_templates/movie_reviews.yaml"
        self.template = folder / "task.yaml"
        self.template.write_text(bundled.read_text())
        self.take("llama2")
        self.options = {
            "template": str(self.template),
            "dataset": str(self.rows),
            "output_dir": str(folder / "run"),
            "max_length": 200,
            "rendering": "chat",
            "use_cpu": True,
            "dataset_num_proc": 1,
        }
        monkeypatch.setattr(one_task, "load_tokenizer", lambda *args, **options: self.tokenizer)

    def take(self, name: str, chat_template: str = CHAT_TEMPLATE) -> None:
        """Use this tokenizer from now on."""
        self.tokenizer = copy.deepcopy(tokenizer_for(name))
        self.tokenizer.chat_template = chat_template

    def load(self, **options):
        """The task that lora_sft would train."""
        return load_task(*cli.arguments(lora_sft, **{**self.options, **options}))

    def made(self, **options) -> set[str]:
        """The kinds of what has to be made for a run with these options."""
        before = self.folders()
        self.load(**options)
        return {name.partition("-")[0] for name in self.folders() - before}

    def folders(self) -> set[str]:
        return {path.name for path in self.cache.glob("recipes/*") if path.is_dir()}


@pytest.fixture
def place(tmp_path, monkeypatch):
    place = Place(tmp_path, monkeypatch)
    assert place.made() == {"rows", "examples"}
    assert len(place.folders()) == 3  # the rows of two splits, and the examples
    return place


# The key


def test_the_same_run_finds_everything_and_is_given_the_same(place):
    first, again = place.load(), place.load()
    assert place.made() == set()
    assert plain(first.encoded.examples) == plain(again.encoded.examples)
    assert first.encoded.counts == again.encoded.counts
    assert first.encoded.longest_target == again.encoded.longest_target
    assert first.train == again.train


@pytest.mark.parametrize(
    ("options", "kinds"),
    [
        ({"max_length": 201}, {"examples"}),
        ({"rendering": "text"}, {"examples"}),
        ({"chat_template_kwargs": {"deep": True}}, {"examples"}),
        ({"seed": 7}, {"examples"}),
        ({"max_train_samples": 5}, {"examples"}),
        ({"columns": ["text=sentence"]}, set()),  # as it is
        ({"columns": ["extra=sentence"]}, {"rows", "examples"}),
        ({"train_split": "validation", "eval_split": "train"}, {"examples"}),
        ({"train_split": "train", "eval_split": "train"}, {"examples"}),  # some are held out
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else " ".join(sorted(value)),
)
def test_options_that_change_rows_or_examples_make_them_anew(place, options, kinds):
    assert place.made(**options) == kinds
    assert place.made(**options) == set()
    assert place.made() == set()


@pytest.mark.parametrize(
    "options",
    [
        {"learning_rate": 1e-5},
        {"num_train_epochs": 7},
        {"output_dir": "elsewhere"},
        {"per_device_train_batch_size": 3, "packing": True},
        {"max_eval_samples": 2},
        {"max_new_tokens": 9, "eval_batch_tokens": 100},
        {"r": 3},
        {"dataset_num_proc": 2},
        {"skip_bad_rows": True},
    ],
    ids=str,
)
def test_options_that_change_neither_find_both(place, options):
    assert place.made(**options) == set()


def test_another_letter_in_a_row_makes_rows_and_examples_anew(place):
    file = place.rows / "train.jsonl"
    file.write_text(file.read_text().replace("film, number 3", "film, number 4", 1))
    assert place.made() == {"rows", "examples"}


def test_the_same_rows_elsewhere_and_at_another_time_are_found(place):
    elsewhere = shutil.copytree(place.rows, place.folder / "elsewhere")
    os.utime(elsewhere / "train.jsonl", (1, 1))
    assert place.made(dataset=str(elsewhere)) == set()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("The movie review is", "The film review is"),
        ("positive: [positive, good]", "positive: [good, positive]"),
        ("shorten: [text]", "shorten: {text: left}"),
    ],
)
def test_another_template_makes_rows_and_examples_anew(place, old, new):
    text = place.template.read_text()
    assert old in text
    place.template.write_text(text.replace(old, new))
    assert place.made() == {"rows", "examples"}


def test_a_comment_in_a_template_changes_nothing(place):
    place.template.write_text(f"# Seen.\n{place.template.read_text()}")
    assert place.made() == set()


def test_another_chat_template_or_tokenizer_makes_the_examples_anew(place):
    place.tokenizer.chat_template = CHAT_TEMPLATE.replace("assistant\n", "assistant:\n")
    assert place.made() == {"examples"}
    place.take("gpt2")
    assert place.made() == {"examples"}
    place.tokenizer.add_special_tokens({"additional_special_tokens": ["film"]})
    assert place.made() == {"examples"}


def test_a_saved_and_loaded_tokenizer_finds_the_examples(place):
    place.tokenizer.save_pretrained(place.folder / "tokenizer")
    place.tokenizer = AutoTokenizer.from_pretrained(place.folder / "tokenizer")
    assert place.made() == set()


def test_a_chat_template_that_writes_the_day_makes_them_anew_each_day(place, monkeypatch):
    place.tokenizer.chat_template = "{{ strftime_now('%d') }}" + CHAT_TEMPLATE
    assert place.made() == {"examples"}
    assert place.made() == set()

    class Tomorrow:
        today = staticmethod(lambda: Tomorrow)
        isoformat = staticmethod(lambda: "2222-02-02")

    monkeypatch.setattr("recipelib.encoding.tokens.date", Tomorrow)
    assert place.made() == {"examples"}


def test_other_code_makes_them_anew(place, monkeypatch):
    known = prepared.code_digest
    monkeypatch.setattr(prompt_encoder, "code_digest", lambda *rooms: known(*rooms) + "changed")
    assert place.made() == {"examples"}
    monkeypatch.setattr(
        "recipelib.data.checking.code_digest", lambda *rooms: known(*rooms) + "changed"
    )
    assert place.made() == {"rows", "examples"}


def test_another_library_makes_them_anew(place, monkeypatch):
    monkeypatch.setattr(prepared, "version", lambda name: "0.0" if name == "tokenizers" else "1")
    first = prepared.code_digest("encoding")
    monkeypatch.setattr(prepared, "version", lambda name: "1")
    assert prepared.code_digest("encoding") != first


def test_another_share_of_a_mixture_makes_that_tasks_examples_anew(place):
    other = place.folder / "other.yaml"
    text = place.template.read_text().replace("movie_reviews", "other").replace("Is a", "Is any")
    other.write_text(text)
    named = [f"{place.template}={place.rows}", f"{other}={place.rows}"]

    def made(mixing: str, rows: int) -> int:
        before = place.folders()
        options = {"template": named, "dataset": None, "mixing": mixing, "max_train_samples": rows}
        args, training = cli.arguments(instruction_sft, **{**place.options, **options})
        tasks = load_tasks(args, training, named)
        sizes = [task.train.available for task in tasks]
        mix(tasks, mixture_counts(sizes, mixing, rows), args, training)
        return sum(name.startswith("examples") for name in place.folders() - before)

    assert made("size", 20) == 2
    assert made("size", 20) == 0
    assert made("equal", 20) == 0  # both have as many rows
    assert made("size", 21) == 1


def test_a_cloze_is_kept_too(place, tmp_path):
    model = tmp_path / "model"
    tiny_llama(len(place.tokenizer)).save_pretrained(model)
    options = {name: value for name, value in place.options.items() if name != "rendering"}
    options |= {"model_name_or_path": str(model), "cloze": True}

    def made(**more) -> int:
        before = place.folders()
        args, training = cli.arguments(prompt_tuning, **options, **more)
        task = load_cloze_task(args, training)
        for drawn, _ in task.draws(args, training):
            assert len(drawn.encoded.examples) == (2 if more.get("per_class") else len(REVIEWS))
        return sum(name.startswith("examples") for name in place.folders() - before)

    assert [made(), made()] == [1, 0]
    assert [made(soft_verbalizer=True), made(soft_verbalizer=True)] == [1, 0]
    assert [made(per_class=1), made(per_class=1, learning_rate=1e-3)] == [1, 0]


# Kills


def prepared_by(place: Place, store: Path) -> tuple[list[dict], dict]:
    """What a run is given that prepares into this store."""
    place._patch.setattr("datasets.config.HF_DATASETS_CACHE", store)
    task = place.load(dataset_num_proc=2)
    return plain(task.encoded.examples), vars(task.encoded.counts)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("recipes/*") if path.suffix != ".lock")


@pytest.mark.parametrize("moment", [0, 5, 11, 18])
def test_a_run_after_one_that_was_killed_while_preparing_is_given_the_same(
    place, monkeypatch, moment
):
    rows = [{**row, "sentence": f"{row['sentence']} {n}"} for n in range(40) for row in REVIEWS]
    write_rows(place.rows, train=rows)
    monkeypatch.setattr(prepared, "_BATCH", 4_000)  # many small writes

    def killed() -> None:
        # Killed at its nth step: a batch that is written, a file that is closed, a folder renamed.
        steps = FORK.Value("i", 0)

        def counted(step):
            def call(*args, **options):
                with steps.get_lock():
                    steps.value += 1
                    if steps.value > moment:
                        os.kill(parent, signal.SIGKILL)
                        os.kill(os.getpid(), signal.SIGKILL)
                return step(*args, **options)

            return call

        parent = os.getpid()
        ArrowFile = prepared.ArrowFile
        ArrowFile._write = counted(ArrowFile._write)
        ArrowFile.__exit__ = counted(ArrowFile.__exit__)
        prepared.os.replace = counted(os.replace)
        prepared_by(place, place.folder / "killed")

    process = FORK.Process(target=killed)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    found = prepared_by(place, place.folder / "killed")
    wanted = prepared_by(place, place.folder / "whole")
    assert found == wanted
    assert names(place.folder / "killed") == names(place.folder / "whole")


# Memory


def test_memory_does_not_grow_with_the_rows(place, monkeypatch):
    monkeypatch.setattr(prepared, "_BATCH", 1_000)
    monkeypatch.setattr("recipelib.encoding.examples.cut", partial(cut, least=1, most=200))

    def peak(count: int) -> int:
        rows = [{"sentence": f"fine {n} " * 9, "label": "positive"} for n in range(count)]
        write_rows(place.rows, train=rows)
        del rows
        tracemalloc.start()
        place.load(max_eval_samples=1)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    peak(100)  # what is loaded once
    few, many = peak(200), peak(800)
    # Of each row its place, its key and its label are held.
    assert many < 1.1 * few + 600 * 60, (few, many)
