"""Encodes questions as ids and labels with exact loss masks; answers are never cut.

A prompt over the budget first loses whole demonstrations (a conversation its oldest turns), then
the fields that the template names under `shorten` are cut, the longest first. What still does not
fit is left out and counted. Prompt and answer are encoded apart, so that the ids which generation
and scoring see are a prefix of the ids that were trained.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise

from recipelib.encoding.tokens import TextEncoder
from recipelib.prompts import Demonstration, PromptTemplate, Question, RowError, Turn
from recipelib.runtime import UserError, code_digest, digest

IGNORED = -100  # the label that the loss skips
_MORE = {"tool_calls", "reasoning_content"}  # what an assistant's turn may have beside its text
RENDERINGS = ("text", "chat")


class DoesNotFit(RowError):
    """What must not be cut (the instruction, the mask, the answer) is longer than the budget."""


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt that fits.

    Attributes:
        ids: what the model reads, up to where the answer begins.
        end: the end marker, at which generation stops.
        question: the question as it is asked, with its fields shortened.
        shortened: whether a field was cut.
        dropped: how many demonstrations were dropped.
    """

    ids: list[int]
    end: list[int]
    question: Question
    shortened: bool = False
    dropped: int = 0


@dataclass(frozen=True)
class TrainingExample:
    """What is trained of a question.

    Attributes:
        ids, labels: a label is the id in the answer and its end marker, and -100 elsewhere.
        question: as it is asked, with its fields shortened. Of a conversation it has the turns that
            are in the example; those of the assistant that are not learned there have the weight 0.
        phrasing: which of the template's prompts asks it.
    """

    ids: list[int]
    labels: list[int]
    question: Question
    phrasing: int = 0


@dataclass
class Counts:
    """What became of the rows: printed before training and kept in metrics.json.

    `examples`, `shortened` and `left_out` count questions, of which most tasks ask one per row. Of
    conversations, `examples` counts training examples; the other two count assistant turns.
    """

    rows: int = 0
    examples: int = 0
    shortened: int = 0
    left_out: int = 0
    dropped_demonstrations: int = 0
    tokens: int = 0
    supervised_tokens: int = 0

    def add_example(self, labels: Sequence[int]) -> int:
        """Count an example; gives how many of its tokens are supervised."""
        supervised = len(labels) - labels.count(IGNORED)
        self.examples += 1
        self.tokens += len(labels)
        self.supervised_tokens += supervised
        return supervised

    def __add__(self, other: Counts) -> Counts:
        names = (count.name for count in fields(Counts))
        return Counts(**{name: getattr(self, name) + getattr(other, name) for name in names})


class PromptEncoder:
    """Encodes the questions of one template for one tokenizer and one rendering.

    Args:
        max_length: the largest number of tokens of prompt, answer and end marker together.
        rendering: "text", or "chat": through the tokenizer's chat template.
        chat_template_kwargs: further arguments of the chat template.
    Raises:
        UserError: another rendering, or a template that does not fit the tokenizer.
    """

    def __init__(
        self,
        template: PromptTemplate,
        tokenizer,
        max_length: int,
        rendering: str = "text",
        chat_template_kwargs: Mapping | None = None,
    ):
        if rendering not in RENDERINGS:
            raise UserError(f"--rendering {rendering}: must be text or chat")
        self.text = TextEncoder(tokenizer, chat_template_kwargs)
        self.max_length, self.rendering = max_length, rendering
        self._take(template)

    def with_template(self, template: PromptTemplate) -> PromptEncoder:
        """The same encoder for another template.

        Raises:
            UserError: a template that does not fit the tokenizer.
        """
        other = copy.copy(self)
        other._take(template)
        return other

    def _take(self, template: PromptTemplate) -> None:
        tokenizer = self.text.tokenizer
        if template.conversation and tokenizer.chat_template is None:
            raise UserError(
                f"{template.path}: {template.conversation}: a conversation needs a chat template "
                f"and the tokenizer of {tokenizer.name_or_path} has none; pass a model that has"
            )
        self.template = template
        texts = [*template.prompts, *template.texts.values(), *(template.rationale or {}).values()]
        if token := next(filter(None, map(self.text.special_token, texts)), None):
            raise UserError(
                f"{template.path}: {token!r} is a control token of this model, and a template's "
                "text never becomes one; take it out, and pass --rendering chat for a chat, or "
                "write {{ mask }} for a mask"
            )
        self.chat = self.rendering == "chat" or template.conversation is not None

    @property
    def identity(self) -> str:
        """A key for all that the ids and labels of a question depend on."""
        own = (self.template.fields, self.max_length, self.rendering, self.text.identity)
        return digest(code_digest("prompts", "encoding"), own)

    # Prompt and answer

    def prompt(
        self,
        question: Question,
        reserve: int,
        demonstrations: Sequence[Demonstration] = (),
        *,
        phrasing: int = 0,
        window: bool = False,
    ) -> EncodedPrompt:
        """The prompt of a question, shortened so that an answer of `reserve` tokens and its end
        marker fit behind it. Of a conversation it is the prompt of the next turn, or of the last
        one if that is the assistant's: what stands there is the question's reference then.

        Args:
            demonstrations: solved examples in front; the first is dropped first.
            window: keep the answer's span when its context is cut, as training does; scoring must
                not know where the answer is.
        Raises:
            DoesNotFit: it cannot be shortened enough, or the answer would be cut out of its
                context.
        """

        if question.turns:
            return self._next_turn(question, reserve)

        def build(question: Question, demonstrations: Sequence[Demonstration]) -> list[int]:
            if self.chat:
                return self.text.chat_prompt(self._messages(question, demonstrations, phrasing))
            parts = [prompt + answer for prompt, answer in demonstrations]
            text = self.template.demonstrations["separator"].join(
                [*parts, self.template.prompt(question, phrasing)]
            )
            system = self.template.system(question)
            return self.text.text_prompt(f"{system}\n\n{text}" if system else text)

        kept = list(demonstrations)
        end = (
            self.text.chat_end(self._messages(question, kept, phrasing))
            if self.chat
            else self.text.end
        )
        budget = self.max_length - reserve - len(end)
        ids = build(question, kept)
        while len(ids) > budget and kept:
            kept.pop(0)
            ids = build(question, kept)
        asked = question
        if len(ids) > budget:
            asked, ids = self._shorten(
                question, budget, lambda shortened: build(shortened, kept), window
            )
        return EncodedPrompt(
            ids, end, asked, asked is not question, len(demonstrations) - len(kept)
        )

    def answer(self, text: str) -> list[int]:
        """Ids of an answer without its end marker; in a chat the text is stripped first."""
        return self.text.chat_answer(text) if self.chat else self.text.continuation(text)

    def candidates(self, question: Question, end: Sequence[int]) -> dict[str, list[list[int]]]:
        """For each class, the ids of the answers that stand for it.

        If one answer's ids are the beginning of another's, all get the end marker: without it the
        shorter answer would win by being shorter.
        """
        encoded = {
            label: [self.answer(text) for text in texts]
            for label, texts in question.candidates.items()
        }
        together = sorted(ids for texts in encoded.values() for ids in texts)
        if any(after[: len(ids)] == ids for ids, after in pairwise(together)):
            return {label: [ids + list(end) for ids in texts] for label, texts in encoded.items()}
        return encoded

    def longest_candidate(self, question: Question) -> int:
        """How many tokens the longest candidate of a question has; 0 if it has no candidates."""
        answers = (text for texts in question.candidates.values() for text in texts)
        return max((len(self.answer(text)) for text in answers), default=0)

    def _messages(
        self, question: Question, demonstrations: Sequence[Demonstration], phrasing: int
    ) -> list[Turn]:
        system = self.template.system(question)
        messages = [{"role": "system", "content": system}] if system else []
        for prompt, answer in demonstrations:
            messages.append({"role": "user", "content": prompt})
            messages.append({"role": "assistant", "content": answer.strip()})
        return [*messages, {"role": "user", "content": self.template.prompt(question, phrasing)}]

    def training_example(
        self, question: Question, demonstrations: Sequence[Demonstration] = (), *, phrasing: int = 0
    ) -> tuple[list[int], list[int], EncodedPrompt]:
        """Ids, labels and prompt of one question; a label is the id in the answer and its end
        marker, and -100 elsewhere.

        Raises:
            DoesNotFit: see `prompt`.
        """
        answer = self.answer(question.target)
        # Room for any class's answer, as in scoring: otherwise the length of a shortened prompt
        # would give the class away.
        reserve = max(len(answer), self.longest_candidate(question))
        prompt = self.prompt(question, reserve, demonstrations, phrasing=phrasing, window=True)
        target = answer + prompt.end
        return prompt.ids + target, [IGNORED] * len(prompt.ids) + target, prompt

    # Conversations

    def conversation(self, question: Question, counts: Counts) -> list[tuple[list[int], list[int]]]:
        """Ids and labels of a ready conversation. Every assistant turn is supervised, except those
        of weight 0; what follows the last supervised turn is left out.

        One example holds the whole conversation if the chat template only ever appends. Where later
        turns change how earlier ones are written, or earlier turns were dropped, an assistant turn
        becomes an example of its own, as generation will see it. An answer that does not fit even
        behind the last question alone is left out and counted.
        """
        return [(ids, labels) for ids, labels, *_ in self._conversation(question, counts)]

    def conversation_examples(self, question: Question, counts: Counts) -> list[TrainingExample]:
        """`conversation`, each example with its turns."""
        turns, examples = self._stripped(question.turns), []
        behind = int(turns[0]["role"] == "system")
        for ids, labels, start, learned in self._conversation(question, counts):
            places = [*range(behind), *range(behind + start, learned[-1] + 1)]
            shown = (
                {**turns[at], "weight": 0}
                if turns[at]["role"] == "assistant" and at not in learned
                else turns[at]
                for at in places
            )
            examples.append(TrainingExample(ids, labels, replace(question, turns=tuple(shown))))
        return examples

    def _conversation(
        self, question: Question, counts: Counts
    ) -> list[tuple[list[int], list[int], int, list[int]]]:
        """Ids and labels of a conversation's examples; the turn that each begins with, behind the
        system turn; and the places of the turns that are learned in it.
        """
        examples: list[tuple[list[int], list[int], int, list[int]]] = []
        turns = self._stripped(question.turns)
        guarded, tools = self.text.guard_turns(turns, question.tools)
        learned = [
            place
            for place, turn in enumerate(turns)
            if turn["role"] == "assistant" and turn.get("weight") != 0
        ]
        prompt_of = self.text.chat.prompts(guarded, learned, tools)
        places = [place for place in learned if turns[place].keys() & _MORE]
        writing_of = self.text.chat_writings(guarded, places, tools)
        start = 0  # the turn that the last prompt began with, behind the system turn
        for place in learned:
            turn, before, answer = turns[place], guarded[:place], []
            if turn.keys() & _MORE:
                target = writing_of(place)
            else:
                answer = self.text.chat_answer(turn["content"])
                target = answer + self.text.chat_end(before)
            try:
                budget = self.max_length - len(target)
                prompt, start = self._window(before, tools, budget, start, prompt_of)
            except DoesNotFit:  # nor will a later prompt that reaches back behind these turns
                counts.left_out += 1
                start = _last_question(before)
                continue
            if answer and place != learned[-1]:
                self.text.remember_answer(turn["content"], answer)
            counts.shortened += start > 0
            ids, labels = prompt + target, [IGNORED] * len(prompt) + target
            supervised = [place]
            if not start and examples and ids[: len(examples[-1][0])] == examples[-1][0]:
                _, earlier, _, supervised_before = examples.pop()
                labels[: len(earlier)] = earlier
                supervised = [*supervised_before, place]
            examples.append((ids, labels, start, supervised))
        return examples

    def _stripped(self, turns: Sequence[Turn]) -> list[Turn]:
        """The turns as the chat template can write them, the assistant's without the white space
        around them: so they are learned, and so later turns see them.
        """
        return [
            {**turn, "content": turn["content"].strip()} if turn["role"] == "assistant" else turn
            for turn in self.text.with_reasoning(turns)
        ]

    def _next_turn(self, question: Question, reserve: int) -> EncodedPrompt:
        """`prompt` of a conversation, which loses its oldest turns where it is too long."""
        turns = self._stripped(question.turns)
        guarded, tools = self.text.guard_turns(turns, question.tools)
        if turns[-1]["role"] == "assistant":
            *turns, last = turns
            *guarded, written = guarded
            said = last["content"]
            if last.keys() & _MORE:  # calls and reasoning as the model is to write them
                ids = self.text.chat_written(guarded, written, tools)[:-1]
                said = self.text.tokenizer.decode(ids, skip_special_tokens=True).strip()
            question = replace(question, references=(said,))
        end = self.text.chat_end(turns)
        prompt_of = self.text.chat.prompts(guarded, [len(turns)], tools)
        budget = self.max_length - reserve - len(end)
        ids, start = self._window(guarded, tools, budget, 0, prompt_of)
        return EncodedPrompt(ids, end, question, shortened=start > 0)

    def _window(
        self,
        turns: Sequence[Turn],
        tools: Sequence[Mapping],
        budget: int,
        guess: int,
        prompt_of: Callable[[int], str],
    ) -> tuple[list[int], int]:
        """The prompt without so many of the oldest turns that it fits; it begins with a user's
        turn, behind the system turn. And which of the turns behind the system turn that is.

        Args:
            turns, tools: from `TextEncoder.guard_turns`.
            guess: the turn that an earlier prompt began with. Later ones rarely begin before it, so
                few have to be tried from there on.
            prompt_of: gives the prompt of so many turns as text.
        Raises:
            DoesNotFit: the turns since the user's last are too long.
        """
        too_long = DoesNotFit(f"its last turns are longer than {self.max_length} tokens")
        if budget <= 0:
            raise too_long
        if not guess and len(ids := self.text.chat_ids(prompt_of(len(turns)))) <= budget:
            return ids, 0
        system = turns[:1] if turns[0]["role"] == "system" else []
        rest = turns[len(system) :]
        starts = [0, *(at for at, turn in enumerate(rest) if turn["role"] == "user" and at > 0)]

        def prompt(at: int) -> list[int] | None:
            ids = (
                self.text.chat_prompt([*system, *rest[starts[at] :]], tools, guarded=True)
                if at
                else self.text.chat_ids(prompt_of(len(turns)))
            )
            return ids if len(ids) <= budget else None

        at, last, step = starts.index(guess), len(starts) - 1, 1
        if guess and (ids := prompt(at)):
            while at and (longer := prompt(at - 1)):
                ids, at = longer, at - 1
            return ids, starts[at]
        if at == last or not (ids := prompt(last)):
            raise too_long
        # Too long from `at` on, short enough from `last` on. What lies between is tried in steps
        # that double, then halve: each renders what is left, so trying all would grow with the
        # square of the turns.
        while last - at > 1:
            middle = min(at + step, (at + last) // 2)
            if longer := prompt(middle):
                ids, last = longer, middle
            else:
                at, step = middle, 2 * step
        return ids, starts[last]

    # Masked models

    def cloze(
        self, question: Question, masks: int, demonstrations: Sequence[Demonstration] = ()
    ) -> tuple[list[int], list[int], EncodedPrompt]:
        """Ids with `masks` masks, the masks' positions, and the shortened question.

        Args:
            demonstrations: solved clozes in front, each as the text before its word, and the word
                with the text behind it; the first is dropped first.
        Raises:
            DoesNotFit: see `prompt`.
            UserError: the template has no cloze, or the tokenizer no mask.
        """
        if "cloze" not in self.template.texts:
            raise UserError(f"{self.template.path}: cloze: is missing; a masked model needs it")

        kept = [before + rest for before, rest in demonstrations]

        def build(question: Question) -> tuple[list[int], list[int]]:
            before, after = self.cloze_parts(question)
            before = self.template.demonstrations["separator"].join([*kept, before])
            return self.text.cloze(before, after, masks)

        while kept and len(build(question)[0]) > self.max_length:
            kept.pop(0)
        asked, _ = self._shorten(
            question, self.max_length, lambda shortened: build(shortened)[0], window=False
        )
        ids, places = build(asked)
        dropped = len(demonstrations) - len(kept)
        return ids, places, EncodedPrompt(ids, [], asked, asked is not question, dropped)

    def cloze_parts(self, question: Question) -> tuple[str, str]:
        """The text before and the text after the mask. The cloze is rendered with a mark that it
        does not hold otherwise, and divided there.
        """
        number, unmarked = 0, self.template.cloze(question, "")
        while (mark := f"\ufdd2{number}\ufdd3") in unmarked:
            number += 1
        before, separator, after = self.template.cloze(question, mark).partition(mark)
        if not separator or mark in after:
            raise UserError(f"{self.template.path}: cloze: must hold {{{{ mask }}}} once")
        return before, after

    def causal_cloze(self, question: Question) -> tuple[EncodedPrompt, dict[str, list[list[int]]]]:
        """The cloze for a causal model: the prompt that ends before the mask, and for each class
        the ids of its words, each with the rest of the text behind it.

        Raises:
            DoesNotFit: see `prompt`.
            UserError: the template has no cloze.
        """
        if "cloze" not in self.template.texts:
            raise UserError(f"{self.template.path}: cloze: is missing; --cloze needs it")

        def parts(question: Question) -> tuple[list[int], dict[str, list[list[int]]]]:
            before, after = self.cloze_parts(question)
            text = before.rstrip()
            space = before[len(text) :]
            return self.text.text_prompt(text), {
                label: [self.text.continuation(f"{space}{word}{after}") for word in words]
                for label, words in self.template.words(question).items()
            }

        def build(question: Question) -> list[int]:
            ids, follow = parts(question)
            continuations = (ids for encoded in follow.values() for ids in encoded)
            return ids + max(continuations, key=len)

        asked, _ = self._shorten(question, self.max_length, build, window=False)
        ids, follow = parts(asked)
        return EncodedPrompt(ids, [], asked, asked is not question), follow

    def pair(self, question: Question) -> tuple[list[int], list[int], EncodedPrompt]:
        """Ids, token types and the shortened question of a sentence pair.

        Raises:
            DoesNotFit: see `prompt`.
        """

        def build(question: Question) -> list[int]:
            return self.text.pair(*self.template.pair(question))[0]

        asked, _ = self._shorten(question, self.max_length, build, window=False)
        ids, types = self.text.pair(*self.template.pair(asked))
        return ids, types, EncodedPrompt(ids, [], asked, asked is not question)

    # Shortening

    def _shorten(
        self, question: Question, budget: int, build: Callable[[Question], list[int]], window: bool
    ) -> tuple[Question, list[int]]:
        """The question with its `shorten` fields cut, the longest first, until `build` returns at
        most `budget` ids; and these ids.

        Args:
            window: keep the answer's span in the context.
        Raises:
            DoesNotFit: see `prompt`.
        """
        ids = build(question)
        names, stuck = list(self.template.shorten), Counter()
        while len(ids) > budget:
            texts = {name: question.variables.get(name) for name in names}
            texts = {name: text for name, text in texts.items() if isinstance(text, str) and text}
            offsets = {name: self.text.offsets(text) for name, text in texts.items()}
            if not offsets:
                raise DoesNotFit(
                    f"{len(ids)} tokens are left with all cut that 'shorten' allows and "
                    f"{max(budget, 0)} fit; raise --max_length"
                )
            lengths = sorted((len(places) for places in offsets.values()), reverse=True)
            ties = lengths.count(lengths[0])
            name = max(offsets, key=lambda field, offsets=offsets: len(offsets[field]))
            # Cut down to the next longest field's length, then go on with both. If the last cut
            # changed nothing (white space, a field that this phrasing lacks), cut twice as much.
            step = min(lengths[0] - [*lengths, 0][ties], -((budget - len(ids)) // ties))
            count = max(step, 2 ** stuck[name])
            side, text = self.template.shorten[name], texts[name]
            spans = question.spans if name == self.template.context else ()
            if spans:
                first, last = min(spans)[0], max(end for _, end in spans)
                if window:
                    # Cut on the side of the answer that has more left, then on both.
                    left = sum(0 < end <= first for _, end in offsets[name])
                    right = sum(last <= start < len(text) for start, _ in offsets[name])
                    side = "left" if left > right else "right"
                    count = min(count, max(left, right), (count + abs(left - right) + 1) // 2)
                    if not count:
                        names.remove(name)
                        continue
            start, end = _cut(text, offsets[name], count, side)
            if spans and (first < start or last > end):
                raise DoesNotFit("its answer would be cut out of the context; raise --max_length")
            question = question.change(**{name: text[start:end]})
            if spans:
                question = replace(question, spans=tuple((a - start, b - start) for a, b in spans))
            before, ids = ids, build(question)
            stuck[name] = stuck[name] + 1 if ids == before else 0
        return question, ids


def _last_question(turns: Sequence[Turn]) -> int:
    """The place of the user's last turn among those behind the system turn."""
    place = max(at for at, turn in enumerate(turns) if turn["role"] == "user")
    return place - (turns[0]["role"] == "system")


def _cut(text: str, offsets: Sequence[tuple[int, int]], count: int, side: str) -> tuple[int, int]:
    """The [start, end) characters of a text that are left when `count` tokens are cut from a side;
    at least one character is cut.
    """
    if side == "left":
        start = offsets[count - 1][1] if count < len(offsets) else len(text)
        return max(start, 1), len(text)
    end = offsets[-count][0] if count < len(offsets) else 0
    return 0, min(end, len(text) - 1)
