"""Makes openprompt_verbalizer.json: what OpenPrompt 1.0.1 makes of given logits.

OpenPrompt needs transformers 4, so it runs in an environment of its own:

    python3.11 -m venv openprompt
    openprompt/bin/pip install --no-deps openprompt==1.0.1
    openprompt/bin/pip install torch==2.13.0 transformers==4.30.2 "numpy<2.3" yacs sentencepiece \
        tqdm datasets dill scikit-learn scipy rouge tensorboardX nltk
    openprompt/bin/python tests/golden/openprompt_verbalizer.py
"""

import json
from pathlib import Path

import torch
from openprompt.prompts import ManualVerbalizer

VOCABULARY = 20
CASES = {
    "one word per label": {"a": ["w3"], "b": ["w7"]},
    "several words": {"a": ["w3", "w4", "w5"], "b": ["w7", "w8", "w9"], "c": ["w11", "w12", "w13"]},
    "unequal numbers of words": {"a": ["w3"], "b": ["w7", "w8", "w19"], "c": ["w0", "w1"]},
}


class Tokenizer:
    """Of which a verbalizer asks only the ids of its words: each is one token, as it says."""

    def encode(self, word: str, add_special_tokens: bool = False) -> list[int]:
        """The number in a word's name."""
        return [int(word.strip().removeprefix("w"))]


if __name__ == "__main__":
    torch.manual_seed(0)
    found = {}
    for name, words in CASES.items():
        logits = 3 * torch.randn(5, VOCABULARY)
        content_free = 3 * torch.randn(VOCABULARY)
        verbalizer = ManualVerbalizer(Tokenizer(), classes=list(words), label_words=words)
        plain = verbalizer.process_logits(logits)
        verbalizer.register_calibrate_logits(content_free)
        found[name] = {
            "words": {label: [int(one[1:]) for one in some] for label, some in words.items()},
            "logits": logits.tolist(),
            "content_free": content_free.tolist(),
            "plain": plain.tolist(),
            "calibrated": verbalizer.process_logits(logits).tolist(),
        }
    path = Path(__file__).with_suffix(".json")
    path.write_text(json.dumps(found) + "\n")
    print(f"written: {path}")
