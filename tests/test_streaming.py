"""`--streaming true`: rows are read, checked and encoded while training, each process its share."""

import shutil
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import cloze_sft
import cot_sft
import datasets
import icl_eval
import instruction_sft
import lora_sft
import pytest
import search_label_words
from datasets import ClassLabel, Dataset, Features, Value
from recipe_runs import REVIEWS, SUMS, without_slow_parts, write_rows
from run_files import losses, read_json
from tiny_task import plain

from recipelib import cli
from recipelib.data import load_streamed, stream_passes, stream_share
from recipelib.data.formats import template_for
from recipelib.data.streaming import RowStream
from recipelib.encoding import PromptEncoder, encode_rows, encode_stream, training_encoding
from recipelib.models import load_tokenizer
from recipelib.prompts import PromptTemplate
from recipelib.runtime.errors import UserError

ROWS = [{**row, "sentence": f"{row['sentence']} {n}"} for n in range(4) for row in REVIEWS]
TEMPLATE = PromptTemplate.load("movie_reviews")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """`datasets` sleeps for seconds at the end of each pass over several files."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)
    with without_slow_parts():
        yield


def write_parquet(folder: Path, rows: list[dict], files: int = 1, **more: list[dict]) -> Path:
    """A folder of Parquet files: the training rows in so many, and other splits."""
    datasets.disable_progress_bars()
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(files):
        name = f"train-{number:05}-of-{files:05}.parquet"
        Dataset.from_list(rows[number::files]).to_parquet(folder / name)
    for split, others in more.items():
        Dataset.from_list(others).to_parquet(folder / f"{split}.parquet")
    return folder


def options(model: Path, folder: Path, **more) -> dict:
    """Of a short run that streams."""
    return {
        "model_name_or_path": str(model),
        "streaming": True,
        "max_steps": 4,
        "use_cpu": True,
        "disable_tqdm": True,
        "max_new_tokens": 4,
        "output_dir": str(folder),
        **more,
    }


def run(recipe, model: Path, folder: Path, **more) -> dict:
    given = options(model, folder, **more)
    given = {name: value for name, value in given.items() if value is not None}
    return recipe.main(*cli.arguments(recipe, **given))


def stream_of(folder: Path) -> RowStream:
    args = SimpleNamespace(
        dataset=str(folder),
        train_split="train",
        eval_split="validation",
        max_eval_samples=None,
        skip_bad_rows=False,
    )
    training = SimpleNamespace(
        max_steps=3,
        dataloader_num_workers=0,
        world_size=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=1,
    )
    return load_streamed(TEMPLATE, args, training)[0]


# Shares


@pytest.mark.parametrize(("files", "world"), [(1, 1), (1, 2), (4, 2), (3, 2), (2, 4), (1, 5)])
def test_each_row_is_one_process_and_every_pass_has_them_all(tmp_path, files, world):
    stream = stream_of(write_parquet(tmp_path, ROWS, files, validation=ROWS[:2]))
    seen = []
    for rank in range(world):
        share = stream_share(stream.data, 1, rank, world)
        own = [row["sentence"] for row in share]
        again = [row["sentence"] for row in islice(stream_passes(share), 2 * len(own))]
        first, second = again[: len(own)], again[len(own) :]
        assert first == own != second
        if files % world == 0:  # its files; otherwise every so many rows of the pass
            assert sorted(second) == sorted(own)
        seen += [(0, text) for text in first] + [(1, text) for text in second]
    for number in range(2 if len(ROWS) % world == 0 else 1):
        found = Counter(text for place, text in seen if place == number)
        assert found == Counter(row["sentence"] for row in ROWS)


def test_the_order_is_the_seeds(tmp_path):
    stream = stream_of(write_parquet(tmp_path, ROWS, 2, validation=ROWS[:2]))

    def order(seed: int) -> list[str]:
        return [row["sentence"] for row in islice(stream_share(stream.data, seed, 0, 1), len(ROWS))]

    assert order(1) == order(1) != order(2)
    assert order(1) != [row["sentence"] for row in ROWS]


def test_what_is_streamed_is_what_would_have_been_prepared(tmp_path, causal_model):
    stream = stream_of(write_parquet(tmp_path, ROWS, validation=ROWS[:2]))
    encoder = PromptEncoder(TEMPLATE, load_tokenizer(str(causal_model)), 200)
    training = SimpleNamespace(seed=3, data_seed=None, process_index=0, world_size=1)
    streamed = encode_stream(stream, [training_encoding(encoder, 3)], training)
    found = [
        {"input_ids": one["input_ids"], "labels": one["labels"]}
        for one in islice(streamed.stream, len(ROWS))
    ]
    prepared = encode_rows(encoder, ROWS, seed=3)
    wanted = plain(prepared.examples)
    assert sorted(map(str, found)) == sorted(map(str, wanted))
    assert plain(streamed.examples) == wanted  # by which the plan is made
    assert streamed.longest_target == prepared.longest_target
    assert streamed.counts.examples == streamed.counts.rows == len(ROWS)
    again = [*islice(streamed.stream, 2 * len(ROWS))]  # a second pass has them in another order
    first, second = again[: len(ROWS)], again[len(ROWS) :]
    assert first != second
    assert sorted(map(str, first)) == sorted(map(str, second))
    assert first == [*islice(streamed.stream, len(ROWS))]  # as every reading begins
    assert streamed.counts.rows == len(ROWS)
    training.data_seed = 4
    other = encode_stream(stream, [training_encoding(encoder, 3)], training).stream
    assert [*islice(other, len(ROWS))] != again[: len(ROWS)]


# Runs


def test_bad_rows_are_left_out_counted_and_shown_at_the_end(tmp_path, causal_model, capsys):
    rows = [*ROWS, {**ROWS[0], "label": "odd"}, {**ROWS[1], "label": None}]
    folder = write_parquet(tmp_path / "data", rows, 3, validation=ROWS[:4])
    more = {"per_device_train_batch_size": 20, "gradient_accumulation_steps": 1, "max_steps": 5}
    metrics = run(lora_sft, causal_model, tmp_path / "out", dataset=str(folder), **more)
    # In five steps of twenty all of the rows, and some a second time, which do not count again.
    assert metrics["train_rows"] == metrics["train_examples"] == len(ROWS) < 100
    assert metrics["bad_rows_skipped"] == 2
    said = capsys.readouterr().out
    assert f"rows were read; {metrics['bad_rows_skipped']} bad ones were left out" in said
    assert "label: 'odd' is not in the verbalizer" in said
    assert "label is null" in said
    assert "needs the length of every row, which a stream does not tell" in said


def test_a_run_that_goes_on_reads_what_an_uninterrupted_one_does(tmp_path, causal_model):
    folder = write_parquet(tmp_path / "data", ROWS, 2, validation=ROWS[:4])
    kept = {"dataset": str(folder), "save_strategy": "steps", "save_steps": 3, "max_steps": 6}
    run(lora_sft, causal_model, tmp_path / "whole", **kept)
    run(lora_sft, causal_model, tmp_path / "parts", **kept)
    for name in ("metrics.json", "trainer_state.json"):  # as if it had been killed after step 3
        (tmp_path / "parts" / name).unlink()
    shutil.rmtree(tmp_path / "parts/checkpoint-6")
    run(lora_sft, causal_model, tmp_path / "parts", resume_from_checkpoint="last", **kept)
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), abs=1e-6)
    assert len(losses(tmp_path / "whole")) == 6


def test_every_kind_of_training_streams(tmp_path, causal_model):
    reviews = write_parquet(tmp_path / "reviews", ROWS, validation=ROWS[:4])
    sums = write_parquet(tmp_path / "sums", SUMS * 4, test=SUMS[:3])
    more = {"dataset": str(reviews), "max_steps": 2, "max_eval_samples": 2}
    metrics = run(cloze_sft, causal_model, tmp_path / "cloze", **more)
    assert (metrics["steps"], metrics["train_rows"] > 0) == (2, True)
    more["packing"] = True
    metrics = run(instruction_sft, causal_model, tmp_path / "instructions",
                  template=["movie_reviews"], **more)  # fmt: skip
    assert metrics["steps"] == 2
    assert metrics["mixture"] == {}  # of one task, however many rows are read
    metrics = run(cot_sft, causal_model, tmp_path / "cot", template="gsm8k", target="mixed",
                  **{**more, "dataset": str(sums)})  # fmt: skip
    # Each row is trained with its reasoning before the answer and with the bare answer.
    assert metrics["train_examples"] == 2 * metrics["train_rows"]


def test_the_hubs_rows_are_streamed_with_their_classes_names(tmp_path, causal_model, monkeypatch):
    names = ["negative", "positive"]
    features = Features(sentence=Value("string"), label=ClassLabel(names=names))
    rows = Dataset.from_list(
        [{**row, "label": names.index(row["label"])} for row in ROWS], features=features
    )
    asked = []

    def load_dataset(path, name=None, *, split, revision=None, streaming=False):
        asked.append((path, split, streaming))
        return rows.to_iterable_dataset(2) if streaming else rows.select(range(4))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    metrics = run(lora_sft, causal_model, tmp_path / "out", dataset="owner/name",
                  eval_split="validation", max_steps=2)  # fmt: skip
    assert metrics["bad_rows_skipped"] == 0
    assert asked == [("owner/name", "train", True), ("owner/name", "validation", False)]


def test_for_a_stream_the_template_is_guessed_from_the_hubs_first_row_alone(monkeypatch):
    asked = []

    def load_dataset(path, name=None, *, split, revision=None, streaming=False):
        asked.append(streaming)
        rows = Dataset.from_list([{"prompt": "a", "completion": "b"}])
        return rows.to_iterable_dataset() if streaming else rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert template_for("owner/name", streaming=True)[0].name == "name"
    assert template_for("owner/name")[0].name == "name"  # from what lies in the cache, offline too
    assert asked == [True, False]


def fails() -> Iterator[dict]:
    """Rows of which none arrives."""
    raise ConnectionError("Couldn't reach the host")
    yield


@pytest.mark.parametrize(
    ("rows", "line"),
    [
        (fails, "owner/name@main, split train: the hub cannot be reached; pass --dataset"),
        (lambda: iter([]), "owner/name@main, split train: holds no rows; choose another split"),
    ],
)
def test_a_stream_that_does_not_begin_is_one_line(tmp_path, causal_model, monkeypatch, rows, line):
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda path, name=None, *, split, revision=None, streaming=False: (
            datasets.IterableDataset.from_generator(rows)
        ),
    )
    with pytest.raises(UserError, match=line):
        run(lora_sft, causal_model, tmp_path, dataset="owner/name", eval_split="validation")


def test_pictures_beside_the_text_are_not_opened(tmp_path):
    rows = [{**row, "picture": {"bytes": b"no picture", "path": None}} for row in ROWS]
    folder = write_parquet(tmp_path, ROWS[:2], validation=ROWS[:2])
    features = Features(sentence=Value("string"), label=Value("string"), picture=datasets.Image())
    for path in folder.glob("train*"):
        Dataset.from_list(rows, features=features).to_parquet(path)
    stream = stream_of(folder)
    assert len(stream.rows) == len(ROWS)
    assert len(list(islice(stream_share(stream.data, 1, 0, 1), len(ROWS)))) == len(ROWS)


# Refusals


@pytest.mark.parametrize(
    ("recipe", "changes", "line"),
    [
        (lora_sft, {"max_steps": -1}, "--streaming true: a stream has no end .* pass --max_steps"),
        (lora_sft, {"eval_split": "train"}, "a tenth of a stream cannot be held out; .*eval_split"),
        (lora_sft, {"dataloader_num_workers": 1}, "--dataloader_num_workers: a stream is read"),
        (lora_sft, {"columns": ["text=review"]}, "split train: no column 'review'; the columns"),
        (lora_sft, {"dataset": "<lines>"}, "train.jsonl: --streaming true reads the hub and Parq"),
        (lora_sft, {"dataset": "<bad>"}, "no good row among the first 30; the first: label: 'odd'"),
        (lora_sft, {"max_length": 2}, "--max_length 2: no training row fits; raise it"),
        (cloze_sft, {"per_class": 1}, "--per_class: draws rows of each class from all; leave out"),
        (
            instruction_sft,
            {"template": ["movie_reviews=<rows>", "sst2=<rows>"], "dataset": None},
            "--streaming true: reads one task; leave it out for several",
        ),
        (icl_eval, {"max_steps": None}, "--streaming: nothing is trained; leave it out"),
        (search_label_words, {"max_steps": None}, "--streaming: nothing is trained; leave it out"),
    ],
)
def test_what_a_stream_cannot_do_is_one_line(tmp_path, causal_model, recipe, changes, line):
    folders = {
        "<rows>": write_parquet(tmp_path / "rows", ROWS, validation=ROWS[:2]),
        "<bad>": write_parquet(
            tmp_path / "bad", [{**ROWS[0], "label": "odd"}] * 30, validation=ROWS[:2]
        ),
        "<lines>": write_rows(tmp_path / "lines", train=ROWS, validation=ROWS[:2]),
    }

    def filled(value):
        if isinstance(value, list):
            return list(map(filled, value))
        for mark, folder in folders.items():
            value = value.replace(mark, str(folder)) if isinstance(value, str) else value
        return value

    given = {"dataset": "<rows>", **changes}
    given = {name: filled(value) for name, value in given.items()}
    if recipe is search_label_words:
        given["max_new_tokens"] = 256  # as it is
    with pytest.raises(UserError, match=line) as error:
        run(recipe, causal_model, tmp_path / "out", **given)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_metrics_of_a_stream_hold_what_was_read(tmp_path, causal_model):
    folder = write_parquet(tmp_path / "data", ROWS, validation=ROWS[:4])
    run(lora_sft, causal_model, tmp_path / "out", dataset=str(folder), max_steps=2)
    metrics = read_json(tmp_path / "out/metrics.json")
    assert metrics["train_tokens"] > 0
    assert metrics["supervised_tokens"] > metrics["train_examples"]
