"""Training above frozen layers: whether what they compute is kept, rates that fall with depth, and
layers that thaw one by one.
"""

from __future__ import annotations

import math

from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback

from recipelib.activations import DTYPES, FrozenLayers, StateCache, cache_folder
from recipelib.inference import from_main_process
from recipelib.models import EMBEDDINGS, bare_model, find_layers, group_of, layer_map
from recipelib.runtime import UserError, megabytes, print_table, say
from recipelib.task import ClassTask, ClozeTask, Task
from recipelib.training.class_trainer import ClassTrainer
from recipelib.training.cloze_trainer import ClozeTrainer
from recipelib.training.trainer import RecipeTrainer


def trainer_of(task: Task) -> type[RecipeTrainer]:
    """The trainer for how a task's answers are read: from the text, a cloze, or a head."""
    return {ClozeTask: ClozeTrainer, ClassTask: ClassTrainer}.get(type(task), RecipeTrainer)


def keep_states(frozen: FrozenLayers, model, task, args, training) -> StateCache | None:
    """Where the states of the training examples behind the frozen layers are kept, if that pays.
    Says what is trained, and what is kept.

    Args:
        model: whose layers those are; before FSDP wraps it.
        args: `cache`, `cache_dir`, `cache_dtype` and `clear_cache`.
        training: the trainer's arguments.
    Raises:
        UserError: the folder cannot be used; --torch_compile.
    """
    boundary, depth = frozen.boundary, len(frozen.layers)
    root = cache_folder(args, task.store)
    cache, why = None, None
    if root is None:
        why = "--cache false"
    elif boundary == 0:
        why = "nothing is frozen below what is trained"
    elif task.encoded.stream is not None:
        why = "a stream is met once"
    else:
        if training.torch_compile:
            raise UserError("--torch_compile: the cache changes what is compiled; --cache false")
        if training.neftune_noise_alpha:
            raise UserError("--neftune_noise_alpha: the cache would keep no noise; --cache false")
        dtype = DTYPES[args.cache_dtype] if args.cache_dtype else model.dtype
        computed = f"{training.mixed_precision}, {training.device.type}"
        cache = StateCache(frozen, task.encoded.examples, root, dtype, computed)
        once = passes(len(task.encoded.examples), training) <= 1
        if once and not from_main_process(cache.is_there):  # all processes have to agree
            cache, why = None, "each row is met at most once"
    kept = f"not kept ({why}): the frozen layers are computed in each pass"
    if cache is not None:
        kept = (
            f"{cache.tokens:,} tokens x {cache.bytes_per_token:,} bytes = "
            f"{megabytes(cache.tokens * cache.bytes_per_token)} in {cache.folder}"
            f"{', there already' if cache.is_there() else ''}"
        )
    print_table(
        "Layers",
        {
            **layer_map(model),
            f"computed once: {boundary} of {depth}" if cache else "their states": kept,
        },
    )
    return cache


def passes(examples: int, training) -> float:
    """How often each example is trained on."""
    if training.max_steps <= 0:
        return training.num_train_epochs
    batch = training.per_device_train_batch_size * training.gradient_accumulation_steps
    return training.max_steps / math.ceil(examples / (batch * training.world_size))


def rates_by_depth(model: nn.Module, rate: float, decay: float) -> dict[str, float]:
    """Learning rates that fall with depth: a layer's is `decay` times that of the layer above it
    (ULMFiT, Howard and Ruder 2018, section 3.2), by words in the parameters' names. What is behind
    the layers has the whole rate.
    """
    if decay == 1:
        return {}
    bare, (name, layers) = bare_model(model), find_layers(model)
    depth = len(layers)
    rates = {f"{name}.{number}.": rate * decay ** (depth - 1 - number) for number in range(depth)}
    below = [name for name, group in group_of(bare).items() if group == EMBEDDINGS]
    return {**rates, **dict.fromkeys(below, rate * decay**depth)}


class GradualUnfreezing(TrainerCallback):
    """Trains one layer more, from the top down, every so many steps (ULMFiT, Howard and Ruder
    2018, section 3.3).

    What will thaw `requires_grad` from the start, so that the optimizer and FSDP know it; until
    then the gradient ends above it.

    Args:
        frozen: the model's layers; those that are not frozen are trained in the end.
        every: how many steps it takes for one more.
        training: the trainer's arguments, whose processes then expect parameters that a step leaves
            out.
    """

    def __init__(self, frozen: FrozenLayers, every: int, training):
        training.ddp_find_unused_parameters = True
        self.layers, self.boundary, self.every = frozen.layers, frozen.boundary, every
        self._hook: RemovableHandle | None = None

    def lowest(self, step: int) -> int:
        """The number of the lowest layer that is trained in a step, counted from 0."""
        top = len(self.layers) - 1
        return max(min(self.boundary, top), top - step // self.every)

    def _move(self, step: int) -> None:
        if self._hook is not None:
            self._hook.remove()
        lowest = self.lowest(step)
        # Where all have thawed, what is trained below them, such as the embeddings, is trained too.
        if lowest > self.boundary:
            layer = self.layers[lowest]
            self._hook = layer.register_forward_pre_hook(_detach, with_kwargs=True)

    def on_train_begin(self, args, state, control, **kwargs):
        """Freeze what has not thawed at this step, from which a resumed run goes on."""
        self._move(state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        """Thaw a layer when it is time."""
        if self.lowest(state.global_step) != self.lowest(state.global_step - 1):
            say(f"step {state.global_step}: layer {self.lowest(state.global_step)} is trained, too")
            self._move(state.global_step)

    def on_train_end(self, args, state, control, **kwargs):
        """Let the gradient through."""
        if self._hook is not None:
            self._hook.remove()


def _detach(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    if args:
        return (args[0].detach(), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": kwargs["hidden_states"].detach()}
