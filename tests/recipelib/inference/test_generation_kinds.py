"""Models that attend in ways of their own, and adapters that put tokens in front, write what a
plain loop over single prompts writes.
"""

import pytest
import torch
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from tiny_models import LLAMA_LIKE, MODELS, TOKENIZER, tiny, tiny_llama, with_opinions

from recipelib.inference.generation import generate
from recipelib.inference.lockstep import Lockstep
from recipelib.inference.row_cache import rows_fit
from recipelib.inference.scoring import log_likelihoods
from recipelib.inference.shared_cache import can_share

SHARED = [9, 40, 12, 33] * 6
PROMPTS = [[5] * 3, [7, 300, 12, 9], [50], list(range(40, 60)), [300, 7], [9, 200, 31], [50]]
FALCON = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
KINDS = {
    "falcon": lambda: tiny("falcon", **FALCON),
    "falcon with ALiBi": lambda: tiny(
        "falcon", alibi=True, multi_query=False, bias=True, parallel_attn=False, **FALCON
    ),
    "diffllama": lambda: tiny("diffllama", **LLAMA_LIKE),
    "phi3, longrope": lambda: tiny(
        "phi3",
        original_max_position_embeddings=32,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0] * 4,
            "long_factor": [4.0] * 4,
        },
        pad_token_id=0,
        **{key: value for key, value in LLAMA_LIKE.items() if key != "head_dim"},
    ),
    "llama, dynamic": lambda: tiny(
        "llama",
        rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
        **{**LLAMA_LIKE, "max_position_embeddings": 30},
    ),
}


def texts(model, prompts, **options) -> list[str]:
    found = generate(model, TOKENIZER, prompts, max_new_tokens=8, end_ids=[], **options)
    return [one.text for (one,) in found]


@torch.no_grad()
def plain(model, prompts) -> list[str]:
    written = []
    for prompt in prompts:
        row = list(prompt)
        for _ in range(8):
            logits = model(input_ids=torch.tensor([row]), use_cache=False).logits
            row.append(logits[0, -1].argmax().item())
        written.append(TOKENIZER.decode(row[len(prompt) :], skip_special_tokens=True))
    return written


@pytest.mark.parametrize("kind", KINDS)
def test_attention_of_its_own_is_not_taken_for_transformers(kind):
    model = with_opinions(KINDS[kind]())
    prompts = [SHARED + prompt for prompt in PROMPTS]
    # Where positions depend on the longest text of a pass, each is computed alone; and what is
    # written, with a cache, depends on how long the text was when.
    options = {"batch_tokens": 1} if "," in kind else {}
    if not options:
        expected = plain(model, prompts)
        assert len(set(expected)) > 3
        assert texts(model, prompts) == expected
    requests = [(prompt, [[7, 8]]) for prompt in prompts]
    with torch.no_grad():
        whole = [
            model(input_ids=torch.tensor([[*prompt, 7]]), use_cache=False).logits[0].log_softmax(-1)
            for prompt in prompts
        ]
    wanted = [(one[-2, 7] + one[-1, 8]).item() for one in whole]
    found = log_likelihoods(model, requests, **{"batch_tokens": 4096, **options})
    assert [value for (value,) in found] == pytest.approx(wanted, abs=1e-3)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_the_usual_kinds_write_in_rows(name):
    run = Lockstep(MODELS[name])
    assert can_share(run)
    assert rows_fit(run)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("method", [PromptTuningConfig, PrefixTuningConfig])
def test_with_a_soft_prompt_or_prefix_it_writes_what_peft_writes(kind, method):
    base = (
        tiny_llama(len(TOKENIZER))
        if kind == "llama"
        else tiny("gpt2", n_positions=128, n_embd=32, n_layer=2, n_head=4)
    )
    config = method(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = get_peft_model(with_opinions(base), config).eval()
    with torch.no_grad():
        for weight in model.prompt_encoder.parameters():
            weight.normal_()
    expected = plain(model, PROMPTS)
    assert expected != plain(base, PROMPTS)
    assert texts(model, PROMPTS) == expected
    ids = torch.tensor([PROMPTS[3]])
    mask = torch.ones_like(ids)
    own = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
    own = TOKENIZER.decode(own[0, ids.shape[1] :], skip_special_tokens=True)
    assert expected[3] == own
