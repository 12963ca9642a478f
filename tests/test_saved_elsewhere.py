"""What a run leaves ends its answers where training did, in plain transformers, and asks as it was
trained, in other recipes.
"""

import json
import shutil

import gpipe_sft
import icl_eval
import instruction_sft
import lora_sft
import merge
import pytest
import torch
from cloze_runs import shown_code
from peft import LoraConfig, get_peft_model
from recipe_runs import write_rows
from run_files import read_json, read_jsonl
from tiny_llama import save_tiny_llama, tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from recipelib.adapters import load_tuned, save_start, with_adapter
from recipelib.runtime import UserError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATS = [
    {
        "messages": [
            {"role": "user", "content": f"Hello {n}"},
            {"role": "assistant", "content": f"Good day {n}"},
        ]
    }
    for n in range(6)
]


@pytest.fixture(scope="module")
def base_model(tmp_path_factory):
    """A base model whose turns do not end with its eos token, with sampling fields as published
    ones have them, which transformers would not save once they are changed.
    """
    folder = save_tiny_llama(tmp_path_factory.mktemp("base_model"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    tiny_llama(len(tokenizer)).save_pretrained(folder)
    own = {"eos_token_id": tokenizer.eos_token_id, "temperature": 0.6, "top_p": 0.9}
    (folder / "generation_config.json").write_text(json.dumps(own))
    return folder


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("chats"), train=CHATS[:4], test=CHATS[4:])


CHAT = {"rendering": "chat", "max_new_tokens": 4, "max_steps": 1, "max_eval_samples": 2}
RUNS = {
    "full": (instruction_sft, {"dataset": None}),
    "lora": (instruction_sft, {"dataset": None, "lora": True}),
    "pipeline": (gpipe_sft, {"micro_batches": 1}),
    "text": (lora_sft, {"rendering": "text"}),
}


@pytest.mark.parametrize("kind", RUNS)
def test_generation_ends_where_the_trained_answers_did(kind, runs, base_model, chats, monkeypatch):
    recipe, options = RUNS[kind]
    if recipe is instruction_sft:
        options = {**options, "template": [f"conversations={chats}"]}
    folder = runs(recipe, model_name_or_path=base_model)(**{**CHAT, **options})
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == CHATML
    eos, turn = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")
    ends = eos if kind == "text" else [turn, eos]
    places, scope = [folder], {}
    if (folder / "adapter_config.json").exists():
        merge.main([str(folder)])
        places.append(folder / "merged")
    for place in places:
        config = GenerationConfig.from_pretrained(place)
        assert (config.eos_token_id, config.temperature, config.top_p) == (ends, 0.6, 0.9)
        assert (place / "chat_template.jinja").exists()
    exec(shown_code(folder), scope)
    assert scope["model"].generation_config.eos_token_id == ends
    whole = AutoModelForCausalLM.from_pretrained(places[-1])
    assert whole.config.dtype == whole.dtype == torch.float32


# Layers that share their weights ----------------------------------------------------------------

IDS = torch.tensor([[5, 17, 42, 99, 7, 3, 64, 12]])
TIED = {
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "both alike": {"target_modules": ["q_proj", "lm_head"], "ensure_weight_tying": True},
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [5, 17]},
    "neither": {"target_modules": ["q_proj"]},
}


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("grown", [0, 3])
@pytest.mark.parametrize("kind", TIED)
def test_a_merged_model_computes_what_the_adapter_did_on_tied_layers(
    kind, grown, causal_model, tmp_path
):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(causal_model)
    size = model.get_input_embeddings().num_embeddings + grown
    model.resize_token_embeddings(size)
    lora = LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM", **TIED[kind])
    model = get_peft_model(model, lora)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "modules_to_save" in name or "trainable_tokens" in name:
                weight.add_(torch.randn_like(weight) / 10)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    loaded = with_adapter(AutoModelForCausalLM.from_pretrained(causal_model), tmp_path)
    assert torch.equal(logits(loaded), expected)
    merge.main([str(tmp_path)])  # it has no tokenizer: the base model's comes along
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.allclose(logits(merged), expected, atol=1e-4)
    assert merged.config.tie_word_embeddings == (kind in ("both alike", "tokens", "neither"))
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").eos_token == "</s>"


def test_pissa_does_not_start_from_a_weight_that_is_also_the_embeddings(tmp_path):
    for layer in ("lm_head", "embed_tokens"):
        lora = LoraConfig(target_modules=[layer], init_lora_weights="pissa")
        with pytest.raises(UserError, match="one of --target_modules has the embeddings'"):
            save_start(get_peft_model(tiny_llama(300), lora), str(tmp_path))


# In other recipes -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def asked(start, base_model, reviews, tmp_path_factory):
    """An adapter that was trained with a template of its own, through the chat template."""
    root = tmp_path_factory.mktemp("asked")
    shutil.copy("data_templates/movie_reviews.yaml", root / "mine.yaml")
    text = (root / "mine.yaml").read_text().replace("The movie review is", "Somebody wrote")
    (root / "mine.yaml").write_text(text)
    more = {"template": root / "mine.yaml", "rendering": "chat", "max_steps": 1}
    folder = start(lora_sft, root / "run", model_name_or_path=base_model, **more)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHATML.replace("user", "human").replace("m['role']", "m['role'][:4]")
    tokenizer.save_pretrained(folder)
    return folder


def test_an_adapter_is_asked_as_its_run_was_and_what_is_named_wins(asked, runs, capsys):
    run = runs(icl_eval, adapter=asked, model_name_or_path=None, shots=0, max_length=512)
    folder = run()
    said = capsys.readouterr().out
    assert f"{asked}: is asked as it was trained, with its template.yaml" in said
    assert "--rendering chat" in said
    assert read_json(folder / "metrics.json")["rendering"] == "chat"
    prompt = read_jsonl(folder / "predictions.jsonl")[0]["prompt"]
    assert "Somebody wrote" in prompt
    assert "<|im_start|>assi" in prompt  # by the chat template of the adapter's folder
    named = run(output="named", template="movie_reviews", rendering="text")
    prompt = read_jsonl(named / "predictions.jsonl")[0]["prompt"]
    assert prompt.startswith("The movie review is")


def test_of_several_templates_one_is_named(asked, runs, tmp_path):
    several = shutil.copytree(asked, tmp_path / "several")
    (several / "templates").mkdir()
    for name in ("one", "two"):
        shutil.copy(several / "template.yaml", several / "templates" / f"{name}.yaml")
    (several / "template.yaml").unlink()
    run = runs(icl_eval, adapter=several, model_name_or_path=None, shots=0, max_length=512)
    with pytest.raises(UserError, match=r"was trained on one, two; pass --template"):
        run()
    assert run(template=several / "templates" / "two.yaml")


def test_an_adapter_with_added_tokens_is_loaded_as_it_was_trained(runs, causal_model, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(causal_model)
    tokenizer = AutoTokenizer.from_pretrained(causal_model)
    tokenizer.add_tokens(["film", "dull"])
    model.resize_token_embeddings(len(tokenizer))
    lora = LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    get_peft_model(model, lora).save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    run = runs(icl_eval, adapter=tmp_path / "adapter", model_name_or_path=None, max_length=512)
    assert read_json(run(shots=0) / "metrics.json")["eval_rows"] == 6
    loaded = load_tuned(tmp_path / "adapter", {})
    assert torch.allclose(logits(loaded), logits(model), atol=1e-6)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"num_hidden_layers": 1}, "it adapts model.layers.1, which the model does not have"),
        ({"num_hidden_layers": 3}, "Found missing adapter keys"),
        ({"hidden_size": 48}, "size mismatch for "),
    ],
)
def test_an_adapter_of_another_model_is_one_line(other, said, causal_model, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(causal_model)
    get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"does not fit the model .*{said}") as caught:
        with_adapter(tiny_llama(287, **other), tmp_path)
    assert "\n" not in str(caught.value)
