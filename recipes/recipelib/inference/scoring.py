"""The likelihood of answers: tokens that prompts share are computed once, what is left is packed
without padding (see `token_tree.py`).

Models that cannot do that, such as those with sliding windows, compute whole prompts in padded
batches. Of several processes each computes a share, and every process gets all results in the order
of the requests. Where memory runs out, batches become smaller; no request is lost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch.nn.utils.rnn import pad_sequence

from recipelib.encoding import Cloze
from recipelib.inference.cut_model import CutModel
from recipelib.inference.journal import Journal
from recipelib.inference.lockstep import Lockstep, OutOfMemory, gather_results, own_share
from recipelib.inference.shared_cache import KeptBeginning, can_share
from recipelib.inference.token_tree import Pass, Tree, plan_passes
from recipelib.runtime import UserError, progress_bar

Ids = Sequence[int]
Request = tuple[Ids, Sequence[Ids]]  # a prompt, and its continuations

# On a CPU larger passes gain nothing, and the cost of attention grows with them.
CPU_PASS_TOKENS = 512


@torch.no_grad()  # not inference_mode: what FSDP gathers meanwhile is trained afterwards
def log_likelihoods(
    model,
    requests: Sequence[Request],
    *,
    batch_tokens: int = 4096,
    description: str | None = None,
    journal: Journal | None = None,
) -> list[list[float]]:
    """The log-probability (nats, summed over tokens) of each continuation of each prompt.

    Args:
        requests: a prompt's ids, at least one, and the ids of its continuations. What continuations
            share is computed once, and their last tokens are never computed.
        batch_tokens: tokens in one forward pass at most.
        description: of the progress bar; None for no bar.
        journal: where results are kept as they come, for a later run to find.
    Raises:
        UserError: a single request does not fit into memory.
    """
    if not requests:
        return []
    if isinstance(model, CutModel):
        return model.log_likelihoods(requests, batch_tokens=batch_tokens, description=description)
    run = Lockstep(model)
    if can_share(run):
        if run.device.type == "cpu":
            batch_tokens = min(batch_tokens, CPU_PASS_TOKENS)
        compute = KeptScorer(run, batch_tokens).score
        results = run_passes(
            run, requests, _shared_plan, compute, batch_tokens, description, journal
        )
        return [results[index] for index in range(len(requests))]
    split, places = split_requests(requests)
    compute = WholeScorer(run).score
    results = run_passes(run, split, _whole_plan, compute, batch_tokens, description, journal)
    return join_scores(requests, places, results)


def run_passes(
    run: Lockstep,
    requests: Sequence,
    plan: Callable[[Sequence, int], list[Pass]],
    compute: Callable[[Sequence, Pass], list],
    budget: int,
    description: str | None,
    journal: Journal | None,
) -> dict[int, list]:
    """The results of all requests, by index. This process computes its share, retries in smaller
    passes when one runs out of memory, and gets the results of the other processes too.

    Passes are planned over all requests, and those whose results the journal has are skipped. So a
    run that is resumed computes the same passes as an uninterrupted one.
    """
    known = {} if journal is None else journal.load(requests)
    passes = [pass_ for pass_ in plan(requests, budget) if not set(pass_.members) <= known.keys()]
    waiting = own_share(passes, lambda pass_: pass_.tokens)[::-1]
    total = sum(len(pass_.members) for pass_ in waiting)
    results: dict[int, list] = {}
    with run, progress_bar(description, total) as bar:
        while waiting:
            pass_ = waiting.pop()
            asked = [requests[index] for index in pass_.members]
            try:
                computed = compute(asked, pass_)
            except OutOfMemory:
                budget = max(1, min(budget, pass_.tokens) // 2)
                rest = [index for later in (pass_, *waiting[::-1]) for index in later.members]
                smaller = plan([requests[index] for index in rest], budget)
                waiting = [
                    Pass(tuple(rest[at] for at in planned.members), planned.kept, planned.tokens)
                    for planned in smaller[::-1]
                ]
                if pass_ in waiting:
                    raise UserError(
                        f"out of memory with a single row of {pass_.tokens + pass_.kept:,} tokens; "
                        "lower --max_length, or take a smaller model or more processes under FSDP"
                    ) from None
                continue
            results.update(zip(pass_.members, computed, strict=True))
            if journal is not None:
                journal.add(asked, computed)
            bar.update(len(asked))
    return {**known, **gather_results(results)}


def _shared_plan(requests: Sequence[Request], budget: int) -> list[Pass]:
    extra = []
    for _, continuations in requests:
        tree = Tree()
        for continuation in continuations:
            tree.add(continuation[:-1])
        extra.append(len(tree.ids))
    return plan_passes([list(prompt) for prompt, _ in requests], extra, budget)


class KeptScorer:
    """Scores requests after a beginning that they share."""

    def __init__(self, run: Lockstep, budget: int):
        self.kept = KeptBeginning(run, budget)

    def score(self, requests: Sequence[Request], pass_: Pass) -> list[list[float]]:
        """The log-likelihoods of the continuations of each request of a pass."""
        self.kept.hold(requests[0][0][: pass_.kept])
        tree, wanted = Tree(), []
        for prompt, continuations in requests:
            path = tree.add(list(prompt[pass_.kept :]))
            for continuation in continuations:
                places = [path[-1], *tree.add(continuation[:-1], path[-1])]
                wanted.append(list(zip(places, continuation, strict=True)))
        read = sorted({place for pairs in wanted for place, _ in pairs})
        row = {place: number for number, place in enumerate(read)}
        logits = self.kept.over(tree, read)
        wanted = [[(row[place], token) for place, token in pairs] for pairs in wanted]
        return _sums(logits, wanted, requests)


def _sums(
    logits: torch.Tensor, wanted: Sequence[list[tuple[int, int]]], requests: Sequence[Request]
) -> list[list[float]]:
    """Log-probabilities of (row of the logits, token), summed over each continuation's pairs.

    Returns:
        For each request the sums of its continuations.
    """
    flat = [pair for pairs in wanted for pair in pairs]
    rows, tokens = (torch.tensor(ids, device=logits.device) for ids in zip(*flat, strict=True))
    # Each row's normalizer once, a few rows at a time: a second copy of all logits may not fit.
    normalizers = torch.cat([chunk.float().logsumexp(-1) for chunk in logits.split(64)])
    values = iter((logits[rows, tokens].float() - normalizers[rows]).tolist())
    sums = iter([sum(next(values) for _ in pairs) for pairs in wanted])
    return [[next(sums) for _ in continuations] for _, continuations in requests]


# Whole prompts ------------------------------------------------------------------------------------


def split_requests(
    requests: Sequence[Request],
) -> tuple[list[Request], list[list[tuple[int, int]]]]:
    """Requests whose continuations differ in their last token only, and where their scores belong:
    (number of the request, place among its continuations).
    """
    split: list[Request] = []
    places: list[list[tuple[int, int]]] = []
    for number, (prompt, continuations) in enumerate(requests):
        beginnings: dict[Ids, list[int]] = {}
        for place, continuation in enumerate(continuations):
            beginnings.setdefault(tuple(continuation[:-1]), []).append(place)
        for members in beginnings.values():
            split.append((prompt, [continuations[place] for place in members]))
            places.append([(number, place) for place in members])
    return split, places


def join_scores(
    requests: Sequence[Request],
    places: Sequence[list[tuple[int, int]]],
    results: Mapping[int, Sequence[float]],
) -> list[list[float]]:
    """The scores of requests from those of the parts that `split_requests` made of them."""
    scores = [[0.0] * len(continuations) for _, continuations in requests]
    for index, members in enumerate(places):
        for (number, place), value in zip(members, results[index], strict=True):
            scores[number][place] = value
    return scores


def _whole_plan(requests: Sequence[Request], budget: int) -> list[Pass]:
    lengths = [len(prompt) + len(continuations[0]) - 1 for prompt, continuations in requests]
    return plan_padded(lengths, budget)


def plan_padded(lengths: Sequence[int], budget: int) -> list[Pass]:
    """Batches of at most `budget` padded tokens (a longer row gets one of its own), longest rows
    first, so that a row that does not fit into memory fails at once.
    """
    passes: list[Pass] = []
    for index in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        members = passes[-1].members if passes else ()
        size = (len(members) + 1) * lengths[members[0]] if members else 0
        if members and size <= budget:
            passes[-1] = Pass((*members, index), 0, size)
        else:
            passes.append(Pass((index,), 0, lengths[index]))
    return passes


def padded(
    rows: Sequence[Ids], device: torch.device, side: str = "right"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and attention mask, [rows, width], of rows padded on one side."""
    tensors = [torch.tensor(row) for row in rows]
    ids = pad_sequence(tensors, batch_first=True, padding_side=side)
    mask = [torch.ones_like(row) for row in tensors]
    mask = pad_sequence(mask, batch_first=True, padding_side=side)
    return ids.to(device), mask.to(device)


class WholeScorer:
    """Scores requests, whose continuations differ in their last tokens only, in a padded batch."""

    def __init__(self, run: Lockstep):
        self.run = run
        config = getattr(run.model, "active_peft_config", None)
        # Soft prompts stand in front: columns are counted from the end.
        self._prompted = getattr(config, "is_prompt_learning", False)

    def score(self, requests: Sequence[Request], pass_: Pass) -> list[list[float]]:
        """The log-likelihoods of the continuations of each request of a pass."""
        rows = [[*prompt, *continuations[0][:-1]] for prompt, continuations in requests]
        ids, mask = padded(rows, self.run.device)
        width = ids.shape[1]
        places = [
            (number, column)
            for number, (prompt, _) in enumerate(requests)
            for column in range(len(prompt) - 1, len(rows[number]))
        ]
        # Only columns that predict a token of an answer go through the head.
        columns = sorted({column for _, column in places})
        device = self.run.device
        keep = {} if self._prompted else {"logits_to_keep": torch.tensor(columns, device=device)}
        logits = self.run(input_ids=ids, attention_mask=mask, use_cache=False, **keep).logits
        if logits.shape[1] != len(columns):  # a model that does not know logits_to_keep
            logits = logits[:, -width:][:, columns]
        where = {column: number for number, column in enumerate(columns)}
        logits = logits[[row for row, _ in places], [where[column] for _, column in places]]
        picked = {place: number for number, place in enumerate(places)}
        wanted = [
            [
                (picked[number, len(prompt) - 1 + step], token)
                for step, token in enumerate(continuation)
            ]
            for number, (prompt, continuations) in enumerate(requests)
            for continuation in continuations
        ]
        return _sums(logits, wanted, requests)


@torch.no_grad()  # not inference_mode: what FSDP gathers meanwhile is trained afterwards
def masked_log_likelihoods(
    model,
    clozes: Sequence[Cloze],
    *,
    batch_tokens: int = 4096,
    description: str | None = None,
    journal: Journal | None = None,
) -> list[list[float]]:
    """The log-probability (nats, summed over tokens) of each word of each cloze.

    Args:
        batch_tokens: tokens in one forward pass at most, padding included.
        description, journal: as in `scoring.log_likelihoods`.
    Raises:
        UserError: a single cloze does not fit into memory.
    """
    # What is computed: each cloze with each distinct beginning of its words filled in.
    steps: list[tuple[list[int], int, list[int]]] = []  # ids, the mask to read, tokens asked
    places: list[list[tuple[int, int]]] = []  # (cloze, word) of each token asked
    for number, cloze in enumerate(clozes):
        filled: dict[tuple[int, ...], list[tuple[int, int]]] = {}
        for place, word in enumerate(cloze.words):
            for length, token in enumerate(word):
                filled.setdefault(tuple(word[:length]), []).append((place, token))
        for beginning, asked in filled.items():
            ids = list(cloze.ids)
            for mask, token in zip(cloze.masks, beginning, strict=False):
                ids[mask] = token
            steps.append((ids, cloze.masks[len(beginning)], [token for _, token in asked]))
            places.append([(number, place) for place, _ in asked])

    run = Lockstep(model)
    if run.device.type == "cpu":
        batch_tokens = min(batch_tokens, CPU_PASS_TOKENS)

    def compute(steps: Sequence, pass_: Pass) -> list[list[float]]:
        ids, mask = padded([row for row, _, _ in steps], run.device)
        logits = run(input_ids=ids, attention_mask=mask).logits
        # The last columns: a soft prompt stands in front.
        read = [logits.shape[1] - ids.shape[1] + place for _, place, _ in steps]
        log_probs = logits[list(range(len(steps))), read].float().log_softmax(-1)
        return [row[tokens].tolist() for row, (_, _, tokens) in zip(log_probs, steps, strict=True)]

    def plan(steps: Sequence, budget: int) -> list[Pass]:
        return plan_padded([len(ids) for ids, _, _ in steps], budget)

    results = run_passes(run, steps, plan, compute, batch_tokens, description, journal)
    sums = [[0.0] * len(cloze.words) for cloze in clozes]
    for index, members in enumerate(places):
        for (number, place), value in zip(members, results[index], strict=True):
            sums[number][place] += value
    return sums
