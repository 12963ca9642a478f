"""Rows as the model will see them, shown before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from recipelib.encoding import (
    IGNORED,
    CausalAsker,
    Counts,
    Demonstrate,
    MaskedAsker,
    encode_rows,
)
from recipelib.runtime import is_main_process, printable, say
from recipelib.task import ClassTask, ClozeTask, Mixture, Task


def preview(task: Task, count: int) -> None:
    """Show a task's first training examples token by token as the model will see them, the
    supervised ones marked: colored in a terminal, elsewhere in ⟦ ⟧. Of several tasks, those that
    are only scored included, or several texts that are trained on a row, the first of each. Of a
    task that is asked through a cloze its first rows, with the words that may fill it; of one whose
    classes are read from states the texts and their classes.
    """
    if not is_main_process():
        return
    if isinstance(task, ClozeTask | ClassTask):
        (_preview_cloze if isinstance(task, ClozeTask) else _preview_classes)(task, count)
        return
    names = [template.name for template in task.templates]
    held_out = [one for one in task.tasks if not one.train] if isinstance(task, Mixture) else []
    parts, start = task.encoded.parts or [len(task.encoded.examples)], 0
    for place, size in enumerate(parts):
        several = len(parts) + len(held_out) > 1 and len(names) == len(parts)
        examples = task.encoded.examples.select(range(start, start + min(count, size)))
        _show_examples(examples, task.tokenizer, f"{names[place]}, " if several else "")
        start += size
    for one in held_out:
        rows = list(one.evaluation.rows[:count])
        examples = encode_rows(one.encoder, rows, kind="evaluation").examples
        _show_examples(examples, task.tokenizer, f"{one.template.name} (held out), ")


def _show_examples(examples: Iterable[Mapping], tokenizer, named: str) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    for number, example in enumerate(examples):
        supervised = [label != IGNORED for label in example["labels"]]
        tokens = f"{len(supervised)} tokens, {sum(supervised)} supervised"
        console.rule(f"{named}example {number + 1}: {tokens}")
        text, shown, start = Text(), "", 0
        for end in range(1, len(supervised) + 1):
            if end < len(supervised) and supervised[end] == supervised[start]:
                continue
            # Decoded from the beginning: a piece by itself may lose the space in front of it.
            whole = tokenizer.decode(example["input_ids"][:end], clean_up_tokenization_spaces=False)
            piece, shown = whole[len(shown) :], whole
            if not supervised[start]:
                text.append(printable(piece))
            elif console.is_terminal:
                text.append(printable(piece), style="bold white on dark_green")
            else:
                text.append(printable(f"⟦{piece}⟧"))
            start = end
        console.print(text)


_SHOWN_CHARACTERS = 3000


def preview_prompts(
    asker: CausalAsker | MaskedAsker,
    rows: Sequence[Mapping],
    demonstrate: Demonstrate | None,
    answers: bool = True,
) -> None:
    """Show the prompts of the first rows whole, and what is compared behind them.

    Args:
        answers: False for rows to answer: of a conversation what stands before the next turn is
            shown then, not the whole.
    """
    from rich.console import Console

    if not is_main_process():
        return
    console = Console(highlight=False, soft_wrap=True)
    encoder = asker.encoder
    for number, row in enumerate(rows):
        prompts, count = _prompts(asker, row, demonstrate, number, answers)
        if not prompts:
            console.rule(f"row {number + 1}: does not fit into {encoder.max_length} tokens")
        for ids, candidates in prompts:
            shown = f"{count} demonstration{'' if count == 1 else 's'}"
            console.rule(f"row {number + 1}: {len(ids)} tokens, {shown}")
            console.print(printable(encoder.text.tokenizer.decode(ids)), markup=False)
            if candidates:
                candidates = {label: list(texts) for label, texts in candidates.items()}
                console.print(printable(f"candidates: {candidates}"), markup=False)


def say_first_prompt(
    asker: CausalAsker | MaskedAsker,
    row: Mapping,
    demonstrate: Demonstrate | None,
    answers: bool = True,
) -> None:
    """Print the first row's prompt; of a long one the ends. Nothing where it does not fit."""
    prompts, _ = _prompts(asker, row, demonstrate, 0, answers)
    for ids, _ in prompts[:1]:
        text = asker.encoder.text.tokenizer.decode(ids)
        left_out = len(text) - _SHOWN_CHARACTERS
        if left_out > 0:
            half = _SHOWN_CHARACTERS // 2
            text = f"{text[:half]}\n[... {left_out:,} characters ...]\n{text[-half:]}"
        say(f"the first prompt, {len(ids)} tokens:\n{printable(text)}\n")


def _prompts(
    asker, row: Mapping, demonstrate: Demonstrate | None, number: int, answers: bool
) -> tuple[list[tuple[list[int], Mapping]], int]:
    """The ids of a row's prompts, each with its candidates, and how many demonstrations they have;
    of a conversation, which is scored as it is, the whole. No prompts where they do not fit.
    """
    encoder = asker.encoder
    if encoder.template.conversation and answers:
        (question,) = encoder.template.questions(row)
        return [(ids, {}) for ids, _ in encoder.conversation(question, Counts())], 0
    shown = demonstrate and (lambda _, asked: demonstrate(number, asked))
    for asked in asker.ask([row], False, shown):
        candidates = [question.candidates for question in asked.questions]
        ids = [prompt.ids for prompt in asked.prompts]
        return list(zip(ids, candidates, strict=True)), len(asked.demonstrations)
    return [], 0


def _preview_classes(task: ClassTask, count: int) -> None:
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    examples = task.encoded.examples
    for number, example in enumerate(examples.select(range(min(count, len(examples)))), start=1):
        console.rule(f"example {number}: {example['length']} tokens")
        console.print(printable(task.tokenizer.decode(example["input_ids"])), markup=False)
        console.print(printable(f"⟦{task.classes[example['labels']]}⟧"), markup=False)


def _preview_cloze(task: ClozeTask, count: int) -> None:
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    decode = task.tokenizer.decode
    shown = zip(task.scored.asked[:count], task.scored.examples, strict=False)
    for number, (row, example) in enumerate(shown, start=1):
        sequences = len(example["lengths"])
        more = f" in {sequences} sequences" if sequences > 1 else ""
        console.rule(f"row {number}: {len(example['input_ids'])} tokens{more}")
        for question, prompt in zip(row.questions, row.prompts, strict=True):
            console.print(printable(decode(prompt.ids)), markup=False)
            fillings: dict[str, list[str]] = {}
            for request, words in task.asker.requests(question, prompt, ()):
                for ids, (label, *_) in zip(request[-1], words, strict=True):
                    fillings.setdefault(label, []).append(decode(ids))
            console.print(printable(f"⟦{fillings}⟧"), markup=False)
        console.print(f"label: {row.questions[0].label}", markup=False)
