"""Scores a frozen model on rows with demonstrations, for several draws of them at once."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from recipelib.encoding.prompt_encoder import Demonstration, EncodedPrompt, PromptEncoder
from recipelib.evaluation.calibration import Word, candidate_scores, pair_scores
from recipelib.evaluation.evaluation import (
    Asked,
    TaskScore,
    ask,
    finish,
    predicted,
    record_of,
    score_loss,
    vote,
)
from recipelib.evaluation.metrics import score_rows
from recipelib.inference.generation import generate
from recipelib.inference.journal import Journal
from recipelib.inference.masked import Cloze, masked_log_likelihoods
from recipelib.inference.scoring import log_likelihoods
from recipelib.prompts.template import Question
from recipelib.prompts.values import RowError
from recipelib.runtime.errors import UserError

ANSWER_TOKENS = 32  # of the answer that is asked for behind written reasoning

Demonstrate = Callable[[int, Mapping], Sequence[Demonstration]]


@dataclass
class FewShotScore:
    """What the draws of demonstrations came to.

    Attributes:
        draws: the score of each draw; its records say which draw they belong to.
        by_score: for each way of scoring candidates the metric of each draw; empty where answers
            are written.
        asked: the rows that were asked, by draw.
        seconds: how long the model took.
    """

    draws: list[TaskScore]
    by_score: dict[str, list[float]] = field(default_factory=dict)
    asked: list[list[Asked]] = field(default_factory=list)
    seconds: float = 0.0


class CausalAsker:
    """Asks a causal model for candidates: they follow the prompt."""

    solve = None  # a demonstration is a prompt and its answer

    def __init__(self, encoder: PromptEncoder):
        self.encoder = encoder
        self.likelihoods = log_likelihoods

    def ask(
        self, rows: Sequence[Mapping], answers: bool, demonstrate: Demonstrate | None
    ) -> list[Asked]:
        """The rows whose prompts fit."""
        return ask(self.encoder, rows, self.encoder.longest_candidate, answers, demonstrate)

    def prompt(self, question: Question, shown: Sequence[Demonstration]) -> EncodedPrompt:
        """The prompt of one question."""
        return self.encoder.prompt(question, self.encoder.longest_candidate(question), shown)

    def requests(
        self, question: Question, prompt: EncodedPrompt, shown: Sequence[Demonstration]
    ) -> list[tuple]:
        """What is scored: requests, each with the (label, tokens, bytes) of its continuations."""
        encoded = self.encoder.candidates(question, prompt.end)
        ids, words = [], []
        for label, texts in question.candidates.items():
            for text, one in zip(texts, encoded[label], strict=True):
                ids.append(one)
                words.append((label, len(one), len(text.encode())))
        return [((prompt.ids, ids), words)]


class MaskedAsker:
    """Asks a masked model for label words: they fill the masks of the template's cloze."""

    def __init__(self, encoder: PromptEncoder):
        """
        Raises:
            UserError: the template has no label words, or no cloze for them.
        """
        template = encoder.template
        for key in ("verbalizer", "cloze"):
            if not (template.verbalizer if key == "verbalizer" else template.texts.get(key)):
                raise UserError(
                    f"{template.path}: {key}: is missing; a masked model fills label words into it"
                )
        self.encoder = encoder
        self.likelihoods = masked_log_likelihoods

    def solve(self, question: Question) -> Demonstration:
        """The cloze with the label's word in its place."""
        before, after = self.encoder.cloze_parts(question)
        return before, self.encoder.template.verbalizer[question.label][0] + after

    def ask(
        self, rows: Sequence[Mapping], answers: bool, demonstrate: Demonstrate | None
    ) -> list[Asked]:
        """The rows whose cloze fits; a pair that is asked once per word is one cloze, too."""
        asked = ask(self.encoder, rows, lambda one: 0, answers, demonstrate, self._encode)
        for one in asked:
            one.questions, one.prompts = one.questions[:1], one.prompts[:1]
        return asked

    def _encode(self, question: Question, reserve: int, shown: Sequence[Demonstration]):
        before, _ = self.encoder.cloze_parts(question)
        words = [word for some in self.encoder.template.verbalizer.values() for word in some]
        most = max(len(self.encoder.text.word(word, before)) for word in words)
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
        for label, words in encoder.template.verbalizer.items():
            for word in words:
                ids = encoder.text.word(word, before)
                by_length.setdefault(len(ids), []).append((label, word, ids))
        found = []
        for masks, some in by_length.items():
            ids, places, _ = encoder.cloze(question, masks, shown)
            cloze = Cloze(ids, places, [one for _, _, one in some])
            found.append((cloze, [(label, masks, len(word.encode())) for label, word, _ in some]))
        return found


def _require_rows(asked: Sequence[Sequence[Asked]], encoder: PromptEncoder) -> None:
    if not any(asked):
        raise UserError(f"--max_length {encoder.max_length}: no row fits; raise it")


class _Requests:
    """Requests, each kept once."""

    def __init__(self):
        self.items: list = []
        self._places: dict[bytes, int] = {}

    def add(self, request) -> int:
        key = hashlib.blake2b(repr(request).encode(), digest_size=16).digest()
        if key not in self._places:
            self._places[key] = len(self.items)
            self.items.append(request)
        return self._places[key]


def score_labels(
    model,
    asker: CausalAsker | MaskedAsker,
    rows: Sequence[Mapping],
    draws: Sequence[Demonstrate | None],
    *,
    score: str = "sum",
    answers: bool = True,
    batch_tokens: int = 4096,
    description: str | None = None,
    journal: Journal | None = None,
) -> FewShotScore:
    """Choose among the label words by their likelihood, scored in every way that
    `calibration.py` knows, all from the same forward passes.

    Args:
        draws: the demonstrations of each draw.
        score: the way that decides.
        answers: False for rows without answers.
    Raises:
        UserError: `score` needs inputs without content, and the template names none.
    """
    template, start = asker.encoder.template, time.perf_counter()
    if score in ("pmi", "calibrated") and not template.content_free:
        raise UserError(
            f"--score {score}: needs content_free in {template.path.name}, such as ['', 'N/A']"
        )
    requests = _Requests()

    def likelihoods_of(question: Question, prompt: EncodedPrompt, shown) -> list[tuple[int, list]]:
        found = asker.requests(question, prompt, shown)
        return [(requests.add(request), words) for request, words in found]

    def without_content(question: Question, shown: Sequence[Demonstration], text: str) -> list:
        emptied = question.change(**dict.fromkeys(template.prompt_variables, text))
        try:
            prompt = asker.prompt(emptied, shown)
            return likelihoods_of(emptied, prompt, shown[prompt.dropped :])
        except RowError as error:
            raise UserError(f"{template.path}: content_free: {text!r}: {error}") from None

    asked = [asker.ask(rows, answers, demonstrate) for demonstrate in draws]
    _require_rows(asked, asker.encoder)
    places: list[list] = []  # for each question: itself, without content, without demonstrations
    for one in (row for some in asked for row in some):
        for question, prompt in zip(one.questions, one.prompts, strict=True):
            free = [
                without_content(question, one.demonstrations, text)
                for text in template.content_free
            ]
            alone = [without_content(question, (), text) for text in template.content_free[:1]]
            itself = likelihoods_of(question, prompt, one.demonstrations)
            places.append((itself, free, alone))
    model.eval()
    found = asker.likelihoods(
        model,
        requests.items,
        batch_tokens=batch_tokens,
        description=description,
        journal=journal,
    )

    def words_of(some: list[tuple[int, list]]) -> dict[str, list[Word]]:
        words: dict[str, list[Word]] = {}
        for index, entries in some:
            for (label, tokens, size), value in zip(entries, found[index], strict=True):
                words.setdefault(label, []).append(Word(value, tokens, size))
        return words

    waiting = iter(places)
    scores, by_score = [], {}
    for number, some in enumerate(asked):
        records = []
        for one in some:
            kinds: dict[str, dict[str, float]] = {}
            for question in one.questions:
                itself, free, alone = next(waiting)
                scored = candidate_scores(
                    words_of(itself), [words_of(part) for part in free], *map(words_of, alone)
                )
                if question.asked is None or isinstance(asker, MaskedAsker):
                    kinds = scored
                else:
                    for kind, value in pair_scores(scored).items():
                        kinds.setdefault(kind, {})[question.asked] = value
            best = {kind: max(values, key=values.__getitem__) for kind, values in kinds.items()}
            record = record_of(asker.encoder, one, one.questions[0].label, best[score], None)
            records.append({"draw": number, **record, "predictions": best, "scores": kinds})
        scores.append(finish(template, records, len(rows), answers))
        if answers and records:
            golds = [record["answer"] for record in records]
            for kind in records[0]["scores"]:
                said = [record["predictions"][kind] for record in records]
                by_score.setdefault(kind, []).append(score_rows(template.metric, said, golds)[0])
    return FewShotScore(scores, by_score, asked, time.perf_counter() - start)


def score_losses(
    model,
    encoder: PromptEncoder,
    rows: Sequence[Mapping],
    draws: Sequence[Demonstrate | None],
    **options,
) -> FewShotScore:
    """The loss of the gold answers, for templates whose answers cannot be compared."""
    start = time.perf_counter()
    scores = []
    for number, demonstrate in enumerate(draws):
        scores.append(score_loss(model, encoder, rows, demonstrate=demonstrate, **options))
        scores[-1].records = [{"draw": number, **one} for one in scores[-1].records]
    return FewShotScore(scores, seconds=time.perf_counter() - start)


def score_answers(
    model,
    encoder: PromptEncoder,
    rows: Sequence[Mapping],
    draws: Sequence[Demonstrate | None],
    *,
    max_new_tokens: int = 256,
    samples: int = 1,
    temperature: float = 0.0,
    trigger: str = "",
    seed: int = 0,
    answers: bool = True,
    batch_tokens: int = 4096,
    description: str | None = None,
    journal: Journal | None = None,
) -> FewShotScore:
    """Let the model write its answers and read them as the template says.

    Args:
        samples: answers per question, of which the majority counts (self-consistency, Wang et al.
            2023, arXiv:2203.11171); of equals the one with the likeliest sample.
        trigger: what the answer is made to begin with (zero-shot chain of thought, Kojima et al.
            2022, arXiv:2205.11916). Then the template's `rationale.join` is put behind what was
            written, and the answer is asked for again.
    """
    template, start = encoder.template, time.perf_counter()
    begun = encoder.answer(f" {trigger}") if trigger else []
    join = (template.rationale or {"join": "\nTherefore, the answer is"})["join"] if trigger else ""
    reserve = len(begun) + max_new_tokens
    if join:
        reserve += len(encoder.answer(join)) + ANSWER_TOKENS
    asked = [ask(encoder, rows, lambda _: reserve, answers, one) for one in draws]
    _require_rows(asked, encoder)
    prompts = [prompt for some in asked for one in some for prompt in one.prompts]
    options = {
        "end_ids": {prompt.end[-1] for prompt in prompts},
        "stop": template.stop,
        "seed": seed,
        "batch_tokens": batch_tokens,
        "journal": journal,
    }
    model.eval()
    tokenizer = encoder.text.tokenizer
    written = generate(
        model,
        tokenizer,
        [prompt.ids + begun for prompt in prompts],
        max_new_tokens=max_new_tokens,
        samples=samples,
        temperature=temperature,
        description=description,
        **options,
    )
    texts = [[one.text for one in some] for some in written]
    for stop in template.stop if join else ():
        texts = [[text.partition(stop)[0] for text in some] for some in texts]
    if join:
        again = [
            prompt.ids + encoder.answer(f" {trigger}{text}{join}")
            for prompt, some in zip(prompts, texts, strict=True)
            for text in some
        ]
        ends = iter(
            generate(
                model,
                tokenizer,
                again,
                max_new_tokens=ANSWER_TOKENS,
                description=description and f"{description}: answers",
                **options,
            )
        )
        # Patterns may look for what leads to the answer; without them it is what comes behind.
        lead = join if template.extract else ""
        texts = [
            [f"{text}{lead}" * bool(lead) + next(ends)[0].text for text in some] for some in texts
        ]

    waiting = iter(zip(texts, written, strict=True))
    scores = []
    for number, some in enumerate(asked):
        records = []
        for one in some:
            said, read = [], []
            for _ in one.questions:
                these, likelihoods = next(waiting)
                said.append(these if samples > 1 else these[0])
                found = [template.read_answer(text) for text in these]
                if join and template.label and not template.extract:  # more may stand behind it
                    found = [template.first_word(text) for text in these]
                read.append(vote(found, likelihoods, template))
            prediction, answer = predicted(template, one.questions, read)
            record = record_of(encoder, one, answer, prediction, None)
            said = said[0] if len(said) == 1 else said
            records.append({"draw": number, **record, "generated": said})
        scores.append(finish(template, records, len(rows), answers))
    return FewShotScore(scores, {}, asked, time.perf_counter() - start)
