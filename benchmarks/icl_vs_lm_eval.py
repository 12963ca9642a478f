"""How fast few-shot prompts are scored beside lm-evaluation-harness, at equal log-likelihoods.

    python benchmarks/icl_vs_lm_eval.py --data data              # 100 rows, about 15 minutes
    python benchmarks/icl_vs_lm_eval.py --data data --quick      # 40 rows, one round

Both score the same prompts, float32 on the CPU, one after the other, in processes that have loaded
the model and warmed up before: SST-2 with 16 demonstrations and without, TREC with 12
demonstrations, where the six classes have names of several tokens; and GSM8K's questions with three
to five options that differ from row to row, the last sentences of solutions, which ours reads
through a template. lm-eval 0.4.13 runs at its
defaults but for the batch size, 8, in an environment of its own, which the script makes in the
user's cache folder at its first run (`requirements-lm-eval.txt`; another: --lm_eval_python). A
last case writes answers: 20 rows of GSM8K behind 8 worked examples, beside transformers'
`generate` on whole prompts, also at batch size 8.

DATA holds `sst2`, `trec` and `gsm8k` as `prepare_data.py` writes them. Without it the bundled movie
reviews stand for SST-2, generated word problems for GSM8K, and TREC is left out.

The benchmark fails unless log-likelihoods agree within 1e-3, accuracies are equal, and the written
texts are the same in at least all but one row (ties in float32). `floor` is the share of our time
that as many tokens as ours computes take at the speed of a plain forward pass, measured in the same
run. The last line is one JSON object.
"""

import argparse
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import venv
from contextlib import ExitStack, suppress
from pathlib import Path

from measuring import (
    BUNDLED,
    RunFailed,
    data_files,
    parser_of,
    require_least,
    run_script,
    set_numbers,
    sha256_of,
    show_table,
    threads,
)
from word_problems import generate_problems, read_gsm8k

from recipelib.models.bundled import bundled_folder
from recipelib.models.sources import describe_model, resolve_model
from recipelib.prompts import PromptTemplate
from recipelib.runtime import UserError, versions

HERE = Path(__file__).resolve().parent
REQUIREMENTS = HERE / "requirements-lm-eval.txt"
FULL, QUICK = {"rows": 100, "rounds": 1}, {"rows": 40, "rounds": 1}
WRITTEN_ROWS, QUICK_WRITTEN_ROWS = 20, 6
TOLERANCE = 1e-3
LABELS = {
    "ABBR": " an abbreviation or acronym",
    "ENTY": " an entity or thing",
    "DESC": " a description or definition",
    "HUM": " a person or group",
    "LOC": " a place on the map",
    "NUM": " a number or date",
}
GOALS = {"few": 20.0, "classes": 40.0, "zero": 1.0, "options": 1.0, "written": 1.8}
OPTIONS = {
    "name": "options",
    "form": "generative",
    "prompt": "{{ asked }}",
    "options": "sentences",
    "label": "right",
}


class Arm:
    """A process of `few_shot_arm.py`."""

    def __init__(self, python: str, side: str, model: str, batch_size: int, log: Path):
        self.side, self.log = side, log
        environment = os.environ | {"OMP_NUM_THREADS": threads(), "TOKENIZERS_PARALLELISM": "true"}
        script = [str(HERE / "few_shot_arm.py"), side, model, str(batch_size)]
        with log.open("wb") as file:
            try:
                self.process = subprocess.Popen(
                    [python, *script],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=file,
                    text=True,
                    env=environment,
                )
            except OSError as error:
                raise UserError(f"--lm_eval_python {python}: {error.strerror}") from None

    def ask(self, **request) -> dict:
        """What the side answers to a request."""
        with suppress(BrokenPipeError):  # it has ended, which is found out by reading
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        return self.read()

    def read(self) -> dict:
        """What the side says next; at first, once it has loaded the model, what that took.

        Raises:
            RunFailed: it has ended.
        """
        line = self.process.stdout.readline()
        if not line:
            said = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            raise RunFailed(f"{self.side}: ended: {said[-1] if said else 'no output'}")
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.communicate()


def main(argv: list[str] | None = None) -> dict:
    """Run the cases, print the table, and return what the last line holds.

    Raises:
        UserError: arguments or files that will not do.
        RunFailed: a side failed, or the sides do not agree.
    """
    args = parse(argv)
    written = QUICK_WRITTEN_ROWS if args.quick else WRITTEN_ROWS
    cases = make_cases(args.data, args.rows, written, args.cases)
    if not cases:
        raise UserError("--cases classes: needs --data, the folder that holds trec")
    peer = args.lm_eval_python
    if peer is None and cases.keys() != {"written"}:
        peer = lm_eval_python()
    model = resolve_model(args.model_name_or_path)
    with tempfile.TemporaryDirectory(prefix="icl_vs_lm_eval-") as folder:
        result = compare(cases, Path(folder), peer, model, args)
    result |= {
        "rounds": args.rounds,
        "batch_size": args.batch_size,
        "model": describe_model(args.model_name_or_path),
        "omp_num_threads": threads(),
        "versions": versions(),
    }
    print_table(result)
    print(json.dumps(result))
    return result


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line; all numbers are set."""
    parser = parser_of(__doc__, f"{QUICK['rows']} rows")
    parser.add_argument("--data", type=Path, help="folder with sst2, trec and gsm8k")
    parser.add_argument("--rounds", type=int, help="runs of each side [1]")
    parser.add_argument("--rows", type=int, help=f"rows to score [{FULL['rows']}]")
    parser.add_argument("--cases", nargs="+", choices=GOALS, default=list(GOALS))
    parser.add_argument("--batch_size", type=int, default=8, help="of the peers [8]")
    parser.add_argument("--lm_eval_python", help="of an environment that has lm-eval")
    args = parser.parse_args(argv)
    set_numbers(args, FULL, QUICK)
    require_least(args, "batch_size", 1)
    return args


def lm_eval_python() -> str:
    """The interpreter of lm-eval's environment, which is made at the first call."""
    folder = bundled_folder().parent / "venv-lm-eval-0.4.13"
    python = folder / "bin" / "python"
    ready = folder / "ready"
    if not ready.exists():
        print(f"making lm-eval's environment in {folder}", flush=True)
        venv.create(folder, with_pip=True, clear=True)
        command = [str(python), "-m", "pip", "install", "--quiet", "-r", str(REQUIREMENTS)]
        if subprocess.run(command).returncode:
            raise UserError(f"{REQUIREMENTS.name}: cannot be installed; see pip's lines above")
        ready.touch()
    return str(python)


# The cases ---------------------------------------------------------------------------------------


def make_cases(data: Path | None, rows: int, written: int, names: list[str]) -> dict[str, dict]:
    """Prompts as text, and what is compared or written behind them, with the gold answers."""
    cases = {}
    words = {0: " negative", 1: " positive"}
    if data is None:
        words = {word.strip(): word for word in words.values()}
    asked = "The movie review is: {sentence}\nThe sentiment of the review is"
    for name, shots in (("few", 16), ("zero", 0)):
        if name in names:
            title = f"{'SST-2' if data else 'bundled reviews'}, {shots} shots, 2 classes"
            files = data_files("sst2" if data else BUNDLED, data)
            cases[name] = labels_case(title, files, rows, words, asked, shots)
    if "classes" in names and data:
        title = "TREC, 12 shots, 6 classes of several tokens"
        asked = "Question: {question}\nIt asks for:"
        cases["classes"] = labels_case(title, data_files("trec", data), rows, LABELS, asked, 12)
    file = data and data / "gsm8k" / "train.jsonl"

    def problems_of(count: int) -> list[dict]:
        return generate_problems(count) if file is None else read_gsm8k(file, count)

    if "options" in names:
        title = f"{'GSM8K' if data else 'word problems'}, 3 to 5 options per row"
        cases["options"] = options_case(title, problems_of(rows), file)
    if "written" in names:
        problems = problems_of(written + 8)
        shown = "".join(f"{one['prompt']}{one['completion']}\n\n" for one in problems[:8])
        cases["written"] = {
            "title": f"{'GSM8K' if data else 'word problems'}, 8 shots, {written} answers written",
            "prompts": [shown + one["prompt"] for one in problems[8:]],
            "max_new_tokens": 256,
            "stop": ["\n\n"],
            "sha256": data and sha256_of(file),
        }
    return cases


def read_rows(path: Path, words: dict, asked: str) -> list[dict]:
    """The rows of a JSON lines file, each with its question as `asked` and its answer as `words`
    has it.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); see prepare_data.py") from None
    rows = []
    for number, line in enumerate(filter(None, lines), 1):
        try:
            row = json.loads(line)
            rows.append({"label": row["label"], "asked": asked.format(**row)})
            rows[-1]["answer"] = words[row["label"]]
        except (ValueError, LookupError, TypeError) as error:
            raise UserError(
                f"{path}:{number}: not as prepare_data.py writes it ({error!r}); build it anew"
            ) from None
    return rows


def labels_case(
    title: str, files: list[Path], count: int, words: dict, asked: str, shots: int
) -> dict:
    """Prompts for the first rows of the second file, with the same demonstrations out of the first,
    equally many of each class.
    """
    train, test = (read_rows(file, words, asked) for file in files)
    test = test[:count]
    draw = random.Random(0)
    train = sorted(train, key=lambda _: draw.random())
    some = [
        row
        for label in words
        for row in [one for one in train if one["label"] == label][: shots // len(words)]
    ]
    some.sort(key=lambda _: draw.random())
    shown = "".join(f"{row['asked']}{row['answer']}\n\n" for row in some)
    return {
        "title": title,
        "prompts": [shown + row["asked"] for row in test],
        "choices": [list(words.values())] * len(test),
        "golds": [list(words).index(row["label"]) for row in test],
        "sha256": sha256_of(*files),
    }


def options_case(title: str, problems: list[dict], file: Path | None) -> dict:
    """Questions, each with the last sentence of its solution and those of others to choose from."""
    draw = random.Random(0)
    lasts = [problem["completion"].split("\n")[-2].strip() for problem in problems]
    rows = []
    for at, problem in enumerate(problems):
        others = sorted(set(lasts) - {lasts[at]})
        sentences = [lasts[at], *draw.sample(others, min(len(others), draw.randint(2, 4)))]
        draw.shuffle(sentences)
        rows.append({"asked": problem["prompt"], "sentences": sentences, "right": lasts[at]})
    template = PromptTemplate(OPTIONS)
    asked = [question for row in rows for question in template.questions(row)]
    return {
        "title": title,
        "template": OPTIONS,
        "rows": rows,
        "prompts": [template.prompt(question) for question in asked],
        "choices": [[text for (text,) in one.candidates.values()] for one in asked],
        "golds": [list(one.candidates).index(one.label) for one in asked],
        "sha256": file and sha256_of(file),
    }


# The comparison ----------------------------------------------------------------------------------


def compare(cases: dict[str, dict], folder: Path, peer: str | None, model: str, args) -> dict:
    """Both sides of every case, in turn."""
    for name, case in cases.items():
        (folder / f"{name}.json").write_text(json.dumps(case), encoding="utf-8")
        short = {
            key: value[:2] if isinstance(value, list) and key != "stop" else value
            for key, value in case.items()
        }
        if "max_new_tokens" in short:
            short["max_new_tokens"] = 4
        (folder / f"{name}-warm-up.json").write_text(json.dumps(short), encoding="utf-8")
    found = {}
    for name, case in cases.items():
        # Each case has processes of its own, so that a peak belongs to it.
        sides = [(sys.executable, "ours"), (peer, "lm_eval")]
        if name == "written":
            sides[1] = (sys.executable, "generate")
        with ExitStack() as stack:
            arms = []
            for python, side in sides:
                arms.append(Arm(python, side, model, args.batch_size, folder / f"{side}.log"))
                stack.callback(arms[-1].close)
            found[name] = run_case(name, case, folder, arms, args.rounds)
    first = next(iter(found.values()))
    return {"ratio": first["ratio"], "cases": found}


def run_case(name: str, case: dict, folder: Path, arms: list[Arm], rounds: int) -> dict:
    """One case: warm-up, then the sides in turn, then the check that they agree."""
    loaded = [arm.read()["loaded_bytes"] for arm in arms]
    for arm in arms:
        arm.ask(case=str(folder / f"{name}-warm-up.json"))
    speed = arms[0].ask(speed=True)["speed"]
    seconds: list[list[float]] = [[], []]
    answers = [{}, {}]
    for _ in range(rounds):
        for side, arm in enumerate(arms):
            answers[side] = arm.ask(case=str(folder / f"{name}.json"))
            seconds[side].append(answers[side]["seconds"])
            print(f"{case['title']}: {arm.side}: {seconds[side][-1]:.1f} s", flush=True)
    ours, theirs = answers
    result = {
        "title": case["title"],
        "goal": GOALS[name],
        "ratio": sum(seconds[1]) / sum(seconds[0]),
        "peer": arms[1].side,
        "seconds": seconds,
        "peak_bytes": [ours["peak_bytes"], theirs["peak_bytes"]],
        "loaded_bytes": loaded,
        "rows": len(case["prompts"]),
        "sha256": case["sha256"],
        "forward_tokens_per_second": speed,
    }
    if "choices" in case:
        flat = [[value for some in one["results"] for value in some] for one in answers]
        differences = [abs(one - other) for one, other in zip(*flat, strict=True)]
        difference = next(filter(math.isnan, differences), max(differences))
        accuracies = [accuracy(one["results"], case["golds"]) for one in answers]
        result |= {
            "difference": difference,
            "accuracy": accuracies,
            "floor": ours["tokens"] / speed / (sum(seconds[0]) / rounds),
        }
        if not difference <= TOLERANCE or accuracies[0] != accuracies[1]:
            raise RunFailed(
                f"{case['title']}: log-likelihoods differ by {difference:.2g}, accuracies are "
                f"{accuracies[0]:.3f} and {accuracies[1]:.3f}: not the same work"
            )
    else:
        texts = [[cut(text, case["stop"]) for text in one["results"]] for one in answers]
        same = sum(one == other for one, other in zip(*texts, strict=True))
        result["same_texts"] = same
        if same < len(case["prompts"]) - 1:
            raise RunFailed(f"{case['title']}: {same} texts of {len(case['prompts'])} are the same")
    return result


def accuracy(scores: list[list[float]], golds: list[int]) -> float:
    """The share of rows whose best choice is the gold one."""
    right = [
        max(range(len(one)), key=one.__getitem__) == gold
        for one, gold in zip(scores, golds, strict=True)
    ]
    return sum(right) / len(right)


def cut(text: str, stops: list[str]) -> str:
    """A text up to where it was to stop."""
    for stop in stops:
        text = text.partition(stop)[0]
    return text


def print_table(result: dict) -> None:
    """The cases."""
    rows = [
        (
            f"{one['title']}; {one['peer']}",
            *(" ".join(f"{value:.1f}" for value in some) for some in one["seconds"]),
            f"{one['ratio']:.1f}",
            f"{one['goal']:.1f}",
            " / ".join(f"{value / 2**30:.2f}" for value in one["peak_bytes"]),
            f"{one['difference']:.1e}"
            if "difference" in one
            else f"{one['same_texts']} texts same",
            f"{one['floor']:.0%}" if "floor" in one else "-",
        )
        for one in result["cases"].values()
    ]
    show_table(
        f"{result['model']}, float32, {result['omp_num_threads']} threads",
        ("", "ours, s", "peer, s", "ratio", "goal", "peak GiB", "largest diff.", "floor"),
        rows,
        width=110,
    )


if __name__ == "__main__":
    run_script(main)
