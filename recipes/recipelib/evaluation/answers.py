"""Answers that a model writes, read as the template says."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence

from recipelib.encoding import Asked, Demonstrate, PromptEncoder, ask, record_of, with_bar
from recipelib.evaluation.metrics import answer_key
from recipelib.evaluation.scores import FewShotScore, blocks, score_records, spool_prompts
from recipelib.inference import Journal, Written, generate
from recipelib.prompts import PromptTemplate, Question
from recipelib.runtime import Spool

ANSWER_TOKENS = 32  # of the answer that is asked for after written reasoning


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
            2023, arXiv:2203.11171); of a tie the one with the likeliest sample.
        trigger: what the answer is made to begin with (zero-shot chain of thought, Kojima et al.
            2022, arXiv:2205.11916). The template's `rationale.join` is then put after what was
            written, and the answer is asked for again.
    """
    template, start = encoder.template, time.perf_counter()
    begun = encoder.answer(f" {trigger}") if trigger else []
    join = (template.rationale or {"join": "\nTherefore, the answer is"})["join"] if trigger else ""
    reserve = len(begun) + max_new_tokens
    if join:
        reserve += len(encoder.answer(join)) + ANSWER_TOKENS
    tokenizer, spool = encoder.text.tokenizer, Spool()
    records: list[list[dict]] = [[] for _ in draws]
    cut: list[list[Asked]] = [[] for _ in draws]
    prompts_before = 0
    model.eval()
    for first, part, bar in blocks(rows, len(draws), description):
        encoding = bar and f"{bar}: prompts"
        asked = [
            ask(encoder, with_bar(part, encoding), lambda _: reserve, answers, draw, first=first)
            for draw in draws
        ]
        prompts = [prompt for draw in asked for row in draw for prompt in row.prompts]
        options = {
            "end_ids": {prompt.end[-1] for prompt in prompts},
            "stop": template.stop,
            "seed": seed,
            "batch_tokens": batch_tokens,
            "journal": journal,
        }
        written = generate(
            model,
            tokenizer,
            [prompt.ids + begun for prompt in prompts],
            max_new_tokens=max_new_tokens,
            samples=samples,
            temperature=temperature,
            first=prompts_before,
            description=bar,
            **options,
        )
        texts = [[sample.text for sample in prompt_samples] for prompt_samples in written]
        for stop in template.stop if join else ():
            texts = [[text.partition(stop)[0] for text in prompt_texts] for prompt_texts in texts]
        if join:
            again = [
                prompt.ids + encoder.answer(f" {trigger}{text}{join}")
                for prompt, prompt_texts in zip(prompts, texts, strict=True)
                for text in prompt_texts
            ]
            ends = iter(
                generate(
                    model,
                    tokenizer,
                    again,
                    max_new_tokens=ANSWER_TOKENS,
                    first=prompts_before * samples,
                    description=bar and f"{bar}: answers",
                    **options,
                )
            )
            # Patterns may look for what leads to the answer; without patterns, the second text is
            # it.
            texts = [
                [
                    (f"{text}{join}" if template.extract else "") + next(ends)[0].text
                    for text in prompt_texts
                ]
                for prompt_texts in texts
            ]
        prompts_before += len(prompts)
        waiting = iter(zip(texts, written, strict=True))
        for number, draw in enumerate(asked):
            for row in draw:
                said, read = [], []
                for question in row.questions:
                    prompt_texts, prompt_samples = next(waiting)
                    said.append(prompt_texts if samples > 1 else prompt_texts[0])
                    prompt_answers = [template.read_answer(text) for text in prompt_texts]
                    if join and template.label and not template.extract:  # more may follow
                        prompt_answers = [
                            template.first_word(text, question) for text in prompt_texts
                        ]
                    read.append(vote(prompt_answers, prompt_samples, template, question))
                # As they were encoded: a conversation's answer is found only then.
                questions = [prompt.question for prompt in row.prompts]
                prediction, answer = predicted(template, questions, read)
                record = record_of(encoder, row, answer, prediction, None)
                said = said[0] if len(said) == 1 else said
                records[number].append({"draw": number, **record, "generated": said})
                cut[number].append(row.without_text())
            if len(part) < len(rows):
                spool_prompts(records[number][len(records[number]) - len(draw) :], spool)
    scores = [score_records(template, draw, len(rows), answers) for draw in records]
    return FewShotScore(scores, {}, cut, time.perf_counter() - start)


def vote(
    answers: Sequence[str | None],
    written: Sequence[Written],
    template: PromptTemplate,
    question: Question | None = None,
) -> str | None:
    """The answer that most samples give (self-consistency, Wang et al. 2023, arXiv:2203.11171); of
    a tie the one with the likeliest sample. Samples without an answer do not vote, nor, where there
    are classes, those whose answer is no class's word.
    """
    keys = [template.read_label(answer, question) for answer in answers]
    if not template.label:
        keys = [
            None if answer is None else answer_key(template.metric, answer) for answer in answers
        ]
    counts = Counter(key for key in keys if key is not None)
    if not counts:
        return None
    best = max(
        (place for place, key in enumerate(keys) if key is not None),
        key=lambda place: (counts[keys[place]], written[place].log_likelihood),
    )
    return answers[best]


def predicted(
    template: PromptTemplate, questions: Sequence[Question], read: Sequence[str | None]
) -> tuple:
    """A row's prediction, from the answers read to its questions, and its gold answer."""
    if template.entity_spans:
        pairs = zip(questions, read, strict=True)
        said = [
            [question.asked, text]
            for question, answer in pairs
            for text in template.read_spans(answer)
        ]
        gold = [[question.asked, text] for question in questions for text in question.references]
        return said, gold
    if template.label:
        return template.read_label(read[0], questions[0]), questions[0].label
    return read[0], list(questions[0].references)
