"""PEFT's own tests, with bottleneck adapters among their cases.

    python benchmarks/peft_suite.py                                # about half an hour
    python benchmarks/peft_suite.py --quick                        # configurations and small models
    python benchmarks/peft_suite.py --source peft-0.21.2.tar.gz    # without pip

The tests come with PEFT's source distribution of the installed version, fetched by pip unless
--source names it, packed or unpacked. `BottleneckConfig` is written into their lists of cases, and
only its cases are run. What they take from the hub is built here instead: models of the same kinds
from small configs, a tokenizer, and texts; so no network is needed beyond pip's.

Printed are how many tests of each file passed, failed and were skipped, and each failure with its
reason. The benchmark fails if one has no reason in `EXPECTED`: at the next version of PEFT, look at
those first. The last line is one JSON object.
"""

import argparse
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

from measuring import RunFailed, run_script, show_table

from recipelib.adapters import bottleneck
from recipelib.runtime import UserError, versions

VERSION = importlib.metadata.version("peft")
QUICK = ("test_config.py", "test_custom_models.py")
# file -> {the line at which a list of cases begins: our cases}. With "identity" a model starts
# unchanged, which PEFT's cases do wherever a method can.
LINEAR = '{"target_modules": %s, "init_weights": "identity"%s}'
INPUTS = ("output", "residual", "input")
CUSTOM = [
    ("MLP", '"lin0"', ""),
    ("MLP", '["lin0"]', ""),
    ("MLP", '["lin0", "lin1"]', ', "scaling": "learned", "act": "relu"'),
    ("MLP", '["lin0"]', ', "modules_to_save": ["lin1"], "dropout": 0.5'),
    ("EmbConv1D", '["lin0"]', ', "trainable_token_indices": {"emb": [0, 10]}'),
    ("MLP", '["lin1"]', ', "reduction_factor": 2, "train_norms": False'),
]


def _task(task: str) -> str:
    options = f'{{"task_type": {task!r}, "init_weights": "identity", "train_norms": False%s}}'
    return "\n".join(
        f"(BottleneckConfig, {options % more}),"
        for more in ("", ', "placement": "ffn", "adapter_input": "input", "scaling": 4.0')
    )


CASES = {
    "test_config.py": {"ALL_CONFIG_CLASSES = (": "(BottleneckConfig, {}),"},
    "test_custom_models.py": {
        "TEST_CASES = [": "\n".join(
            f'("Bottleneck {number}", "{model}", BottleneckConfig, {LINEAR % (targets, more)}),'
            for number, (model, targets, more) in enumerate(CUSTOM)
        ),
        "MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES = [": "\n".join(
            f'("Bottleneck {name}", "bottleneck", BottleneckConfig, '
            f'{{"target_modules": ["lin0"]}}, {{"target_modules": ["{second}"]}}),'
            for name, second in (("Same", "lin0"), ("Different", "lin1"))
        ),
    },
    "test_decoder_models.py": {"ALL_CONFIGS = [": _task("CAUSAL_LM")},
    "test_encoder_decoder_models.py": {"ALL_CONFIGS = [": _task("SEQ_2_SEQ_LM")},
    "test_feature_extraction_models.py": {"ALL_CONFIGS = [": _task("FEATURE_EXTRACTION")},
    "test_seq_classifier.py": {"ALL_CONFIGS = [": _task("SEQ_CLS")},
    "test_torch_compile.py": {
        "SETTINGS = {": "\n".join(
            f'"bottleneck-{given}": '
            f'(BottleneckConfig(task_type="CAUSAL_LM", adapter_input="{given}"), {{}}),'
            for given in INPUTS
        )
    },
}
# What the error of a test begins with -> why it fails.
EXPECTED = {
    f"NotImplementedError: {bottleneck.NO_MERGING[:30]}": "it merges, and an adapter is not linear",
    "ValueError: Can't find 'adapter_config.json' at 'peft-internal": "it wants the hub's adapters",
}

# Written behind a line of PEFT's testing_common.py, which skips methods that cannot be merged.
COMMON = {
    "def _skip_if_merging_not_supported(model_id, config_cls, config_kwargs):": (
        "    if config_cls is BottleneckConfig:\n        pytest.skip('merging')"
    ),
}
# Written at the end of PEFT's testing_utils.py.
HELPERS = """

import peft_bottleneck
from datasets import Dataset, DatasetDict
from peft_bottleneck import BottleneckConfig

peft_bottleneck.INIT_STD = 0.3  # large enough to be seen
_set_init_weights_false = set_init_weights_false


def set_init_weights_false(config_cls, kwargs):
    if config_cls is BottleneckConfig:
        return kwargs | {"init_weights": "near_identity"}
    return _set_init_weights_false(config_cls, kwargs)


@contextmanager
def hub_online_once(model_id):  # the models are in the cache
    yield


def load_dataset_english_quotes():
    quotes = [f"Quote number {number} of the stand-in." for number in range(64)]
    row = {"quote": quotes, "author": quotes, "tags": quotes}
    return DatasetDict(train=Dataset.from_dict(row))
"""
_SHAPE = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
}
_BERT = {key: _SHAPE[key] for key in list(_SHAPE)[:4]}
_GPT = {"n_embd": 16, "n_layer": 2, "n_head": 4}
_OPT = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 32, "num_attention_heads": 4}
_BART = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2} | {
    f"{stack}_{name}": size
    for stack in ("encoder", "decoder")
    for name, size in (("attention_heads", 4), ("ffn_dim", 32))
}
# What stands for the hub's models: kind and sizes. The class is the last part of the name.
MODELS = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": ("opt", _OPT | {"num_hidden_layers": 2}),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": ("gpt2", _GPT),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": ("gptj", _GPT | {"rotary_dim": 4}),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("llama", _SHAPE),
    "peft-internal-testing/tiny-dummy-qwen2": ("qwen2", _SHAPE),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": ("gemma3_text", _SHAPE),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": (
        "t5",
        {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 4},
    ),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": ("bart", _BART),
    "peft-internal-testing/tiny-random-BertModel": ("bert", _BERT),
    "peft-internal-testing/tiny-random-RobertaModel": ("roberta", _BERT),
    "peft-internal-testing/tiny-random-DebertaModel": ("deberta", _BERT),
    "peft-internal-testing/tiny-random-DebertaV2Model": ("deberta-v2", _BERT),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": ("bert", _BERT),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": ("roberta", _BERT),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": ("llama", _SHAPE),
}
TOKENS = 100


def main(argv: list[str] | None = None) -> dict:
    """Run the benchmark.

    Returns:
        What its last line says.
    """
    args = parse(argv)
    with tempfile.TemporaryDirectory() as work:
        tests = write_tests(source_of(args.source, Path(work)), Path(work))
        save_models(Path(work, "hub"))
        files = QUICK if args.quick else tuple(CASES)
        results = {file: run(tests / file, Path(work)) for file in files}
    return report(results)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line's arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help=f"only {' and '.join(QUICK)}")
    parser.add_argument("--source", type=Path, help="PEFT's source, packed or not [fetched by pip]")
    return parser.parse_args(argv)


def source_of(given: Path | None, work: Path) -> Path:
    """The folder of PEFT's source.

    Raises:
        UserError: there is none, or of another version than the installed one.
    """
    packed = given
    if given is None:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--no-binary", "peft", "--dest", str(work), f"peft=={VERSION}"]
        if subprocess.run(command).returncode:
            raise UserError("pip could not fetch PEFT's source; download it and pass --source")
        packed = next(work.glob("peft-*.tar.gz"))
    elif given.is_dir():
        packed = None
    elif not given.is_file():
        raise UserError(f"--source {given}: no such file or folder")
    folder = given
    if packed is not None:
        try:
            with tarfile.open(packed) as archive:
                archive.extractall(work, filter="data")
        except tarfile.TarError as error:
            raise UserError(f"--source {packed}: is no source distribution ({error})") from None
        folder = next(work.glob("peft-*/"), work)
    information = folder / "PKG-INFO"
    if not (folder / "tests").is_dir() or not information.is_file():
        raise UserError(f"{packed or folder}: holds no PKG-INFO and tests, as PEFT's source does")
    if f"\nVersion: {VERSION}\n" not in information.read_text(encoding="utf-8"):
        raise UserError(f"{packed or folder}: is of another version than the installed {VERSION}")
    return folder


def write_tests(source: Path, work: Path) -> Path:
    """PEFT's tests with our cases, and our method beside them.

    Raises:
        UserError: a list of cases is not where it was.
    """
    tests = work / "tests"
    shutil.copytree(source / "tests", tests)
    (tests / "__init__.py").touch()
    (work / "pytest.ini").write_text("[pytest]\n")  # PEFT's own wants a plugin
    shutil.copy(bottleneck.__file__, work / "peft_bottleneck.py")
    with open(tests / "testing_utils.py", "a", encoding="utf-8") as file:
        file.write(HELPERS)
    for name, lines in ({"testing_common.py": COMMON} | CASES).items():
        text = (tests / name).read_text(encoding="utf-8")
        for line, more in lines.items():
            before, found, after = text.partition(f"\n{line}\n")
            if not found:
                raise UserError(f"{name} of PEFT {VERSION}: has no line {line!r}; see CASES")
            text = f"{before}{found}{more}\n{after}"
        before, found, after = text.partition("\nfrom peft import (\n")
        text = f"{before}\nfrom peft_bottleneck import BottleneckConfig{found}{after}"
        # Asked is only whether a model is one of diffusers.
        text = text.replace("from diffusers import StableDiff", "StableDiffusionPipeline = int  # ")
        (tests / name).write_text(text, encoding="utf-8")
    return tests


def save_models(cache: Path) -> None:
    """Write the stand-ins of the hub's models as its cache holds them."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"<unk>": 0, "Quote": 1, "number": 2, "of": 3, "the": 4, "stand-in": 5, ".": 6}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", pad_token="<unk>", model_max_length=64
    )
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    for name, (kind, sizes) in MODELS.items():
        ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        if kind in ("t5", "bart"):
            ids["decoder_start_token_id"] = 0
        config = transformers.AutoConfig.for_model(kind, vocab_size=TOKENS, **ids, **sizes)
        folder = cache / f"models--{name.replace('/', '--')}"
        model = _class_of(name)(config)
        model.save_pretrained(folder / "snapshots" / "built")
        tokenizer.save_pretrained(folder / "snapshots" / "built")
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text("built")


def _class_of(name: str):
    """The class of transformers that a model's name ends with."""
    import transformers

    if name.endswith("qwen2"):
        return transformers.Qwen2ForCausalLM
    if name.endswith("-3.2"):
        return transformers.LlamaForSequenceClassification
    return getattr(transformers, name.partition("tiny-random-")[2].removesuffix("-calibrated"))


def run(file: Path, work: Path) -> dict[str, str | None]:
    """Our tests of a file: name -> "" where it passed, None where it was skipped, else the error.

    Raises:
        RunFailed: they did not run.
    """
    result = work / f"{file.stem}.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-k", "bottleneck", "-p", "no:cacheprovider"]
    command += ["--no-header", "--tb=line", f"--junitxml={result}", "-c", str(work / "pytest.ini")]
    own = {"HF_HUB_CACHE": str(work / "hub"), "HF_HUB_OFFLINE": "1"}
    own |= {"PYTHONPATH": str(work), "PEFT_DEBUG_WITH_TORCH_COMPILE": "1"}
    finished = subprocess.run(
        [*command, str(file)], cwd=work, env=os.environ | own, capture_output=True, text=True
    )
    if finished.returncode not in (0, 1):
        raise RunFailed(f"{file.name}: {finished.stdout[-2000:]}{finished.stderr[-2000:]}")
    outcomes = {}
    for case in ElementTree.parse(result).iter("testcase"):
        problem = next((part for part in case if part.tag in ("failure", "error")), None)
        outcome = None if case.find("skipped") is not None else ""
        name = f"{case.get('classname', '').rpartition('.')[2]}.{case.get('name')}"
        outcomes[name] = outcome if problem is None else problem.get("message") or problem.tag
    return outcomes


def report(results: dict[str, dict[str, str | None]]) -> dict:
    """Print the table, the failures with their reasons, and the last line.

    Raises:
        RunFailed: a failure has no reason.
    """
    rows, by_reason, found = [], {}, {}
    for file, outcomes in results.items():
        kinds = {"": "passed", None: "skipped"}
        counts = Counter(kinds.get(outcome, "failed") for outcome in outcomes.values())
        found[file] = {kind: counts[kind] for kind in ("passed", "failed", "skipped")}
        rows.append([file, *map(str, found[file].values())])
        for name, error in outcomes.items():
            if error:
                reason = next(
                    (why for start, why in EXPECTED.items() if error.startswith(start)), ""
                )
                by_reason.setdefault(reason, []).append((file, name, error.splitlines()[0]))
    show_table(f"PEFT {VERSION}'s tests", ["file", "passed", "failed", "skipped"], rows)
    for reason, failures in by_reason.items():
        print(f"{len(failures)} failed: {reason or 'NO REASON IS KNOWN'}")
        for file, name, error in failures:
            print(f"    {file}::{name}{'' if reason else f': {error}'}")
    unnamed = [f"{file}::{name}" for file, name, _ in by_reason.get("", [])]
    last = {"peft": VERSION, "files": found, "without_a_reason": unnamed, "versions": versions()}
    print(json.dumps(last))
    if unnamed:
        raise RunFailed(f"{len(unnamed)} failures without a reason")
    return last


if __name__ == "__main__":
    run_script(main)
