"""Rows -> texts with a blank, as they are computed to score every label word in it.

A row is one or several sequences. A masked model fills a word of several tokens from left to right,
one mask for each (see `masked.py`). For a causal one the words follow the prompt; or they stand
where the cloze has its mask, and the rest of it follows. There, the tokens of one sequence are read
wherever they begin another word, too.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from recipelib.encoding.examples import EncodedRows
from recipelib.encoding.prompt_encoder import EncodedPrompt
from recipelib.evaluation.evaluation import Asked, ask
from recipelib.evaluation.few_shot import CausalAsker, MaskedAsker
from recipelib.inference.masked import Cloze
from recipelib.prompts.template import PromptTemplate, Question
from recipelib.runtime.errors import UserError


class ClozeAsker(CausalAsker):
    """Asks a causal model to fill the template's cloze, wherever its mask stands: the likelihood of
    the whole text with each label word in place. What stands before the mask is the same for all.
    """

    def ask(self, rows: Sequence[Mapping], answers: bool, demonstrate=None) -> list[Asked]:
        """The rows whose cloze fits; a pair that is asked once per word is one cloze, too."""
        asked = ask(self.encoder, rows, lambda one: 0, answers, None, self._encode)
        for one in asked:
            one.questions, one.prompts = one.questions[:1], one.prompts[:1]
        return asked

    def _encode(self, question: Question, reserve: int, shown: Sequence) -> EncodedPrompt:
        return self.encoder.causal_cloze(question)[0]

    def prompt(self, question: Question, shown: Sequence = ()) -> EncodedPrompt:
        """What stands before the mask of one question."""
        return self._encode(question, 0, ())

    def requests(self, question: Question, prompt: EncodedPrompt, shown: Sequence = ()) -> list:
        """As `CausalAsker`'s; a continuation is a word with the text behind the mask."""
        _, follow = self.encoder.causal_cloze(prompt.question)
        words = [(label, len(ids), 0) for label, some in follow.items() for ids in some]
        return [((prompt.ids, [ids for some in follow.values() for ids in some]), words)]


Example = dict[str, Any]


def example_of(
    requests: Sequence[tuple],
    classes: Sequence[str],
    label: str | None,
    asked: Sequence[str] = (),
) -> Example:
    """A row as it is computed.

    Args:
        requests: what is scored, as `few_shot`'s askers give it: a prompt with its continuations or
            a `Cloze`, each with the (label, ...) of its words.
        classes: all labels, in order.
        label: the right one; None for a row without an answer.
        asked: where each request asks about one label with yes or no, these labels: by how much yes
            is likelier stands for the label's word.

    Returns:
        `input_ids`: the tokens of all sequences, one after another, and the `lengths` of these;
        `reads`: [sequence, place, token, word, sign] of each token of a word, by which place it is
        predicted; `word_labels`: the label of each word; `labels`: the right label, or -1.
    """
    sequences: list[list[int]] = []
    reads: list[list[int]] = []
    word_labels: list[int] = []
    for number, (request, words) in enumerate(requests):
        fill = _fill_masks if isinstance(request, Cloze) else _continue
        some, places = fill(*request)
        for sequence, place, token, word in places:
            at, sign = len(word_labels) + (0 if asked else word), 1
            if asked and words[word][0] == "no":
                sign = -1
            reads.append([len(sequences) + sequence, place, token, at, sign])
        sequences += some
        names = [asked[number]] if asked else [name for name, *_ in words]
        word_labels += [classes.index(name) for name in names]
    return {
        "input_ids": [token for one in sequences for token in one],
        "lengths": [len(one) for one in sequences],
        "reads": reads,
        "word_labels": word_labels,
        "labels": -1 if label is None else classes.index(label),
    }


def _continue(prompt: Sequence[int], words: Sequence[Sequence[int]]) -> tuple[list, list]:
    """Sequences of a causal model: one for each word whose beginning begins no other word."""
    beginnings = sorted({tuple(word[:-1]) for word in words}, reverse=True)
    kept: list[tuple[int, ...]] = []
    for one in beginnings:  # the longer of two that begin alike comes first
        if not any(other[: len(one)] == one for other in kept):
            kept.append(one)
    reads = []
    for number, word in enumerate(words):
        begin = tuple(word[:-1])
        sequence = next(at for at, one in enumerate(kept) if one[: len(begin)] == begin)
        for step, token in enumerate(word):
            reads.append((sequence, len(prompt) - 1 + step, token, number))
    return [[*prompt, *one] for one in kept], reads


def _fill_masks(
    ids: Sequence[int], masks: Sequence[int], words: Sequence[Sequence[int]]
) -> tuple[list, list]:
    """Sequences of a masked model: one for each distinct beginning of the words."""
    sequences: dict[tuple[int, ...], list[int]] = {}
    reads = []
    for number, word in enumerate(words):
        for step, token in enumerate(word):
            begin = tuple(word[:step])
            if begin not in sequences:
                sequences[begin] = list(ids)
                for place, filled in zip(masks, begin, strict=False):
                    sequences[begin][place] = filled
            reads.append((list(sequences).index(begin), masks[step], token, number))
    return list(sequences.values()), reads


def soft_requests(requests: Sequence[tuple], classes: Sequence[str]) -> list[tuple]:
    """The first of a row's requests, with the labels themselves in the place of their words."""
    (request, _), *_ = requests
    tokens = [[number] for number in range(len(classes))]
    request = request._replace(words=tokens) if isinstance(request, Cloze) else (request[0], tokens)
    return [(request, [(label,) for label in classes])]


def label_word_ids(
    asker: CausalAsker | MaskedAsker, question: Question
) -> dict[str, list[list[int]]]:
    """For each label the ids of its words as they stand in the blank of a question."""
    encode = word_encoder(asker, question)
    verbalizer = asker.encoder.template.verbalizer
    return {label: [encode(word) for word in words] for label, words in verbalizer.items()}


def word_encoder(
    asker: CausalAsker | MaskedAsker, question: Question
) -> Callable[[str], list[int]]:
    """Gives the ids of a word as it stands in the blank of a question."""
    encoder, template = asker.encoder, asker.encoder.template
    if isinstance(asker, CausalAsker) and not isinstance(asker, ClozeAsker):
        if question.asked is not None:
            return lambda word: encoder.answer(f" {word}")
        return lambda word: encoder.answer(template.text("answer", question, word=word))
    before, _ = encoder.cloze_parts(question)
    if isinstance(asker, MaskedAsker):
        return partial(encoder.text.word, before=before)
    space = before[len(before.rstrip()) :]
    return lambda word: encoder.text.continuation(space + word)


def before_blank(asker: CausalAsker | MaskedAsker, question: Question, word: str) -> str:
    """The character in front of a word in the blank of a question; "" in a chat, whose template
    decides on it.
    """
    if isinstance(asker, MaskedAsker):
        return asker.encoder.cloze_parts(question)[0][-1:]
    if asker.encoder.chat:
        return ""
    ids = [*asker.prompt(question, ()).ids, *word_encoder(asker, question)(word)]
    return asker.encoder.text.tokenizer.decode(ids).removesuffix(word)[-1:]


def few_shot_rows(
    template: PromptTemplate, rows: Sequence[Mapping], per_class: int, seed: int
) -> tuple[list[Mapping], list[Mapping]]:
    """A draw of so many rows of each class to train on, and as many others to choose by, both in
    random order (as LM-BFF, Gao et al. 2021, section 3.1).

    Raises:
        UserError: a class has too few rows.
    """
    draw = random.Random(seed)
    train, validation = [], []
    by_label: dict[str, list[Mapping]] = {label: [] for label in template.verbalizer}
    for row in rows:
        by_label[template.questions(row)[0].label].append(row)
    for label, some in by_label.items():
        if len(some) < 2 * per_class:
            raise UserError(
                f"--per_class {per_class}: takes {2 * per_class} rows of each class, half of them "
                f"to choose by, and {label!r} has {len(some)}; ask for fewer"
            )
        drawn = draw.sample(some, 2 * per_class)
        train += drawn[:per_class]
        validation += drawn[per_class:]
    draw.shuffle(train)
    return train, validation


@dataclass
class BlankRows:
    """Rows as they are computed (`encoded.examples`), and as they were asked."""

    encoded: EncodedRows = field(default_factory=EncodedRows)
    asked: list[Asked] = field(default_factory=list)


def encode_blanks(
    asker: CausalAsker | MaskedAsker,
    rows: Sequence[Mapping],
    *,
    soft: bool = False,
    answers: bool = True,
    progress: Callable[[Iterable], Iterable] = iter,
) -> BlankRows:
    """Rows that `data.load_rows` has checked, each as `example_of` describes.

    Args:
        soft: whether a soft verbalizer reads the blank.
        answers: False for rows without answers.
    Raises:
        UserError: no row fits.
    """
    classes, found = list(asker.encoder.template.verbalizer), BlankRows()
    counts = found.encoded.counts
    for number, row in enumerate(progress(rows)):
        counts.rows += 1
        asked = asker.ask([row], answers, None)
        if not asked:
            counts.left_out += 1
            continue
        (one,) = asked
        one.row = number
        requests = []
        for question, prompt in zip(one.questions, one.prompts, strict=True):
            requests += asker.requests(question, prompt, ())
            counts.shortened += prompt.shortened
        pairs = [question.asked for question in one.questions if question.asked is not None]
        pairs = [] if isinstance(asker, ClozeAsker | MaskedAsker) else pairs
        if soft and pairs:
            raise UserError(
                f"{asker.encoder.template.path}: --soft_verbalizer: a pair that is asked once per "
                "label has no label words of its own; leave it out, or pass --cloze true"
            )
        if soft:
            requests = soft_requests(requests, classes)
        example = example_of(requests, classes, one.questions[0].label, pairs)
        found.asked.append(one)
        found.encoded.examples.append(example)
        found.encoded.rows.append(number)
        counts.examples += 1
        counts.tokens += len(example["input_ids"])
        counts.supervised_tokens += len({(read[0], read[1]) for read in example["reads"]})
    if not found.asked:
        raise UserError(f"--max_length {asker.encoder.max_length}: no row fits; raise it")
    return found
