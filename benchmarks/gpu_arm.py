"""One training of `gpu_throughput.py`, in a process of its own: python gpu_arm.py SPEC RESULT

SPEC is a JSON file with what `gpu_throughput.measure` puts together; RESULT is written as JSON.
"""

import json
import runpy
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path
from unittest import mock

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "recipes"))

# Of the tokenizer below; rows are drawn from the ids that follow.
SPECIAL = {"<pad>": 0, "<s>": 1, "</s>": 2}


class Finished(Exception):
    """All steps are measured; what the trainer would still do (save 16 GB) is left out."""


class Stopwatch(TrainerCallback):
    """Takes time and non-padding tokens (as the trainer counts them) between two steps."""

    def __init__(self, warmup: int, steps: int):
        self.bounds = (warmup, warmup + steps)
        self.marks: list[tuple[float, int]] = []
        self.first_loss = None

    def on_train_begin(self, args, state, control, **kwargs):
        """Have tokens counted; as a flag this takes only true and false, which counts padding."""
        args.include_num_input_tokens_seen = "non_padding"

    def on_step_end(self, args, state, control, **kwargs):
        """Mark the end of the warm-up and of the last step."""
        if state.global_step not in self.bounds:
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.marks.append((time.perf_counter(), state.num_input_tokens_seen))
        if len(self.marks) == 2:
            raise Finished

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Keep the first step's loss."""
        if state.global_step == 1:
            self.first_loss = logs["loss"]


def uses_bf16() -> bool:
    """Whether to train in bfloat16: only a GPU with hardware for it is faster with it."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def make_model(shape: dict, attention: str) -> PreTrainedModel:
    """A Llama with random weights, the same at every call, made in its dtype on its device."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if uses_bf16() else torch.float32
    config = LlamaConfig(**shape, bos_token_id=SPECIAL["<s>"], eos_token_id=SPECIAL["</s>"])
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    return model.to(device)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that knows its control tokens only: the rows are encoded."""
    backend = Tokenizer(WordLevel(SPECIAL, unk_token="<pad>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def prepare(spec: dict) -> None:
    """Save the model and its tokenizer where TRL's script will load them."""
    make_model(spec["shape"], "sdpa").save_pretrained(f"{spec['folder']}/model")
    make_tokenizer().save_pretrained(f"{spec['folder']}/model")


def train_ours(spec: dict, watch: Stopwatch) -> None:
    """Train as the recipes do."""
    from measuring import Examples
    from peft import LoraConfig, get_peft_model
    from trl import SFTTrainer

    from recipelib.adapters import BottleneckConfig
    from recipelib.encoding import EncodedRows
    from recipelib.training import RecipeConfig, RecipeTrainer

    class FusedLossTrainer(RecipeTrainer):
        compute_loss = SFTTrainer.compute_loss

    training = RecipeConfig(
        output_dir=f"{spec['folder']}/out", bf16=uses_bf16(), **spec["training"]
    )
    model = make_model(spec["shape"], spec["attention"])
    if spec["rank"]:
        lora = LoraConfig(
            r=spec["rank"],
            lora_alpha=2 * spec["rank"],
            target_modules="all-linear",
            init_lora_weights="gaussian",
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(model, lora)
    if spec["bottleneck"]:
        adapters = BottleneckConfig(bottleneck_size=spec["bottleneck"], init_weights="identity")
        model = get_peft_model(model, adapters)
    lines = Path(spec["folder"], "data", "train.jsonl").read_text().splitlines()
    rows = map(json.loads, lines)
    encoded = EncodedRows.of((row["input_ids"], row["labels"]) for row in rows)
    trainer = (FusedLossTrainer if spec["fused_loss"] else RecipeTrainer)(
        model, training, Examples(encoded, make_tokenizer())
    )
    trainer.add_callback(watch)
    trainer.train()


def train_with_trl(spec: dict, watch: Stopwatch) -> None:
    """Run TRL's own script in this process, with the stopwatch among the default callbacks."""
    import transformers.trainer
    import trl

    options = {
        "model_name_or_path": f"{spec['folder']}/model",
        "dataset_name": f"{spec['folder']}/data",
        "output_dir": f"{spec['folder']}/out",
        "attn_implementation": spec["attention"],
        # The script's default is float32, which is slower; both sides get the same.
        "dtype": "bfloat16" if uses_bf16() else "float32",
        "bf16": uses_bf16(),
        **spec["training"],
    }
    if spec["rank"]:
        options |= {"use_peft": True, "lora_r": spec["rank"], "lora_alpha": 2 * spec["rank"]}
        options |= {"lora_dropout": 0.0, "lora_target_modules": "all-linear"}
    flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    callbacks = [*transformers.trainer.DEFAULT_CALLBACKS, watch]
    script = str(Path(trl.__file__).parent / "scripts" / "sft.py")
    with (
        mock.patch.object(transformers.trainer, "DEFAULT_CALLBACKS", callbacks),
        mock.patch.object(sys, "argv", [script, *flags]),
    ):
        runpy.run_path(script, run_name="__main__")


def train(spec: dict) -> dict:
    """Train for the steps that `spec` asks for.

    Returns:
        The tokens without padding and the seconds after the warm-up, the peak memory in bytes (on
        a GPU what was allocated, on a CPU what was in use beyond the start), the first step's loss.
    """
    # Both sides' libraries, so that on a CPU none of them counts as a run's memory.
    import recipelib.training  # noqa: F401
    from recipelib.runtime import MemoryMeter

    watch = Stopwatch(spec["warmup"], spec["steps"])
    memory = MemoryMeter()
    memory.restart()
    with suppress(Finished):
        (train_ours if spec["side"] == "ours" else train_with_trl)(spec, watch)
    (start, seen_before), (end, seen) = watch.marks
    return {
        "status": "ok",
        "tokens": seen - seen_before,
        "seconds": end - start,
        "peak_memory_bytes": memory.stop(),
        "first_loss": watch.first_loss,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "bf16": uses_bf16(),
    }


def reason(error: BaseException) -> str:
    """What failed, in one line."""
    from recipelib.runtime import UserError

    text = str(error)
    signs = ("out of memory", "can't allocate memory", "ALLOC_FAILED")
    if isinstance(error, MemoryError) or any(sign in text for sign in signs):
        return "out of memory"
    line = next(iter(text.strip().splitlines()), "")
    return line if isinstance(error, UserError) else f"{type(error).__name__}: {line}"


def main(spec_file: str, result_file: str) -> None:
    """Do what the spec says; what fails is a result too."""
    spec = json.loads(Path(spec_file).read_text())
    try:
        result = train(spec) if spec["side"] != "prepare" else prepare(spec) or {"status": "ok"}
    except Exception as error:
        traceback.print_exc()
        result = {"status": reason(error)}
    Path(result_file).write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
