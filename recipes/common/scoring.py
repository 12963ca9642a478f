"""The likelihood of answers, and answers written, in batches of a token budget.

Under several processes each takes every n-th batch, all make equally many forward passes (a sharded
model would wait for ever otherwise), and every process gets all results in the order of the
requests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

Progress = Callable[[Iterable], Iterable]


def _batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices in batches of at most `budget` padded tokens (at least one each), longest first so
    that a batch that does not fit into memory fails at once.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda one: (-lengths[one], one)):
        width = lengths[batches[-1][0]] if batches else 0
        if batches and (len(batches[-1]) + 1) * width <= budget:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def _across_processes(
    batches: list[list[int]], run: Callable[[list[int]], list], progress: Progress
) -> dict[int, object]:
    """The results of all batches by index, each batch run by one process."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    rank = torch.distributed.get_rank() if distributed else 0
    world = torch.distributed.get_world_size() if distributed else 1
    results: dict[int, object] = {}
    for start in progress(range(0, len(batches), world)):
        batch = batches[min(start + rank, len(batches) - 1)]  # without one left: a dummy
        results.update(zip(batch, run(batch), strict=True))
    if not distributed:
        return results
    gathered: list = [None] * world
    torch.distributed.all_gather_object(gathered, results)
    return {index: value for part in gathered for index, value in part.items()}


@torch.no_grad()  # not inference_mode: what FSDP gathers meanwhile is trained afterwards
def log_likelihoods(
    model,
    requests: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]],
    *,
    batch_tokens: int = 4096,
    progress: Progress = iter,
) -> list[list[float]]:
    """The log-probability (nats, summed over tokens) of each continuation of each prompt.

    Args:
        requests: a prompt's ids, at least one, and the ids of its continuations. Continuations that
            differ in their last token only share one forward pass.
        batch_tokens: tokens, padding included, in one forward pass.
    """
    # What must be computed: each prompt with each distinct beginning of its continuations.
    rows: list[list[int]] = []
    # For each of these: its request, the prompt's length, and the continuations it serves.
    parts: list[tuple[int, int, list[tuple[int, Sequence[int]]]]] = []
    for number, (prompt, continuations) in enumerate(requests):
        beginnings: dict[tuple[int, ...], list[tuple[int, Sequence[int]]]] = {}
        for place, continuation in enumerate(continuations):
            beginnings.setdefault(tuple(continuation[:-1]), []).append((place, continuation))
        for beginning, members in beginnings.items():
            rows.append([*prompt, *beginning])
            parts.append((number, len(prompt), members))
    device = next(model.parameters()).device

    def run(batch: list[int]) -> list[list[tuple[int, int, float]]]:
        width = max(len(rows[index]) for index in batch)
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        mask = torch.zeros(len(batch), width, dtype=torch.long)
        wanted: list[tuple[int, int]] = []
        for place, index in enumerate(batch):
            ids[place, : len(rows[index])] = torch.tensor(rows[index])
            mask[place, : len(rows[index])] = 1
            wanted += [(place, column) for column in range(parts[index][1] - 1, len(rows[index]))]
        # Only columns from which an answer's token is predicted go through the head.
        columns = sorted({column for _, column in wanted})
        logits = model(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            logits_to_keep=torch.tensor(columns, device=device),
            use_cache=False,
        ).logits
        if logits.shape[1] != len(columns):  # a model that does not know logits_to_keep
            logits = logits[:, columns]
        where = {column: place for place, column in enumerate(columns)}
        picked = logits[[p for p, _ in wanted], [where[c] for _, c in wanted]].float()
        log_probs = dict(zip(wanted, picked.log_softmax(-1), strict=True))
        results = []
        for place, index in enumerate(batch):
            number, start, members = parts[index]
            scores = []
            for order, continuation in members:
                total = sum(
                    log_probs[place, start - 1 + offset][token].item()
                    for offset, token in enumerate(continuation)
                )
                scores.append((number, order, float(total)))
            results.append(scores)
        return results

    found = _across_processes(_batches([len(row) for row in rows], batch_tokens), run, progress)
    scores = [[0.0] * len(continuations) for _, continuations in requests]
    for results in found.values():
        for number, order, value in results:
            scores[number][order] = value
    return scores


@torch.no_grad()  # not inference_mode: what FSDP gathers meanwhile is trained afterwards
def generate(
    model,
    tokenizer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    end_ids: Iterable[int],
    stop: Sequence[str] = (),
    batch_tokens: int = 4096,
    progress: Progress = iter,
) -> list[str]:
    """What the model writes greedily after each prompt, without the end marker.

    Args:
        end_ids: tokens that end an answer, beside those of the model's generation config.
        stop: texts that end an answer too; what follows them may still be in the result.
    """
    device = next(model.parameters()).device
    configured = model.generation_config.eos_token_id
    ends = set(end_ids) | set(configured if isinstance(configured, list) else [configured]) - {None}
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()

    def run(batch: list[int]) -> list[str]:
        width = max(len(prompts[index]) for index in batch)
        ids = torch.full((len(batch), width), tokenizer.pad_token_id)
        mask = torch.zeros(len(batch), width, dtype=torch.long)
        for place, index in enumerate(batch):  # padded on the left: all answers begin in one column
            ids[place, width - len(prompts[index]) :] = torch.tensor(prompts[index])
            mask[place, width - len(prompts[index]) :] = 1
        written = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            eos_token_id=sorted(ends),
            pad_token_id=tokenizer.pad_token_id,
            stop_strings=list(stop) or None,
            tokenizer=tokenizer if stop else None,
            synced_gpus=distributed,
        )[:, width:]
        texts = []
        for row in written.tolist():
            length = next((place for place, token in enumerate(row) if token in ends), len(row))
            texts.append(tokenizer.decode(row[:length], skip_special_tokens=True))
        return texts

    lengths = [len(prompt) + max_new_tokens for prompt in prompts]
    found = _across_processes(_batches(lengths, batch_tokens), run, progress)
    return [found[index] for index in range(len(prompts))]
