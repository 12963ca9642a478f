"""One side of `icl_vs_lm_eval.py`, in a process of its own: loads the model once, then answers
requests, one JSON line each, on standard input and output.

    python benchmarks/few_shot_arm.py ours MODEL_FOLDER 8
    PYTHON_WITH_LM_EVAL benchmarks/few_shot_arm.py lm_eval MODEL_FOLDER 8
    python benchmarks/few_shot_arm.py generate MODEL_FOLDER 8        # transformers' own

A request names a file with `prompts` and, for each of them, `choices`, or `max_new_tokens` and
`stop` where answers are to be written; a `template` and `rows` say the same as prompts and choices,
and ours takes them instead. The number is the batch size of lm-eval and of `generate`;
ours packs rows as they come.
"""

import json
import resource
import sys
import time
from pathlib import Path


def ours(folder: str, batch_size: int):
    """`recipelib.inference`, as `recipes/icl_eval.py` uses it."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "recipes"))
    import torch

    from recipelib.encoding import CausalAsker, PromptEncoder, TextEncoder
    from recipelib.evaluation import score_labels
    from recipelib.inference import generate, log_likelihoods
    from recipelib.models import load_pretrained, load_tokenizer
    from recipelib.prompts import PromptTemplate

    tokenizer = load_tokenizer(folder)
    model = load_pretrained(folder, dtype=torch.float32).eval()
    encoder = TextEncoder(tokenizer)
    computed = []  # tokens of each forward pass

    def count(module, args, kwargs):
        computed.append(kwargs["input_ids"].numel())

    model.register_forward_pre_hook(count, with_kwargs=True)

    def answer(case: dict) -> dict:
        computed.clear()
        if "template" in case:  # as a recipe scores rows with options of their own
            asker = CausalAsker(PromptEncoder(PromptTemplate(case["template"]), tokenizer, 2048))
            (scored,) = score_labels(model, asker, case["rows"], [None], all_scores=False).draws
            found = [[*record["scores"]["sum"].values()] for record in scored.records]
            return {"results": found, "tokens": sum(computed)}
        prompts = [encoder.text_prompt(text) for text in case["prompts"]]
        if "choices" not in case:
            written = generate(
                model,
                tokenizer,
                prompts,
                max_new_tokens=case["max_new_tokens"],
                end_ids=encoder.end,
                stop=case["stop"],
            )
            return {"results": [some[0].text for some in written], "tokens": sum(computed)}
        choices = [[encoder.continuation(text) for text in some] for some in case["choices"]]
        found = log_likelihoods(model, list(zip(prompts, choices, strict=True)))
        return {"results": found, "tokens": sum(computed)}

    def speed() -> float:
        """Tokens per second of a plain forward pass over 512 tokens."""
        ids = torch.arange(512)[None] % (model.config.vocab_size - 100) + 100
        with torch.no_grad():
            model(input_ids=ids, logits_to_keep=1, use_cache=False)
            start = time.perf_counter()
            for _ in range(3):
                model(input_ids=ids, logits_to_keep=1, use_cache=False)
        return 3 * 512 / (time.perf_counter() - start)

    return answer, speed


def lm_eval(folder: str, batch_size: int):
    """lm-eval's model on transformers, called as its tasks call it: all requests of all rows at
    once. At its defaults it already shares a pass among choices that differ in their last token
    only (`logits_cache`).
    """
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=folder, dtype="float32", device="cpu", batch_size=batch_size)

    def answer(case: dict) -> dict:
        requests = [
            Instance(
                request_type="loglikelihood",
                doc={},
                arguments=(prompt, choice),
                idx=number,
            )
            for prompt, some in zip(case["prompts"], case["choices"], strict=True)
            for number, choice in enumerate(some)
        ]
        found = iter(model.loglikelihood(requests, disable_tqdm=True))
        return {"results": [[next(found)[0] for _ in some] for some in case["choices"]]}

    return answer, None


def generate(folder: str, batch_size: int):
    """transformers' `generate` on whole prompts, in batches padded on the left."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def answer(case: dict) -> dict:
        # Rows of similar length side by side, as lm-eval orders them.
        order = sorted(range(len(case["prompts"])), key=lambda one: -len(case["prompts"][one]))
        texts: dict[int, str] = {}
        for start in range(0, len(order), batch_size):
            members = order[start : start + batch_size]
            inputs = tokenizer(
                [case["prompts"][one] for one in members],
                padding=True,
                return_tensors="pt",
                return_token_type_ids=False,
            )
            written = model.generate(
                **inputs,
                max_new_tokens=case["max_new_tokens"],
                do_sample=False,
                stop_strings=case["stop"] or None,
                tokenizer=tokenizer,
                pad_token_id=tokenizer.pad_token_id,
            )
            new = written[:, inputs["input_ids"].shape[1] :]
            texts |= zip(
                members, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True
            )
        return {"results": [texts[one] for one in range(len(order))]}

    return answer, None


SIDES = {"ours": ours, "lm_eval": lm_eval, "generate": generate}


def main() -> None:
    """Answer requests until standard input ends."""
    out = sys.stdout
    sys.stdout = sys.stderr  # whatever the libraries print
    side, folder, batch_size = sys.argv[1:]
    answer, speed = SIDES[side](folder, int(batch_size))
    unit = 1 if sys.platform == "darwin" else 1024
    loaded = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    print(json.dumps({"ready": True, "loaded_bytes": loaded}), file=out, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if request.get("speed"):
            print(json.dumps({"speed": speed()}), file=out, flush=True)
            continue
        case = json.loads(Path(request["case"]).read_text(encoding="utf-8"))
        start = time.perf_counter()
        found = answer(case)
        found["seconds"] = time.perf_counter() - start
        found["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        print(json.dumps(found), file=out, flush=True)


if __name__ == "__main__":
    main()
