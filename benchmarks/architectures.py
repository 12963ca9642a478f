"""Every recipe on a tiny model of every architecture that transformers' `AutoModelForCausalLM` and
`AutoModelForMaskedLM` know: what works, what is refused with which line, and what fails.

    python benchmarks/architectures.py --quick                      # three types: a minute
    python benchmarks/architectures.py --keep runs/architectures --write table.md   # half an hour
    python benchmarks/architectures.py --types llama mamba --recipes lora_sft prefix

Each model has random weights, one layer of each kind, and a width of 32; each recipe trains for two
steps in float32, or scores four rows, in a process that is forked for it: one that hangs or dies is
a result. Results are kept, so that a sweep that was broken off goes on; --keep also holds the
models and the tracebacks.

A type stands for the checkpoints that the hub has of it: with towers where there are such, encoder
and decoder together, masked before causal; "(decoder)" is the causal one of a type that is both.
The last line is one JSON object that counts the results; the exit code is 1 where a recipe fails.
"""

import argparse
import gc
import importlib
import json
import os
import re
import signal
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from measuring import RunFailed, make_folder, run_script, show_table
from tiny_architectures import DECODER, build, forward, types

from recipelib.runtime import UserError, first_line, versions, write_json, write_jsonl

# Name -> the recipe, and its options besides COMMON.
RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "lora_sft": ("lora_sft", {}),
    "adapter_sft": ("adapter_sft", {}),
    "instruction_sft": ("instruction_sft", {}),
    "soft_prompt": ("prompt_tuning", {"virtual_tokens": 4}),
    "prefix": ("prompt_tuning", {"virtual_tokens": 4, "tune": "prefix"}),
    "cloze_sft": ("cloze_sft", {}),
    "icl_eval": ("icl_eval", {"shots": 1}),
    "freeze": ("transfer_learning", {}),
    "features": ("transfer_learning", {"mode": "features"}),
    "gpipe_sft": ("gpipe_sft", {"micro_batches": 2}),
}
TRAINING = {
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "save_strategy": "no",
}
CAUSAL = ["lora_sft", "adapter_sft", "instruction_sft", "gpipe_sft"]  # each token from those before
QUICK = ["llama", "mamba", "bert"]
BUILD, PLAIN = "built", "plain"  # what is done before the recipes
NOT_BUILT = "not built"
SECONDS = 180  # most that a recipe may take
SHOWN = 300  # most characters of a line
Results = Mapping[str, Mapping[str, str]]  # by type, and by recipe: works, or what came instead


def main(argv: list[str] | None = None) -> dict:
    """Run all recipes on all types, and print and write the table.

    Returns:
        What the last line holds.
    Raises:
        RunFailed: a recipe fails.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help=f"only {', '.join(QUICK)}")
    parser.add_argument("--types", nargs="+", help="model types, such as llama [all]")
    parser.add_argument("--recipes", nargs="+", choices=[*RECIPES], help="[all]")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="folder for results and models")
    parser.add_argument("--write", type=Path, metavar="FILE", help="the table as Markdown")
    parser.add_argument("--again", action="store_true", help="also what --keep has results of")
    args = parser.parse_args(argv)
    known = types()
    names = args.types or (QUICK if args.quick else known)
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"--types {unknown[0]}: transformers has no such causal or masked model")
    with tempfile.TemporaryDirectory(prefix="architectures-") as folder:
        keep = args.keep or Path(folder)
        make_folder("--keep", keep)
        results = sweep(names, args.recipes or [*RECIPES], keep, args.again)
    if args.write:
        args.write.write_text(markdown(results), encoding="utf-8")
    show(results)
    counts = Counter(kind_of(result) for _, _, result in cells(results))
    last = {"types": len(results), **counts, "versions": versions()}
    print(json.dumps(last))
    if counts["fails"]:
        raise RunFailed(f"{counts['fails']} runs fail")
    return last


def sweep(names: Sequence[str], recipes: Sequence[str], keep: Path, again: bool) -> dict:
    """The results of all types by their names, and of each by recipe; they are kept at once."""
    file = keep / "results.json"
    results = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    rows = make_rows(keep / "rows")
    import_libraries()
    for number, name in enumerate(names, 1):
        folder = keep / "models" / slug(name)
        found = results.setdefault(name, {})
        steps = [one for one in recipes if again or one not in found]
        if not steps:
            continue
        if again or PLAIN not in found or not (folder / "config.json").exists():
            steps = [BUILD, PLAIN, *steps]

        def run(step: str, folder=folder, name=name) -> str:
            with tempfile.TemporaryDirectory(prefix="run-") as output:
                return run_step(step, name, folder, rows, Path(output))

        for step, result, trace in forked(run, steps, keep / "log.txt"):
            found[step] = result.replace(str(folder), "MODEL").replace(str(rows), "ROWS")
            if step in CAUSAL and (result, "ahead" in found[PLAIN]) == ("works", True):
                found[step] = "fails: trains a model that sees each answer while it predicts it"
            note = keep / "tracebacks" / f"{slug(name)}-{step}.txt"
            note.unlink(missing_ok=True)
            if trace:
                note.parent.mkdir(exist_ok=True)
                note.write_text(trace, encoding="utf-8")
            print(f"{number}/{len(names)} {name}, {step}: {found[step][:SHOWN]}", flush=True)
            write_json(file, results)
    return {name: results[name] for name in names}


def run_step(step: str, name: str, folder: Path, rows: Path, output: Path) -> str:
    """What comes out of building a model, calling it, or running a recipe on it.

    Raises:
        Exception: it fails.
    """
    if step == BUILD:
        return build(name, folder)
    if step == PLAIN:
        return forward(folder)
    from recipelib.cli import arguments

    recipe, options = RECIPES[step]
    module = importlib.import_module(recipe)
    common = {"model_name_or_path": folder, "output_dir": output / "run", "disable_tqdm": True}
    common |= {"max_length": 256, "dataset_cache": False, "use_cpu": True, "dataset": rows}
    if recipe == "instruction_sft":
        common["template"] = [f"movie_reviews={common.pop('dataset')}"]
    if recipe == "transfer_learning":
        common["cache_dir"] = output / "cache"
    if step not in ("icl_eval", "features"):
        common |= TRAINING
    given = {
        key: str(value) if isinstance(value, Path) else value
        for key, value in (common | options).items()
    }
    try:
        module.main(*arguments(module, **given))
    except UserError as error:
        return f"refused: {error}"
    return "works"


def make_rows(folder: Path) -> Path:
    """A folder with a few rows for movie_reviews, the template that recipes have by default."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", 8), ("validation", 4)):
        reviews = [
            {"sentence": f"{word} film number {number}, {split}", "label": label}
            for number in range(count // 2)
            for word, label in (("a fine", "positive"), ("such a dull", "negative"))
        ]
        write_jsonl(folder / f"{split}.jsonl", reviews)
    return folder.resolve()


def import_libraries() -> None:
    """Import what all recipes import, once for all processes that are forked."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import matplotlib

    matplotlib.use("Agg")
    for name in ("matplotlib.pyplot", "sklearn.linear_model", "peft", "trl", "datasets"):
        importlib.import_module(name)
    for room in ("adapters", "models", "pipeline", "probes", "reporting", "task", "training"):
        importlib.import_module(f"recipelib.{room}")
    # What takes longest in a tiny run: no architecture changes how a figure is drawn, and what the
    # processes share is not gone through in each.
    matplotlib.figure.Figure.savefig = lambda self, file, **_: Path(file).touch()
    gc.collect()
    gc.freeze()


# Processes ---------------------------------------------------------------------------------------


def forked(
    run: Callable[[str], str], steps: Sequence[str], log: Path, seconds: float = SECONDS
) -> Iterator[tuple[str, str, str]]:
    """Do steps in turn in a forked process, and in a new one where it hangs or dies. Where the
    model cannot be built nothing else is done.

    Args:
        run: from a step to what comes out.
        log: for what is printed meanwhile.
        seconds: most that a step may take.
    Yields:
        A step, what came out, and the traceback of one that fails.
    """
    left = [*steps]
    while left:
        reading, writing = Pipe(duplex=False)
        process = os.fork()
        if not process:
            try:
                work(run, left, writing, log)
            finally:
                os._exit(1)
        writing.close()
        end = None
        try:
            while left and end is None:
                try:
                    if reading.poll(seconds):
                        result, trace = reading.recv()
                        yield left.pop(0), result, trace
                        if kind_of(result) == NOT_BUILT:
                            left = []
                    else:
                        end = f"no end within {seconds} s"
                except EOFError:
                    end = "the process died"
        finally:
            os.kill(process, signal.SIGKILL)
            code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        if left:
            how = f" with exit code {code}" if end == "the process died" else ""
            yield left.pop(0), f"fails: {end}{how}", ""


def work(run: Callable[[str], str], steps: Sequence[str], writing: Connection, log: Path) -> None:
    """Do steps in this process, and send what came out of each."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with log.open("ab") as file, open(os.devnull) as nothing:
        for stream, target in enumerate((nothing, file, file)):
            os.dup2(target.fileno(), stream)
    for step in steps:
        trace = ""
        try:
            result = run(step)
        except BaseException as error:
            verb = NOT_BUILT if step == BUILD else "fails"
            result = f"{verb}: {type(error).__name__}: {first_line(str(error))}"
            trace = traceback.format_exc()
        writing.send((result, trace))


# The table ---------------------------------------------------------------------------------------


def slug(name: str) -> str:
    """A type's name as a file has it."""
    return name.replace(" (", "-").removesuffix(")")


def cells(results: Results) -> Iterator[tuple[str, str, str]]:
    """Type, recipe and result of all that was run."""
    for name, found in results.items():
        for recipe in RECIPES:
            if recipe in found:
                yield name, recipe, found[recipe]


def kind_of(result: str) -> str:
    """works, refused or fails."""
    return result.partition(":")[0]


def general(name: str, found: Mapping[str, str], result: str) -> str:
    """A result without what is the model's own, so that those that say the same are one."""
    kind, name = found[BUILD].partition(",")[0], name.removesuffix(DECODER)
    for word, instead in ((kind, "CLASS"), (rf"{re.escape(name)}\w*", "TYPE"), (r"\d+", "N")):
        result = re.sub(rf"(?<![\w-]){word}(?![\w-])", instead, result)
    return result


def show(results: Results) -> None:
    """Print how many architectures each recipe works on, and refuses, and fails on."""
    kinds = ("works", "refused", "fails")
    counts = Counter((recipe, kind_of(result)) for _, recipe, result in cells(results))
    rows = [(one, *(str(counts[one, kind]) for kind in kinds)) for one in RECIPES]
    show_table(f"{len(results)} architectures", ("recipe", *kinds), rows)


def markdown(results: Results) -> str:
    """The table of all architectures, and the lines that its numbers stand for."""
    built = {name: of for name, of in results.items() if kind_of(of[BUILD]) != NOT_BUILT}
    lines = Counter(
        general(name, built[name], result) for name, _, result in cells(built) if result != "works"
    )
    order = sorted(lines, key=lambda line: (kind_of(line), -lines[line], line))
    numbers = {line: number for number, line in enumerate(order, 1)}
    counts = Counter(kind_of(result) for _, _, result in cells(built))

    def cell(name: str, recipe: str) -> str:
        result = built[name].get(recipe, "")
        if result in ("", "works"):
            return result
        return f"{kind_of(result)} {numbers[general(name, built[name], result)]}"

    text = [
        "# Recipe by architecture",
        "",
        "Written by [`architectures.py`](architectures.py), which says what was run, with "
        f"transformers {versions()['transformers']}. {len(built)} architectures: "
        + ", ".join(f"{kind} {count:,} times" for kind, count in counts.most_common())
        + ". Numbers lead to the [lines](#lines) below.",
        "",
        f"| type | {' | '.join(RECIPES)} |",
        f"|{'---|' * (len(RECIPES) + 1)}",
        *(f"| {name} | {' | '.join(cell(name, one) for one in RECIPES)} |" for name in built),
        "",
        "## Lines",
        "",
        "MODEL, TYPE, CLASS and N stand for the model's folder, type and class, and for numbers.",
        "",
        *(f"{numbers[line]}. {lines[line]} x {quoted(line)}" for line in order),
    ]
    for title, step in (("Not built", BUILD), ("What plain transformers makes of a text", PLAIN)):
        told = [
            f"- {name}: {quoted(found[step])}"
            for name, found in results.items()
            if kind_of(found.get(step, "")) in (NOT_BUILT, "fails")
        ]
        if told:
            text += ["", f"## {title}", "", *told]
    return "\n".join(text) + "\n"


def quoted(result: str) -> str:
    """The line of a result, as code in which there may be code."""
    return f"`` {result.partition(': ')[2]} ``"


if __name__ == "__main__":
    run_script(main)
