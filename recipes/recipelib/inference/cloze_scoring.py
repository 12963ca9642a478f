"""How likely each label word is to fill the blank of a text, with gradients: the scores of prompt
tuning.

Only the states at the places that are read (see `blank_rows.py`) go through the model's head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F

from recipelib.encoding.cloze_rows import Example
from recipelib.inference.lockstep import Lockstep
from recipelib.inference.scoring import CPU_PASS_TOKENS, plan_padded, run_passes
from recipelib.inference.token_tree import Pass
from recipelib.models.head import bare_model, only_at


def collate(examples: Sequence[Example]) -> dict[str, torch.Tensor]:
    """A batch: the sequences of all rows, padded on the right so that nothing comes between a soft
    prompt and the text; the places that are read; and the right label of each row.

    Returns:
        `input_ids` and `attention_mask`, [sequences, width]; `places`, [places, 2] sequence and
        column of each place; `reads`, [n, 5] row, place, token, word, sign; `word_labels`, [words],
        which are the same for all rows; `labels`, [rows].
    """
    sequences: list[torch.Tensor] = []
    places: dict[tuple[int, int], int] = {}
    reads = []
    for row, example in enumerate(examples):
        for sequence, column, token, word, sign in example["reads"]:
            place = (len(sequences) + sequence, column)
            reads.append((row, places.setdefault(place, len(places)), token, word, sign))
        start = 0
        for length in example["lengths"]:
            sequences.append(torch.tensor(example["input_ids"][start : start + length]))
            start += length
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad(sequences, batch_first=True),
        "attention_mask": pad([torch.ones_like(one) for one in sequences], batch_first=True),
        "places": torch.tensor(list(places)),
        "reads": torch.tensor(reads),
        "word_labels": torch.tensor(examples[0]["word_labels"]),
        "labels": torch.tensor([example["labels"] for example in examples]),
    }


class SoftVerbalizer(torch.nn.Module):
    """A trained embedding for each label in place of the head's last layer (Hambardzumyan et al.
    2021, WARP, arXiv:2101.00121). It starts at the mean of the label's words.

    The model that it is put `into` has one "token" for each label: see `soft_requests`.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None):
        """For [labels, size] embeddings and [labels] biases."""
        super().__init__()
        self.weight = torch.nn.Parameter(weight)
        self.bias = None if bias is None else torch.nn.Parameter(bias)

    @classmethod
    def at_words(cls, model, words: Mapping[str, Sequence[Sequence[int]]]) -> SoftVerbalizer:
        """The one that training starts from.

        Args:
            words: label -> the ids of its words.
        """
        head = bare_model(model).get_output_embeddings()
        bias = getattr(head, "bias", None)
        return cls(
            _means(head.weight.detach(), words),
            None if bias is None else _means(bias.detach(), words),
        )

    def into(self, model) -> None:
        """Take the place of the last layer of a model's head, as its `soft_verbalizer`."""
        bare = bare_model(model)
        bare.soft_verbalizer = self.to(bare.device)
        bare.get_output_embeddings().forward = self.forward

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """[..., size] states -> [..., labels] logits."""
        return F.linear(states.to(self.weight.dtype), self.weight, self.bias)


def _means(rows: torch.Tensor, words: Mapping[str, Sequence[Sequence[int]]]) -> torch.Tensor:
    return torch.stack(
        [torch.stack([rows[list(ids)].mean(0) for ids in some]).mean(0) for some in words.values()]
    ).float()


def word_scores(
    model, batch: Mapping[str, torch.Tensor], run: Callable | None = None
) -> torch.Tensor:
    """The log-likelihood (nats) of each word in the blank of each row, with gradients.

    Args:
        batch: as `collate` gives it.
        run: what is called instead of the model, such as a `Lockstep`.

    Returns:
        [rows, words].
    """
    with only_at(model, batch["places"], batch["input_ids"].shape[1]):
        logits = (run or model)(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
        ).logits
    rows, places, tokens, words, signs = batch["reads"].T
    log_probs = logits[0].float().log_softmax(-1)[places, tokens] * signs
    scores = log_probs.new_zeros(len(batch["labels"]), len(batch["word_labels"]))
    return scores.index_put((rows, words), log_probs, accumulate=True)


@torch.no_grad()  # not inference_mode: what FSDP gathers meanwhile is trained afterwards
def score_examples(
    model,
    examples: Sequence[Example],
    *,
    batch_tokens: int = 4096,
    description: str | None = None,
) -> torch.Tensor:
    """The log-likelihood (nats) of each word in the blank of each row: [rows, words].

    Args:
        batch_tokens, description: as in `scoring.log_likelihoods`.
    Raises:
        UserError: a single row does not fit into memory.
    """
    run = Lockstep(model)
    if run.device.type == "cpu":
        batch_tokens = min(batch_tokens, CPU_PASS_TOKENS)

    def plan(some: Sequence[Example], budget: int) -> list[Pass]:
        sizes = [max(example["lengths"]) * len(example["lengths"]) for example in some]
        return plan_padded(sizes, budget)

    def compute(some: Sequence[Example], one: Pass) -> list[list[float]]:
        batch = {name: tensor.to(run.device) for name, tensor in collate(some).items()}
        return word_scores(model, batch, run).tolist()

    found = run_passes(run, examples, plan, compute, batch_tokens, description, None)
    return torch.tensor([found[index] for index in range(len(examples))])
