"""Encodes what a model is asked about rows: prompts that candidates follow, or clozes they fill."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from recipelib.encoding.prompt_encoder import DoesNotFit, EncodedPrompt, PromptEncoder
from recipelib.prompts import Demonstration, Question, RowError
from recipelib.runtime import UserError, progress_bar


@dataclass
class Asked:
    """A row's questions and their prompts, all with the same demonstrations."""

    row: int
    questions: list[Question]
    prompts: list[EncodedPrompt]
    demonstrations: Sequence[Demonstration] = ()
    dropped: int = 0  # demonstrations for which there was no room

    def without_text(self) -> Asked:
        """What reports want to know of a row that has been scored: what was cut."""
        prompts = [replace(prompt, ids=[], end=[], question=None) for prompt in self.prompts]
        return Asked(self.row, [], prompts, (), self.dropped)


def ask(
    encoder: PromptEncoder,
    rows: Iterable[Mapping],
    reserve: Callable[[Question], int],
    answers: bool = True,
    demonstrate: Callable[[int, Mapping], Sequence[Demonstration]] | None = None,
    encode: Callable[..., EncodedPrompt] | None = None,
    first: int = 0,
) -> list[Asked]:
    """What is asked about each row; rows of which a prompt does not fit are left out.

    Args:
        reserve: returns how many tokens a question's answer needs.
        demonstrate: returns the demonstrations for a row, given its number and the row.
        encode: encodes a prompt; by default `encoder.prompt`.
        first: the number of the first row.
    """
    asked, encode = [], encode or encoder.prompt
    for number, row in enumerate(rows, first):
        questions = encoder.template.questions(row, answers=answers)
        shown = demonstrate(number, row) if demonstrate else ()
        try:
            prompts = [encode(question, reserve(question), shown) for question in questions]
            dropped = max(prompt.dropped for prompt in prompts)
            if any(prompt.dropped < dropped for prompt in prompts):
                prompts = [
                    encode(question, reserve(question), shown[dropped:]) for question in questions
                ]
        except DoesNotFit:
            continue
        except UserError as error:  # the chat template rejects the turns
            if not encoder.template.conversation:
                raise
            raise UserError(f"row {number + 1}{beginning(questions[0])}: {error}") from None
        asked.append(Asked(number, questions, prompts, shown[dropped:], dropped))
    return asked


def beginning(question: Question) -> str:
    """How a conversation's first question begins, by which it can be found in its file."""
    text = next(turn["content"] for turn in question.turns if turn["role"] == "user")
    words = " ".join(text.split())
    return f" ({words[:40]!r}{'...' if len(words) > 40 else ''})"


def with_bar(rows: Sequence[Mapping], description: str | None) -> Iterator[Mapping]:
    """Rows, to be asked about, with a progress bar over them; none without a description."""
    with progress_bar(description, len(rows)) as bar:
        for row in rows:
            yield row
            bar.update()


def record_of(encoder: PromptEncoder, asked: Asked, answer, prediction, score) -> dict:
    """What predictions.jsonl holds for a row."""
    tokenizer, template = encoder.text.tokenizer, encoder.template
    prompts = [tokenizer.decode(prompt.ids) for prompt in asked.prompts]
    texts = template.class_texts(asked.questions[0]) if template.label else {}
    return {
        "row": asked.row,
        "prompt": prompts[0] if len(prompts) == 1 else prompts,
        "answer": answer,
        **({"answer_text": texts.get(answer)} if texts else {}),
        "prediction": prediction,
        **({"prediction_text": texts.get(prediction)} if texts else {}),
        "score": score,
    }


class Cloze(NamedTuple):
    """A text with masks, the places of the masks, and the ids of the words that may fill them, one
    id per mask.
    """

    ids: list[int]
    masks: list[int]
    words: list[list[int]]


Demonstrate = Callable[[int, Mapping], Sequence[Demonstration]]


class CausalAsker:
    """Asks a causal model: the candidates follow the prompt."""

    solve = None  # a demonstration is a prompt and its answer

    def __init__(self, encoder: PromptEncoder):
        self.encoder = encoder

    def ask(
        self,
        rows: Iterable[Mapping],
        answers: bool,
        demonstrate: Demonstrate | None,
        first: int = 0,
    ) -> list[Asked]:
        """The rows whose prompts fit; they are numbered from `first`."""
        reserve = self.encoder.longest_candidate
        return ask(self.encoder, rows, reserve, answers, demonstrate, first=first)

    def prompt(self, question: Question, shown: Sequence[Demonstration]) -> EncodedPrompt:
        """The prompt of one question."""
        return self.encoder.prompt(question, self.encoder.longest_candidate(question), shown)

    def requests(
        self, question: Question, prompt: EncodedPrompt, shown: Sequence[Demonstration]
    ) -> list[tuple]:
        """What is scored: requests, each with the (label, tokens, bytes) of its continuations."""
        encoded = self.encoder.candidates(question, prompt.end)
        continuations, words = [], []
        for label, texts in question.candidates.items():
            for text, ids in zip(texts, encoded[label], strict=True):
                continuations.append(ids)
                words.append((label, len(ids), len(text.encode())))
        return [((prompt.ids, continuations), words)]


class MaskedAsker:
    """Asks a masked model: the label words fill the masks of the template's cloze."""

    def __init__(self, encoder: PromptEncoder):
        """
        Raises:
            UserError: the template has no label words, or no cloze for them.
        """
        template = encoder.template
        for key in ("verbalizer", "cloze"):
            words = template.verbalizer or template.options
            if not (words if key == "verbalizer" else template.texts.get(key)):
                raise UserError(
                    f"{template.path}: {key}: is missing; a masked model fills label words into it"
                )
        self.encoder = encoder

    def solve(self, question: Question) -> Demonstration:
        """A demonstration: the cloze with the label's word in place of the mask."""
        before, after = self.encoder.cloze_parts(question)
        return before, self.encoder.template.words(question)[question.label][0] + after

    def ask(
        self,
        rows: Iterable[Mapping],
        answers: bool,
        demonstrate: Demonstrate | None,
        first: int = 0,
    ) -> list[Asked]:
        """The rows whose cloze fits; a pair that is asked once per word is one cloze, too."""
        encode = self._encode
        asked = ask(self.encoder, rows, lambda question: 0, answers, demonstrate, encode, first)
        for row in asked:
            row.questions, row.prompts = row.questions[:1], row.prompts[:1]
        return asked

    def _encode(self, question: Question, reserve: int, shown: Sequence[Demonstration]):
        before, _ = self.encoder.cloze_parts(question)
        most = max(
            len(self.encoder.text.word(word, before))
            for words in self.encoder.template.words(question).values()
            for word in words
        )
        return self.encoder.cloze(question, most, shown)[2]

    def prompt(self, question: Question, shown: Sequence[Demonstration]) -> EncodedPrompt:
        """The cloze of one question, with as many masks as the longest word needs."""
        return self._encode(question, 0, shown)

    def requests(
        self, question: Question, prompt: EncodedPrompt, shown: Sequence[Demonstration]
    ) -> list[tuple]:
        """A cloze for each number of masks, with the (label, tokens, bytes) of its words."""
        encoder, question = self.encoder, prompt.question
        before, _ = encoder.cloze_parts(question)
        by_length: dict[int, list[tuple[str, str, list[int]]]] = {}
        for label, words in encoder.template.words(question).items():
            for word in words:
                ids = encoder.text.word(word, before)
                by_length.setdefault(len(ids), []).append((label, word, ids))
        requests = []
        for masks, words in by_length.items():
            ids, places, _ = encoder.cloze(question, masks, shown)
            cloze = Cloze(ids, places, [word_ids for _, _, word_ids in words])
            sizes = [(label, masks, len(word.encode())) for label, word, _ in words]
            requests.append((cloze, sizes))
        return requests


class ClozeAsker(CausalAsker):
    """Asks a causal model to fill the template's cloze, wherever its mask stands: by the likelihood
    of the whole text with each label word in place. All words share the text before the mask, so
    only the word and the text behind it are scored.
    """

    def ask(
        self, rows: Iterable[Mapping], answers: bool, demonstrate=None, first: int = 0
    ) -> list[Asked]:
        """The rows whose cloze fits; a pair that is asked once per word is one cloze, too."""
        encode = self._encode
        asked = ask(self.encoder, rows, lambda question: 0, answers, None, encode, first)
        for row in asked:
            row.questions, row.prompts = row.questions[:1], row.prompts[:1]
        return asked

    def _encode(self, question: Question, reserve: int, shown: Sequence) -> EncodedPrompt:
        return self.encoder.causal_cloze(question)[0]

    def prompt(self, question: Question, shown: Sequence = ()) -> EncodedPrompt:
        """What stands before the mask in the cloze of one question."""
        return self._encode(question, 0, ())

    def requests(self, question: Question, prompt: EncodedPrompt, shown: Sequence = ()) -> list:
        """As `CausalAsker`'s; a continuation is a word with the text behind the mask."""
        _, follow = self.encoder.causal_cloze(prompt.question)
        continuations, words = [], []
        for label, encoded in follow.items():
            for ids in encoded:
                continuations.append(ids)
                words.append((label, len(ids), 0))
        return [((prompt.ids, continuations), words)]


def asker_of(encoder: PromptEncoder, masked: bool, cloze: bool) -> CausalAsker | MaskedAsker:
    """The asker of a model: a masked one is asked by the cloze, a causal one by the prompt, or by
    the cloze if `cloze`.
    """
    return MaskedAsker(encoder) if masked else (ClozeAsker if cloze else CausalAsker)(encoder)


def requests_without_content(
    asker: CausalAsker | MaskedAsker,
    question: Question,
    text: str,
    shown: Sequence[Demonstration] = (),
) -> list[tuple]:
    """An asker's `requests` for a question with a text without content, such as "N/A", in place of
    everything that the row brings.

    Raises:
        UserError: the template cannot be rendered with this text.
    """
    template = asker.encoder.template
    emptied = question.change(**dict.fromkeys(template.content_variables, text))
    try:
        prompt = asker.prompt(emptied, shown)
        return asker.requests(emptied, prompt, shown[prompt.dropped :])
    except RowError as error:
        raise UserError(f"{template.path}: content_free: {text!r}: {error}") from None
