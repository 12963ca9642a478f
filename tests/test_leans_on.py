"""Every private name of other libraries that the recipes lean on, with what is taken for granted of
it: read this first at an upgrade.

Renamed, some of these would fail loudly; others would change a loss, an order or a check in
silence. Each has a test below that would fail then. The first tests hold the list to the code.
"""

import argparse
import ast
import copy
import inspect
import types
from pathlib import Path
from typing import ClassVar

import evaluate
import jinja2
import pytest
import torch
from accelerate import PartialState
from accelerate.utils.memory import should_reduce_batch_size
from datasets import Dataset
from peft import LoraConfig, LoraModel, PeftModel, PeftType, get_peft_model
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from tiny_llama import save_tiny_llama, tiny_llama
from tokenizers_for_tests import tokenizer_for
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    DynamicCache,
    Trainer,
    masking_utils,
)
from transformers.cache_utils import DummyLayer, DynamicLayer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.chat_template_utils import _compile_jinja_template
from trl import SFTTrainer

from recipelib.adapters.bottleneck import BottleneckModel
from recipelib.evaluation.metrics import load_metric
from recipelib.pipeline.trainer import PipelineTrainer
from recipelib.prompts import sandbox
from recipelib.training.cloze_trainer import ClozeTrainer
from recipelib.training.config import RecipeConfig
from recipelib.training.trainer import RecipeTrainer

LIBRARY = Path(__file__).resolve().parents[1] / "recipes" / "recipelib"
FILES = sorted(LIBRARY.rglob("*.py"))

# Private name -> what is taken for granted. A name of a method that we override is `Class.method`.
LEANS_ON = {
    # accelerate
    "_prepare_backend": "PartialState asks it for the backend; FSDP2 on CPUs answers gloo in place",
    # datasets
    "_fingerprint": "of a hub's data set: another one where its rows are others",
    "_indices": "of a data set: None unless its rows are others than those of its files, in order",
    # transformers
    "SFTTrainer._init_training_state": "gives the passes that are finished, and batches to skip",
    "RecipeTrainer._load_from_checkpoint": "resuming puts a checkpoint's weights back through it",
    "PipelineTrainer._wrap_model": "what a step is given as its model: else data parallel",
    "PipelineTrainer._clip_grad_norm": "is called in each step, if gradients are clipped",
    "PipelineTrainer._get_grad_norm": "is called in each step, with the norm before clipping",
    "PipelineTrainer._save_optimizer_and_scheduler": "is called in each process, for a checkpoint",
    "PipelineTrainer._save_rng_state": "the last before trainer_state.json makes it whole",
    "PipelineTrainer._load_from_checkpoint": "as RecipeTrainer's",
    "PipelineTrainer._load_optimizer_and_scheduler": "is called once the optimizer is there",
    "PipelineTrainer._load_best_model": "is called at the end of training",
    "_prepare_inputs": "a batch on its device",
    "_remove_unused_columns": "of the rows, those that no model takes",
    "_keys_to_ignore_on_load_unexpected": "patterns of weights in a file that nothing has room for",
    "_loss_shifts_labels": "by which a step's tokens are counted: labels from the second on",
    "_n_gpu": "more than one would scatter a batch over torch's DataParallel",
    "_attn_implementation": "sdpa, eager, ...: of the config",
    "_no_split_modules": "the names of the classes of decoder layers",
    "_tied_weights_keys": "what transformers ties again after loading",
    "_compile_jinja_template": "from a chat template's text, in transformers' sandbox",
    "_name_or_path": "of the config: where a model was loaded from, which changes no state",
    # scikit-learn
    "_predictors": "a boosting's trees, whose nodes are checked when they are loaded",
    "_preprocessor": "None, or it would change the features before the trees see them",
    # torch
    "_parameters": "a module's own parameters, from which a doubled bias is taken",
    "_modules": "a module's own children; a copy with others leaves the first as it was",
    "_scaled_dot_product_flash_attention_for_cpu": "gives values and the logarithms of normalizers",
    "_subclasses.fake_tensor": "tensors without values, for the memory estimate",
    "utils._python_dispatch": "every operator passes by, for the memory estimate",
    "utils._pytree": "the tensors of whatever an operator gives back",
    "_cdata": "tells one storage from another",
    "_local_scalar_dense": "what asks a tensor for its value",
    # peft
    "_member_map_": "PeftType is an Enum of text, to which a member is added",
    "_member_names_": "of the Enum",
    "_value2member_map_": "of the Enum",
    "_name_": "of the Enum's member",
    "_value_": "of the Enum's member",
    "_sort_order_": "of the Enum's member",
    "BaseTuner._prepare_adapter_config": "fills in target_modules",
    "BaseTuner._prepare_model": "is called before layers are replaced",
    "BaseTuner._create_and_replace": "is called for each target",
    "BaseTuner._check_merge_allowed": "is asked before merging",
    "BaseTuner._enable_peft_forward_hooks": "is entered around each forward pass",
    "_replace_module": "puts a layer in the place of another",
    "_move_adapter_to_device_of_base_layer": "after an adapter was added to a layer",
    "_cast_input_dtype": "of a layer; cast_input_dtype_enabled turns it off",
    # jinja2
    "ImmutableSandboxedEnvironment._generate": "every text and expression passes here: the sandbox",
    # os, documented there
    "_exit": "ends a process whose main thread waits for one that has died",
    # argparse
    "_actions": "the options of a parser",
    "_get_values": "converts and checks the words of an option",
    # evaluate
    "evaluate.Metric._info": "the features of a metric",
    "evaluate.Metric._compute": "what compute calls",
    "evaluate.Metric._build_data_dir": "makes a folder in the user's cache unless told not to",
}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def own_names(trees) -> set[str]:
    """What recipelib itself defines: functions, classes, variables and attributes of self."""
    names = set()
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                names |= {node.attr} if ast.unparse(node.value) in ("self", "inner") else set()
    return names


def private_names() -> set[str]:
    """The private names of others that stand in the code, as `LEANS_ON` names them."""
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in FILES]
    own, found = own_names(trees), set()
    for tree in trees:
        formatted = {
            id(part)
            for node in ast.walk(tree)
            if isinstance(node, ast.JoinedStr)
            for part in node.values
        }
        for node in ast.walk(tree):
            if id(node) in formatted:  # a piece of an f-string is no name
                continue
            if isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in own:
                found.add(node.attr)
            elif isinstance(node, ast.ImportFrom):
                parts = (node.module or "").split(".")
                if any(map(is_private, parts)):
                    found.add(".".join(parts[1:]))
                found |= {alias.name for alias in node.names if is_private(alias.name)} - own
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                text = node.value  # as getattr takes it
                found |= {text} if text.isidentifier() and is_private(text) else set()
    return found


def overrides() -> set[str]:
    """The private methods of others that our classes override, as `Class.method`."""
    import recipelib.reporting  # noqa: F401  every room is loaded then

    bases = {
        "SFTTrainer": (SFTTrainer, RecipeTrainer),
        "RecipeTrainer": (SFTTrainer, ClozeTrainer),
        "PipelineTrainer": (SFTTrainer, PipelineTrainer),
        "BaseTuner": (LoraModel, BottleneckModel),  # for hooks that tuners have by agreement
        "ImmutableSandboxedEnvironment": (
            jinja2.sandbox.ImmutableSandboxedEnvironment,
            type(sandbox.ENVIRONMENT),
        ),
        "evaluate.Metric": (evaluate.Metric, type(load_metric("accuracy"))),
    }
    return {
        f"{name}.{method}"
        for name, (base, ours) in bases.items()
        for method in vars(ours)
        if is_private(method) and hasattr(base, method)
        and isinstance(vars(ours)[method], types.FunctionType | property)
    }  # fmt: skip


# Set on the trainers and the trainer's arguments, where the scan takes them for our own.
ASSIGNED = {"_loss_shifts_labels", "_n_gpu"}


def test_the_list_is_complete_and_holds_nothing_else():
    assert private_names() | overrides() | ASSIGNED == set(LEANS_ON)


# transformers -------------------------------------------------------------------------------------


ROWS = [{"input_ids": [1, 2, 3, 4], "labels": [-100, 2, 3, -100]} for _ in range(4)]


def plain_trainer(tmp_path, **options) -> SFTTrainer:
    settings = {"disable_tqdm": True, "use_cpu": True, "save_strategy": "no", **options}
    return SFTTrainer(
        tiny_llama(300),
        RecipeConfig(output_dir=str(tmp_path), max_steps=1, **settings),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=tokenizer_for("gpt2"),
    )


def test_a_steps_tokens_are_counted_by_whether_the_loss_shifts_labels(tmp_path):
    trainer = plain_trainer(tmp_path)
    counted = {}
    for shifts in (True, False):
        trainer._loss_shifts_labels = shifts
        trainer.model_accepts_loss_kwargs = True
        rows = [{"labels": torch.tensor([[5, 2, 3, -100]])}]
        _, counted[shifts] = trainer.get_batch_samples(iter(rows), 1, torch.device("cpu"))
    assert (int(counted[True]), int(counted[False])) == (2, 3)


def test_chat_templates_are_compiled_in_a_sandbox_and_rendered_as_the_tokenizer_does():
    tokenizer = tokenizer_for("gpt2")
    turns = [{"role": "user", "content": "Hi"}]
    template = _compile_jinja_template(tokenizer.get_chat_template())
    assert isinstance(template.environment, jinja2.sandbox.ImmutableSandboxedEnvironment)
    options = {"add_generation_prompt": True, **tokenizer.special_tokens_map}
    found = template.render(messages=turns, tools=None, documents=None, **options)
    own = {"add_generation_prompt": True, "tokenize": False}
    assert found == tokenizer.apply_chat_template(turns, **own)


def test_resuming_loads_weights_through_the_hook():
    source = inspect.getsource(Trainer)
    assert source.count("self._load_from_checkpoint(resume_from_checkpoint") == 2
    assert list(inspect.signature(Trainer._load_from_checkpoint).parameters) == list(
        inspect.signature(ClozeTrainer._load_from_checkpoint).parameters
    )


PIPELINE = [name.split(".")[1] for name in LEANS_ON if name.startswith("PipelineTrainer.")]


@pytest.mark.parametrize("method", PIPELINE)
def test_a_trainers_hook_takes_what_the_pipelines_takes(method):
    theirs, ours = (
        [*inspect.signature(getattr(kind, method)).parameters.values()]
        for kind in (SFTTrainer, PipelineTrainer)
    )
    assert [(one.name, one.default) for one in theirs] == [(one.name, one.default) for one in ours]


def test_a_trainer_calls_the_hooks_of_a_pipeline_where_it_needs_them():
    loop = inspect.getsource(Trainer)
    for call in (
        "model = self._wrap_model(self.model_wrapped)",
        "grad_norm = self._clip_grad_norm(model)",
        "grad_norm = self._get_grad_norm(model, grad_norm=grad_norm)",
        "self._load_optimizer_and_scheduler(resume_from_checkpoint)",
        "self._load_best_model()",
    ):
        assert loop.count(call) == 1, call
    written = inspect.getsource(Trainer._save_checkpoint)
    calls = ("self.save_model(output_dir, _internal_call=True)", "self._save_optimizer_and_sched")
    calls += ("self._save_rng_state(output_dir)", "self.state.save_to_json(")
    places = [written.index(call) for call in calls]
    assert places == sorted(places)


def test_a_weight_that_nothing_has_room_for_is_passed_over_where_a_pattern_says_so(tmp_path):
    folder = save_tiny_llama(tmp_path / "model")
    kind = type(AutoModelForCausalLM.from_pretrained(folder))

    class Shorter(kind):
        _keys_to_ignore_on_load_unexpected: ClassVar = [".*"]

        def __init__(self, config):
            super().__init__(config)
            self.model.layers[1] = torch.nn.Identity()

    model, info = Shorter.from_pretrained(folder, output_loading_info=True)
    assert not any(map(len, info.values()))
    whole = kind.from_pretrained(folder)
    first = (one.model.layers[0].mlp.up_proj.weight for one in (model, whole))
    assert torch.equal(*first)


def test_a_copy_of_a_module_with_other_children_leaves_the_first_as_it_was():
    first = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU())
    twin = copy.copy(first)
    twin._modules = {**first._modules, "1": torch.nn.Identity()}
    assert isinstance(first[1], torch.nn.ReLU)
    assert isinstance(twin[1], torch.nn.Identity)
    assert twin[0] is first[0]


def test_the_number_of_gpus_is_kept_under_its_private_name(tmp_path):
    training = RecipeConfig(output_dir=str(tmp_path), use_cpu=True)
    training._n_gpu = 7
    assert training.n_gpu == 7


def test_a_model_names_its_layers_its_attention_and_what_it_ties():
    model = BertForMaskedLM(
        BertConfig(
            vocab_size=30,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=8,
        )
    )
    assert model.config._attn_implementation == "sdpa"
    assert "BertLayer" in model._no_split_modules
    assert "BertEmbeddings" in model._no_split_modules
    # target -> source, the first as patterns, the second as whole names
    assert model._tied_weights_keys["cls.predictions.decoder.bias"] == "cls.predictions.bias"
    assert model.all_tied_weights_keys["cls.predictions.decoder.bias"] == "cls.predictions.bias"
    assert model.cls.predictions._parameters["bias"] is model.cls.predictions.decoder.bias


@pytest.mark.parametrize("functions", [ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS])
def test_attention_is_looked_up_by_name_and_what_is_set_can_be_taken_back(functions):
    usual = functions["sdpa"]
    functions["sdpa"] = len
    try:
        assert functions["sdpa"] is len
    finally:
        del functions["sdpa"]
    assert functions["sdpa"] is usual


def test_a_cache_is_a_list_of_layers_that_can_be_cropped():
    cache = DynamicCache(config=tiny_llama(300).config)
    assert all(type(layer) in (DynamicLayer, DummyLayer) for layer in cache.layers)
    keys = torch.zeros(1, 2, 5, 8)
    cache.update(keys, keys, 0)
    layer = cache.layers[0]
    assert layer.is_initialized
    layer.crop(-2)
    assert layer.keys.shape == layer.values.shape == (1, 2, 3, 8)


def test_masks_ask_whether_a_model_is_traced():
    assert "is_tracing(" in inspect.getsource(masking_utils)


# accelerate and torch -----------------------------------------------------------------------------


def test_the_backend_of_processes_is_asked_for_in_one_place():
    source = inspect.getsource(PartialState.__init__)
    assert "backend, distributed_type = self._prepare_backend(" in source
    assert should_reduce_batch_size(RuntimeError("DefaultCPUAllocator: can't allocate memory"))


def test_flash_attention_on_a_cpu_gives_the_normalizers_too():
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, 3, 8) for _ in range(3))
    values, normalizers = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, attn_mask=None, scale=0.5
    )
    scores = query @ key.transpose(-1, -2) * 0.5
    torch.testing.assert_close(values, scores.softmax(-1) @ value)
    torch.testing.assert_close(normalizers.reshape(1, 2, 3), scores.logsumexp(-1))


def test_fake_tensors_pass_every_operator_by_and_storages_are_told_apart():
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    names = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(func)
            return func(*args, **(kwargs or {}))

    with FakeTensorMode(allow_non_fake_inputs=True), Recorder():
        made = torch.empty(3, 4) @ torch.empty(4, 5)
    assert made.shape == (3, 5)
    assert torch.ops.aten.mm.default in names
    assert torch.ops.aten._local_scalar_dense.default.namespace == "aten"
    assert tree_leaves([1, {"a": 2}]) == [1, 2]
    first, second = torch.zeros(2), torch.zeros(2)
    assert first.untyped_storage()._cdata == first[1:].untyped_storage()._cdata
    assert first.untyped_storage()._cdata != second.untyped_storage()._cdata


# peft ---------------------------------------------------------------------------------------------


def test_a_method_was_added_to_pefts_list_as_a_whole_member():
    member = PeftType.BOTTLENECK
    assert member is PeftType("BOTTLENECK") is PeftType["BOTTLENECK"]
    assert (member.name, member.value, str.__str__(member)) == ("BOTTLENECK",) * 3
    assert member in list(PeftType)


HOOKS = [name.split(".")[1] for name in LEANS_ON if name.startswith("BaseTuner.")]


@pytest.mark.parametrize("method", HOOKS)
def test_a_tuners_hook_is_called_with_what_ours_takes(method):
    base = LoraModel if method == "_enable_peft_forward_hooks" else BaseTuner
    theirs = inspect.signature(getattr(base, method)).parameters
    ours = inspect.signature(getattr(BottleneckModel, method)).parameters
    required = [
        parameter
        for parameter in theirs.values()
        if parameter.default is parameter.empty
        and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ]
    variable = any(parameter.kind is parameter.VAR_POSITIONAL for parameter in ours.values())
    assert variable or len(ours) == len(required)
    callers = inspect.getsource(BaseTuner) + inspect.getsource(PeftModel)
    assert f".{method}(" in callers.replace(f"def {method}(", "")


def test_layers_cast_their_input_unless_told_not_to():
    layer = next(
        module
        for module in get_peft_model(tiny_llama(300), LoraConfig(r=2)).modules()
        if isinstance(module, BaseTunerLayer)
    )
    half = torch.zeros(1, dtype=torch.bfloat16)
    assert layer._cast_input_dtype(half, torch.float32).dtype == torch.float32
    layer.cast_input_dtype_enabled = False
    assert layer._cast_input_dtype(half, torch.float32).dtype == torch.bfloat16
    for name in ("_replace_module", "_move_adapter_to_device_of_base_layer"):
        assert hasattr(BaseTuner, name) or hasattr(BaseTunerLayer, name)


# jinja2, argparse, evaluate -----------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [sandbox.compile_text, sandbox.compile_expression])
def test_every_text_and_expression_passes_the_sandboxs_check(compiled, monkeypatch):
    checked = []
    refuse = sandbox._refuse
    monkeypatch.setattr(sandbox, "_refuse", lambda tree: checked.append(tree) or refuse(tree))
    compiled("{{ name }}" if compiled is sandbox.compile_text else "name")
    assert len(checked) == 1
    with pytest.raises(sandbox.SecurityError):
        compiled("{{ x ** 2 }}" if compiled is sandbox.compile_text else "x ** 2")


def test_a_parser_converts_the_words_of_an_option_by_its_action():
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, choices=[1, 2])
    action = next(action for action in parser._actions if action.dest == "rows")
    assert parser._get_values(action, ["2"]) == 2
    with pytest.raises(argparse.ArgumentError):
        parser._get_values(action, ["3"])


def test_a_metric_is_computed_in_memory_and_leaves_no_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    metric = load_metric("accuracy")
    assert metric.data_dir == ""
    assert metric.compute(predictions=["a"], references=["a"]) == {"accuracy": 1.0}
    assert list(tmp_path.iterdir()) == []
