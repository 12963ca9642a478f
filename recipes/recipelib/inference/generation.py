"""Answers written by a model: what prompts share is computed once, samples of one prompt share it,
and rows that are done drop out.

The tokens of all prompts stand in one tree of keys and values (see `shared_cache.py`); each step
adds a token per row. Models that cannot do that write after whole prompts in padded batches.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from transformers import DynamicCache

from recipelib.inference.journal import Journal
from recipelib.inference.lockstep import Lockstep
from recipelib.inference.row_cache import RowCache, rows_fit
from recipelib.inference.scoring import padded, plan_padded, run_passes
from recipelib.inference.shared_cache import (
    KeptBeginning,
    SharedCache,
    can_share,
    forward_parameters,
    is_prompted,
)
from recipelib.inference.token_tree import Pass, Tree, plan_passes

Ids = Sequence[int]


class Written(NamedTuple):
    """What was written after a prompt, without the end marker, and its log-probability (nats), end
    marker included.
    """

    text: str
    log_likelihood: float


@torch.no_grad()  # not inference_mode: what FSDP gathers meanwhile is trained afterwards
def generate(
    model,
    tokenizer,
    prompts: Sequence[Ids],
    *,
    max_new_tokens: int,
    end_ids: Iterable[int],
    stop: Sequence[str] = (),
    samples: int = 1,
    temperature: float = 0.0,
    seed: int = 0,
    first: int = 0,
    batch_tokens: int = 4096,
    description: str | None = None,
    journal: Journal | None = None,
) -> list[list[Written]]:
    """What the model writes after each prompt.

    Args:
        end_ids: tokens that end an answer, beside those of the model's generation config.
        stop: texts that end an answer too. The result has them, and may have a little after.
        samples: how many answers per prompt.
        temperature: 0 takes the likeliest token. Otherwise tokens are drawn; each row has random
            numbers of its own, so what is written beside it changes nothing.
        seed: of the draws.
        first: the number of the first prompt, on which its draws depend.
        batch_tokens: tokens of the prompts and answers that are written side by side, at most.
        description, journal: as in `scoring.log_likelihoods`.

    Returns:
        The samples of each prompt.
    Raises:
        UserError: a single prompt and its answers do not fit into memory.
    """
    configured = model.generation_config.eos_token_id
    ends = set(end_ids) | set(configured if isinstance(configured, list) else [configured]) - {None}
    how = Manner(tokenizer, max_new_tokens, ends, tuple(stop), samples, temperature, seed)
    # A prompt's number is part of the request, since the draws depend on it.
    requests = [(number, list(prompt)) for number, prompt in enumerate(prompts, first)]
    if not prompts:
        return []
    run = Lockstep(model)
    writer = KeptWriter(run, how, batch_tokens) if can_share(run) else WholeWriter(run, how)
    if journal is not None:
        journal = journal.within(how.identity())
    results = run_passes(
        run, requests, writer.plan, writer.write, batch_tokens, description, journal
    )
    return [[Written(*sample) for sample in results[index]] for index in range(len(prompts))]


@dataclass(frozen=True)
class Manner:
    """How answers are written; the fields are arguments of `generate`."""

    tokenizer: object
    max_new_tokens: int
    ends: set[int]
    stop: tuple[str, ...]
    samples: int
    temperature: float
    seed: int

    def identity(self) -> dict:
        """The fields that decide the result."""
        names = ("max_new_tokens", "stop", "samples", "temperature", "seed")
        return {**{name: getattr(self, name) for name in names}, "ends": sorted(self.ends)}

    def choose(self, logits: torch.Tensor, rows: Sequence[Row]) -> list[tuple[int, float]]:
        """The next token of each row and its log-probability, from [rows, vocabulary] logits."""
        logits = logits.float()
        log_probs = logits.log_softmax(-1)
        if self.temperature:
            sums = (logits / self.temperature).softmax(-1).double().cumsum(-1)
            points = torch.tensor([row.draw.random() for row in rows], device=logits.device)
            points = points.double()[:, None] * sums[:, -1:]
            tokens = (sums <= points).sum(-1).clamp(max=logits.shape[-1] - 1)
        else:
            tokens = logits.argmax(-1)
        values = log_probs.gather(-1, tokens[:, None])[:, 0]
        return list(zip(tokens.tolist(), values.tolist(), strict=True))


@dataclass
class Row:
    """An answer that is being written."""

    number: int  # of its prompt
    sample: int
    how: Manner
    ids: list[int] = field(default_factory=list)
    log_likelihood: float = 0.0
    done: bool = False

    def __post_init__(self):
        self.draw = random.Random(f"{self.how.seed}-{self.number}-{self.sample}")

    @property
    def text(self) -> str:
        """What is written so far."""
        return self.how.tokenizer.decode(self.ids, skip_special_tokens=True)

    def add(self, token: int, log_prob: float) -> None:
        """Take the next token, which may end the answer."""
        self.log_likelihood += log_prob
        if token in self.how.ends:
            self.done = True
            return
        self.ids.append(token)
        self.done = len(self.ids) == self.how.max_new_tokens or (
            bool(self.how.stop) and any(stop in self.text for stop in self.how.stop)
        )


def _results(rows: Sequence[Row], samples: int) -> list[list[Written]]:
    written = [Written(row.text, row.log_likelihood) for row in rows]
    return [written[start : start + samples] for start in range(0, len(written), samples)]


class KeptWriter:
    """Writes after a beginning that prompts share, all rows in one tree of tokens."""

    def __init__(self, run: Lockstep, how: Manner, budget: int):
        self.kept, self.how = KeptBeginning(run, budget), how

    def plan(self, requests: Sequence[tuple[int, list[int]]], budget: int) -> list[Pass]:
        """What is written side by side."""
        # A quarter of the longest answers: a written token leaves only keys and values, and few
        # answers become that long.
        room = -(-self.how.samples * self.how.max_new_tokens // 4)
        return plan_passes([ids for _, ids in requests], [room] * len(requests), budget)

    def write(self, requests: Sequence[tuple[int, list[int]]], pass_: Pass) -> list[list[Written]]:
        """The samples of each request of a pass."""
        cache, there = self.kept.cache, pass_.kept
        self.kept.hold(requests[0][1][:there])
        try:
            return self._write(requests, there)
        finally:
            cache.forget(cache.length - there)

    def _write(self, requests, there: int) -> list[list[Written]]:
        cache, how = self.kept.cache, self.how
        tree = Tree()
        ends = [tree.add(ids[there:])[-1] for _, ids in requests]
        sees = tree.visible(there)
        positions = [there + depth for depth in tree.depths]
        read = sorted(set(ends))
        logits = cache.feed(tree.ids, positions, sees, read)
        rows, first = [], []
        for (number, _), end in zip(requests, ends, strict=True):
            for sample in range(how.samples):
                rows.append(Row(number, sample, how))
                first.append(end)
        logits = logits[[read.index(end) for end in first]]
        places = [positions[end] for end in first]
        in_rows = cache.plain and rows_fit(self.kept.cache.run)
        steps = (RowCache if in_rows else LineOfRows)(cache, sees[first])
        writing = rows
        while True:
            for row, (token, log_prob) in zip(writing, how.choose(logits, writing), strict=True):
                row.add(token, log_prob)
            going = [at for at, row in enumerate(writing) if not row.done]
            if not going:
                return _results(rows, how.samples)
            if len(going) < len(writing):
                going = steps.select(going)
                writing = [writing[at] for at in going]
            places = [places[at] + 1 for at in going]
            logits = steps.feed([row.ids[-1] for row in writing], places)


class LineOfRows:
    """Does what `RowCache` does, in the line of tokens of the KV cache itself: on GPUs, and where
    `TreeAttention` does not compute the attention.
    """

    def __init__(self, cache: SharedCache, visible: torch.Tensor):
        self._cache, self._sees = cache, visible

    def feed(self, tokens: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
        """Add one token to each row: [rows, vocabulary] logits of the token that follows."""
        size = len(tokens)
        self._sees = torch.cat([self._sees, torch.eye(size, dtype=torch.bool)], 1)
        return self._cache.feed(tokens, positions, self._sees, list(range(size)))

    def select(self, rows: list[int]) -> list[int]:
        """Keep these rows; the tokens of the others go once they are most of what is kept."""
        self._sees = self._sees[rows]
        used = self._sees.any(0)
        if 2 * int(used.sum()) < len(used):
            self._cache.select(used.nonzero().flatten())
            self._sees = self._sees[:, used]
        return rows


class WholeWriter:
    """Writes after whole prompts in padded batches, with transformers' KV cache if the model takes
    one.
    """

    def __init__(self, run: Lockstep, how: Manner):
        self.run, self.how = run, how
        self._known = forward_parameters(run.model)
        # With a soft prompt or a prefix, PEFT puts its tokens in front in every pass.
        self._cached = {"past_key_values", "attention_mask"} <= self._known and not is_prompted(
            run.model
        )

    def plan(self, requests: Sequence[tuple[int, list[int]]], budget: int) -> list[Pass]:
        """What is written side by side."""
        lengths = [len(ids) + self.how.max_new_tokens for _, ids in requests]
        return plan_padded(lengths, max(1, budget // self.how.samples))

    def write(self, requests: Sequence[tuple[int, list[int]]], pass_: Pass) -> list[list[Written]]:
        """The samples of each request of a batch."""
        samples = range(self.how.samples)
        rows = [Row(number, sample, self.how) for number, _ in requests for sample in samples]
        prompts = [ids for _, ids in requests for _ in samples]
        logits = self._begin(prompts) if self._cached else self._whole(prompts)
        while True:
            for row, (token, log_prob) in zip(rows, self.how.choose(logits, rows), strict=True):
                if not row.done:
                    row.add(token, log_prob)
            if all(row.done for row in rows):
                return _results(rows, self.how.samples)
            if self._cached:  # rows that are done are given any token
                logits = self._step([row.ids[-1] if row.ids else 0 for row in rows])
            else:
                texts = [[*ids, *row.ids] for ids, row in zip(prompts, rows, strict=True)]
                logits = self._whole(texts)

    def _begin(self, prompts: Sequence[list[int]]) -> torch.Tensor:
        """Logits after prompts, padded on the left so that all answers begin in one column."""
        ids, self._mask = padded(prompts, self.run.device, "left")
        self._cache = DynamicCache(config=self.run.model.config)
        return self._feed(ids)

    def _step(self, tokens: list[int]) -> torch.Tensor:
        """Logits after one more token of each row."""
        self._mask = torch.cat([self._mask, torch.ones_like(self._mask[:, :1])], 1)
        return self._feed(torch.tensor(tokens, device=self.run.device)[:, None])

    def _feed(self, ids: torch.Tensor) -> torch.Tensor:
        more = {}
        if "position_ids" in self._known:
            positions = (self._mask.cumsum(-1) - 1).clamp(min=0)
            more["position_ids"] = positions[:, -ids.shape[1] :]
        if "logits_to_keep" in self._known:
            more["logits_to_keep"] = 1
        return self.run(
            input_ids=ids,
            attention_mask=self._mask,
            past_key_values=self._cache,
            use_cache=True,
            **more,
        ).logits[:, -1]

    def _whole(self, texts: Sequence[list[int]]) -> torch.Tensor:
        """Logits after texts, padded on the right, where padding changes nothing in any model."""
        ids, _ = padded(texts, self.run.device)
        logits = self.run(input_ids=ids, use_cache=False).logits
        before = logits.shape[1] - ids.shape[1]  # the places of a soft prompt
        return logits[range(len(texts)), [before + len(text) - 1 for text in texts]]
