"""Features: the states of a text at one layer, or at all of them, pooled over its tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from recipelib.activations.folder import FEATURES, write_kept
from recipelib.activations.frozen import FrozenLayers
from recipelib.activations.layer_list import LayerList, ending_at
from recipelib.encoding import pad_texts
from recipelib.inference import (
    CPU_PASS_TOKENS,
    Lockstep,
    Pass,
    from_main_process,
    plan_padded,
    run_passes,
)
from recipelib.models import bare_model, logits_at
from recipelib.runtime import UserError, digest, is_main_process

# From states [rows, tokens, width] and a mask [rows, tokens, 1] to [rows, width].
POOLING: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "mean": lambda states, mask: (states * mask).sum(1) / mask.sum(1),
    "last": lambda states, mask: states[torch.arange(len(states)), mask.sum(1)[:, 0].long() - 1],
    "cls": lambda states, mask: states[:, 0],
    "max": lambda states, mask: states.masked_fill(mask == 0, -torch.inf).amax(1),
}


@torch.no_grad()  # not inference_mode: it does not go with FSDP
def pooled_states(
    model,
    layers: LayerList,
    texts: Sequence[Sequence[int]],
    pad: int,
    *,
    layer: int | None = None,
    pooling: str = "mean",
    batch_tokens: int = 4096,
    description: str | None = None,
) -> np.ndarray:
    """[layers, rows, width] float32 the pooled states of each text, in one forward pass.

    Args:
        layers: the model's, by `FrozenLayers.of`.
        texts: their token ids.
        pad: an id that the model can read.
        layer: how many layers the states have gone through, 0 for those of the embeddings; no
            further one is run. None: each number of layers, from none to all. They are taken before
            the model's last norm.
        pooling: a key of POOLING; "cls" is the first token.
        batch_tokens, description: as in `log_likelihoods`.
    Raises:
        UserError: a single text does not fit into memory, or a token has several states.
    """
    model.eval()
    run, pool = Lockstep(model), POOLING[pooling]
    if run.device.type == "cpu":
        batch_tokens = min(batch_tokens, CPU_PASS_TOKENS)
    depth = len(layers)
    wanted = range(depth + 1) if layer is None else [layer]
    head = bare_model(model).get_output_embeddings()
    place = torch.zeros(1, 2, dtype=torch.long, device=run.device)
    mask: torch.Tensor | None = None  # None in a pass that only keeps step with other processes
    found: dict[int, torch.Tensor] = {}

    def keep(number: int, states: torch.Tensor) -> None:
        if states.dim() != 3:
            raise UserError(
                "--mode features: the layers of this model hand on several states for each token; "
                "--mode freeze trains it"
            )
        if mask is not None:
            found[number] = pool(states.float(), mask).cpu()

    def enter(module, args: tuple, kwargs: dict) -> None:
        keep(0, args[0] if args else kwargs["hidden_states"])

    def leave(number: int):
        return lambda module, args, output: keep(
            number, output[0] if isinstance(output, tuple) else output
        )

    def plan(texts: Sequence[Sequence[int]], budget: int) -> list[Pass]:
        return plan_padded([len(text) for text in texts], budget)

    def compute(texts: Sequence[Sequence[int]], pass_: Pass) -> list[np.ndarray]:
        nonlocal mask
        batch = {name: tensor.to(run.device) for name, tensor in pad_texts(texts, pad).items()}
        mask = batch["attention_mask"][..., None].float()
        width = batch["input_ids"].shape[1]
        with logits_at(model, place, width) if head is not None else nullcontext():
            run(**batch, use_cache=False)
        mask = None
        return [*torch.stack([found[number] for number in wanted], 1).numpy()]

    with ExitStack() as stack:
        every = [*layers]
        if 0 in wanted:
            hook = every[0].register_forward_pre_hook(enter, with_kwargs=True)
            stack.callback(hook.remove)
        for number in wanted:
            if number:
                hook = every[number - 1].register_forward_hook(leave(number))
                stack.callback(hook.remove)
        if layer is not None and layer < depth:
            stack.enter_context(ending_at(layers, max(1, layer)))
        results = run_passes(run, texts, plan, compute, batch_tokens, description, None)
    return np.stack([results[index] for index in range(len(texts))], 1)


def kept_features(
    model,
    frozen: FrozenLayers,
    texts: Sequence[Sequence[int]],
    pad: int,
    root: Path | None,
    *,
    layer: int | None,
    pooling: str,
    **options,
) -> np.ndarray:
    """`pooled_states`, from the file in which an earlier run has kept them, if there is one.

    Args:
        frozen: all layers of the model.
        root: the folder of kept features; None to keep none.
    """
    options |= {"layer": layer, "pooling": pooling}
    if root is None:
        return pooled_states(model, frozen.layers, texts, pad, **options)
    ids = np.concatenate([np.asarray(text, dtype=np.int64) for text in texts])
    lengths = np.array([len(text) for text in texts])
    device = next(model.parameters()).device.type
    key = digest(frozen.key, device, layer, pooling, memoryview(ids), memoryview(lengths))
    path = root / f"{FEATURES}{key}.safetensors"
    kept = from_main_process(lambda: _read(path))
    if kept is None:
        kept = pooled_states(model, frozen.layers, texts, pad, **options)
        if is_main_process():
            said = {"checksum": digest(memoryview(kept))}
            cure = "point --cache_dir at a folder with room, or pass --cache false"
            write_kept(path, lambda file: save_file({"features": kept}, file, said), cure)
    return kept


def _read(path: Path) -> np.ndarray | None:
    """The features in a file; None if there is none, or it is damaged."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="np") as file:
            kept, said = file.get_tensor("features"), file.metadata() or {}
    except (SafetensorError, OSError):
        return None
    return kept if said.get("checksum") == digest(memoryview(kept)) else None
