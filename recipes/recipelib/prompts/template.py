"""PromptTemplate: one file describes a task, and every method of the collection reads that file.

A row of data becomes one or several `Question`s: one per entity type, one per candidate of a
sentence pair, otherwise a single one. A question renders as a prompt with its answer, as a cloze
with a mask, or as a sentence pair; `read_answer` and `read_label` read back what the model writes.
Tokens are the business of the room `encoding`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import yaml

from recipelib.prompts.columns import check_columns
from recipelib.prompts.conversations import read_history, read_tools, read_turns
from recipelib.prompts.options import read_options
from recipelib.prompts.questions import Question
from recipelib.prompts.sandbox import SecurityError, compile_expression, compile_text, variables_of
from recipelib.prompts.schema import CURE, TEXTS, check_fields, find_template, own_variables
from recipelib.prompts.values import RowError, as_list, class_name, plain, read_entities
from recipelib.runtime import UserError, load_yaml

# What a filter or an operator may raise for a value that does not fit it.
_MISFITS = (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, re.error)


def _missing(value: Any) -> str | None:
    """What stands in place of an answer, "null" or "empty"; None where there is one."""
    if value is None:
        return "null"
    return "empty" if isinstance(value, str) and not value.strip() else None


class PromptTemplate:
    """A task as its YAML file describes it; most fields are attributes of the same name."""

    def __init__(self, fields: Mapping[str, Any], path: Path | str = "template"):
        self.path = Path(path)
        self.fields = dict(fields)
        checked = check_fields(self.fields, self.path)
        self.name: str = checked["name"]
        self.form: str = checked["form"]
        self.description: str = checked.get("description", "")
        self.dataset: dict[str, str | None] = checked.get("dataset", {})
        self.columns: dict[str, str] = checked.get("columns", {})
        self.optional: set[str] = set(checked.get("optional", []))
        self.prompts: list[str] = checked.get("prompts", [])
        self.label: str | None = checked.get("label")
        self.verbalizer: dict[str, list[str]] = checked.get("verbalizer", {})
        self.shorten: dict[str, str] = checked["shorten"]
        self.demonstrations: dict[str, Any] = checked["demonstrations"]
        self.metrics: list[str] = checked["metric"]
        self.metric: str = self.metrics[0]
        self.messages: str | None = checked.get("messages")
        self.completion: str | None = checked.get("completion")
        self.history: str | None = checked.get("history")
        self.guessed: list[str] | None = checked.get("guessed")
        self.stop: list[str] = checked.get("stop", [])
        self.content_free: list[str] = checked.get("content_free", [])
        self.rationale: dict[str, str] | None = checked.get("rationale")
        self.extract: list[str] = checked.get("extract", [])
        self.context: str | None = checked.get("context")
        self.entity_spans: dict[str, Any] | None = checked.get("spans")
        self.negatives: int = checked.get("negatives", 0)
        self.texts: dict[str, str] = {key: checked[key] for key in TEXTS if key in checked}
        self._own = own_variables(checked)
        self._compiled = {key: compile_text(text) for key, text in self.texts.items()}
        self._prompts = [compile_text(text) for text in self.prompts]
        self._rationale = {key: compile_text(text) for key, text in (self.rationale or {}).items()}
        self.options: dict[str, str] = checked.get("options", {})
        self.expressions = {key: checked[key] for key in ("references", "start") if key in checked}
        self.expressions |= {f"options.{key}": text for key, text in self.options.items()}
        self._expressions = {k: compile_expression(text) for k, text in self.expressions.items()}

    @classmethod
    def load(cls, name_or_path: str, *, columns: Mapping[str, str] | None = None) -> PromptTemplate:
        """The template in a file, or the one of that name in `data_templates/`.

        Args:
            columns: template variable -> column; they override the file's own.
        Raises:
            UserError: no such file, or a mistake in it (one line: file, key, cure).
        """
        path = find_template(name_or_path)
        fields = load_yaml(path)
        own = fields.get("columns") or {}
        if columns and isinstance(own, dict):  # else the check says what is wrong with it
            fields["columns"] = {**own, **columns}
        return cls(fields, path)

    def with_columns(self, columns: Mapping[str, str]) -> PromptTemplate:
        """The template that reads some variables from other columns."""
        if not columns:
            return self
        own = self.fields.get("columns") or {}
        return PromptTemplate({**self.fields, "columns": {**own, **columns}}, self.path)

    def with_dataset(self, dataset: Mapping[str, str]) -> PromptTemplate:
        """The template whose default rows are these; itself if none are named."""
        if not dataset:
            return self
        return PromptTemplate({**self.fields, "dataset": dict(dataset)}, self.path)

    def without_rationale(self) -> PromptTemplate:
        """The template for the bare answer.

        Raises:
            UserError: the template has no rationale to leave out.
        """
        self._require_rationale()
        bare = {key: value for key, value in self.fields.items() if key != "rationale"}
        return PromptTemplate(bare, self.path)

    def with_rationale_behind(self) -> PromptTemplate:
        """The template whose answer is followed by the reasoning; both are one text to train on.

        Raises:
            UserError: the template has no rationale.
        """
        bare = self.without_rationale()  # whose answer may be the label's word by default
        answer = f"{bare.texts['answer']}\n{self.fields['rationale']['text'].lstrip(' ')}"
        return PromptTemplate({**bare.fields, "answer": answer}, self.path)

    def with_instruction(self, instruction: str) -> PromptTemplate:
        """The template with one more line in its `system` text."""
        own = self.fields.get("system")
        system = f"{own}\n{instruction}" if own is not None else instruction
        return PromptTemplate({**self.fields, "system": system}, self.path)

    @property
    def lacks_words(self) -> bool:
        """Whether the classes are still to be found in the rows, each of which is its own word."""
        return bool(self.label) and not self.verbalizer and not self.options

    def with_words(self, words: Mapping[str, list[str]]) -> PromptTemplate:
        """The template with this verbalizer."""
        return PromptTemplate({**self.fields, "verbalizer": dict(words)}, self.path)

    def with_stop(self, stop: str) -> PromptTemplate:
        """The template whose answers end at this text, too."""
        return PromptTemplate({**self.fields, "stop": [stop, *self.stop]}, self.path)

    def _require_rationale(self) -> None:
        if "rationale" not in self.fields:
            raise UserError(
                f"{self.path}: rationale: is missing; say there where the reasoning comes from, or "
                "take recipes/lora_sft.py for the bare answer"
            )

    def save(self, path: Path | str) -> None:
        """Write the fields, overrides included, as a template file."""
        text = yaml.safe_dump(self.fields, sort_keys=False, allow_unicode=True, width=100)
        Path(path).write_text(text, encoding="utf-8")

    # What a row must bring

    @cached_property
    def asks_each_word(self) -> bool:
        """Whether a sentence pair is asked once per candidate, whose word stands in `second`."""
        return self.form == "inference" and "word" in variables_of(self.texts["second"])

    @property
    def conversation(self) -> str | None:
        """The field that makes a row a conversation, of which every answer is learned: messages or
        history; None if it is none.
        """
        return "messages" if self.messages else "history" if self.history else None

    @cached_property
    def prompt_variables(self) -> set[str]:
        """The variables that are needed to ask: columns under the template's names for them."""
        if self.messages:
            return {self.messages} | variables_of(self.texts.get("system", ""))
        sources = [*self.prompts, *(self.texts[key] for key in self.texts if key != "answer")]
        needed = set().union(*map(variables_of, sources)) - self._own
        if self.entity_spans:
            needed = needed - {self.context} | {self.entity_spans["tokens"]}
        elif self.context:
            needed.add(self.context)
        for key in self.options:
            needed |= variables_of(self.options[key], expression=True)
        return needed | ({self.history} if self.history else set())

    @cached_property
    def content_variables(self) -> set[str]:
        """Those of `prompt_variables` that a text without content replaces: what the texts say of a
        row, not the options that they offer.
        """
        if not self.options:
            return self.prompt_variables
        texts = [*self.prompts, *(self.texts[key] for key in self.texts if key != "answer")]
        return set().union(*map(variables_of, texts)) - self._own

    @cached_property
    def answer_variables(self) -> set[str]:
        """The further variables that training and scoring need, but predicting does not."""
        needed = set().union(
            *map(variables_of, [self.texts.get("answer", ""), *(self.rationale or {}).values()])
        )
        for expression in self.expressions.values():
            needed |= variables_of(expression, expression=True)
        needed |= {name for name in (self.label, self.completion) if name}
        if self.entity_spans:
            needed.add(self.entity_spans["tags"])
        return needed - self._own - self.prompt_variables

    def column(self, variable: str) -> str:
        """The column that a variable is read from."""
        return self.columns.get(variable, variable)

    @cached_property
    def _read_columns(self) -> set[str]:
        """The columns that are read where a row has them."""
        names = self.prompt_variables | self.answer_variables
        if self.conversation:
            names = names | {"tools"} | ({"system"} - self.texts.keys())
        return set(map(self.column, names))

    def missing_columns(self, columns: Iterable[str], *, answers: bool = True) -> list[str]:
        """The columns that the template needs and the data lacks."""
        needed = self.prompt_variables | (self.answer_variables if answers else set())
        return sorted({self.column(name) for name in needed - self.optional} - set(columns))

    def variables(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """A row's values under the template's names; nulls and optional columns that are absent
        become empty text.
        """
        values = dict(row)
        values.update({name: row[column] for name, column in self.columns.items() if column in row})
        values.update({name: "" for name in self.optional if name not in values})
        return {name: "" if value is None else value for name, value in values.items()}

    def read_class(self, value: Any) -> str | None:
        """The verbalizer's key for the value of a label column; None if it has no such class."""
        names = (class_name(value), str(value).strip())  # true may be Python's True there
        return next((name for name in names if name in self.verbalizer), None)

    # Rows -> questions

    def questions(
        self, row: Mapping[str, Any], *, answers: bool = True, checked: bool = False
    ) -> list[Question]:
        """What the template asks about a row.

        Args:
            row: column -> value.
            answers: whether the row has to bring its answers; False for rows to predict.
            checked: whether this was done before, so that the row need not be rendered to see that
                it can be.
        Raises:
            RowError: a missing column, a label outside the verbalizer, an answer that is not a span
                of its context, text that cannot be rendered.
        """
        missing = self.missing_columns(row, answers=answers)
        if missing:
            has = ", ".join(map(repr, row)) or "none"
            if self.guessed is not None:
                raise RowError(
                    f"no column {missing[0]!r}; the row has {has}, and the template was guessed "
                    "from others; mend the row or leave it out"
                )
            raise RowError(
                f"no column {missing[0]!r}; the row has {has}: map the variable with columns in "
                f"{self.path.name} or --columns"
            )
        values, learn = self.variables(row), answers
        answers = answers or self._has_answers(row)
        unread = () if checked else self._check_columns(row)
        if answers:
            self._refuse_missing_answers(row)
        if self.conversation:
            return [self._converse(values, unread, answers, learn)]
        if self.entity_spans:
            questions = self._ask_entities(values, answers)
        elif self.form == "extractive":
            questions = [self._ask_span(values, answers)]
        elif self.options:
            questions = [self._ask_options(values, answers)]
        elif self.label:
            questions = self._ask_class(values, answers)
        else:
            questions = [Question(values)]
            if answers:
                answer = self._render(self._compiled["answer"], values, "answer")
                questions = [Question(values, answer=answer, references=(answer.strip(),))]
        if answers and self.rationale:
            parts = [self._render(self._rationale[key], values, key) for key in ("text", "join")]
            rationale = "".join(parts)
            questions = [
                dataclasses.replace(question, rationale=rationale) for question in questions
            ]
        # A row that cannot be rendered must fail here, before a model is loaded.
        for question in () if checked else questions:
            self._render_all(question)
        if unread:
            questions[0] = dataclasses.replace(questions[0], unread=tuple(unread))
        return questions

    def _render_all(self, question: Question) -> None:
        for phrasing in range(len(self.prompts)):
            self.prompt(question, phrasing)
        self.system(question)
        self.cloze(question, "")
        if self.form == "inference":
            self.pair(question)

    def check_content_free(self, row: Mapping[str, Any]) -> None:
        """
        Raises:
            UserError: the texts cannot be rendered with one of `content_free` in place of what a
                row says.
        """
        for text in self.content_free:
            question = self.questions(row, answers=False, checked=True)[0]
            try:
                self._render_all(question.change(**dict.fromkeys(self.content_variables, text)))
            except RowError as error:
                raise UserError(
                    f"{self.path}: content_free: {text!r} stands in place of each column, and a "
                    f"text cannot be rendered with it: {error}; leave content_free out"
                ) from None

    def _check_columns(self, row: Mapping[str, Any]) -> list[str]:
        """`check_columns`; where texts were guessed, nothing else may stand in their columns."""
        for column in self._guessed_texts:
            if isinstance(row.get(column), list | dict):
                raise RowError(
                    f"{column}: is a {type(row[column]).__name__}, not text as in the rows by "
                    "which the template was guessed; mend it, or pass --template"
                )
        return check_columns(row, self._read_columns, self.guessed, bool(self.conversation))

    @cached_property
    def _guessed_texts(self) -> list[str]:
        """The columns of a guessed prompt and answer."""
        if self.guessed is None or self.messages:
            return []
        names = (self.prompt_variables | self.answer_variables) - {self.history}
        return sorted(map(self.column, names))

    def _converse(
        self, values: Mapping[str, Any], unread: Iterable[str], answers: bool, learn: bool
    ) -> Question:
        """A conversation: ready turns, or prompt and answer behind a history.

        Args:
            answers: whether the row has the answer, or the completion, that has its own column.
            learn: False for turns that are to be answered.
        """
        keys: set[str] = set()
        if self.messages:
            names = filter(None, (self.messages, self.completion if answers else None))
            columns = {self.column(name): values[name] for name in names}
        else:
            history = self.column(self.history)
            columns = {
                history: read_history(values[self.history], history),
                "prompt": [{"role": "user", "content": self.prompt(Question(values))}],
            }
            if answers:
                answer = self._render(self._compiled["answer"], values, "answer")
                columns["answer"] = [{"role": "assistant", "content": answer.strip()}]
        own = "system" in self.texts
        system = self.system(Question(values)) if own else values.get("system")
        learn_all = self.history is not None
        how = {"learn_all": learn_all, "learn": learn, "unread": keys}
        turns = read_turns(columns, system=system, **how)
        tools = read_tools(values.get("tools"), self.column("tools"))
        more = (f"the turns' key {key!r}" for key in sorted(keys))
        return Question(values, turns=turns, tools=tools, unread=(*unread, *more))

    def _has_answers(self, row: Mapping[str, Any]) -> bool:
        columns = map(self.column, self.answer_variables - self.optional)
        if self.label and class_name(row.get(self.column(self.label))) == "-1":
            # GLUE's test files have -1 in place of a label.
            return "-1" in self.verbalizer
        return all(_missing(row.get(column)) is None for column in columns)

    def _refuse_missing_answers(self, row: Mapping[str, Any]) -> None:
        for name in self.answer_variables - self.optional:
            column = self.column(name)
            if what := _missing(row.get(column)):
                raise RowError(f"{column} is {what}; give the answer, or leave the row out")

    def _ask_class(self, values: dict, answers: bool) -> list[Question]:
        label = None
        if not self.verbalizer:
            raise UserError(
                f"{self.path}: verbalizer: is missing, and no rows were read to find the classes; "
                "write it"
            )
        if answers:
            value = values[self.label]
            label = self.read_class(value)
            if label is None:
                known = [*map(repr, list(self.verbalizer)[:8]), "..."]
                known = ", ".join(known[: len(self.verbalizer)])
                shown = class_name(value) if isinstance(value, bool) else repr(value)
                raise RowError(
                    f"{self.column(self.label)}: {shown} is not in the verbalizer ({known}); "
                    "add it there or mend it"
                )
        if self.asks_each_word:
            texts = {
                key: (self._render(self._compiled[key], values, key),) for key in ("yes", "no")
            }
            return [
                Question(
                    {**values, "word": words[0]},
                    answer=None if label is None else texts["yes" if label == asked else "no"][0],
                    label=label,
                    candidates=texts,
                    asked=asked,
                )
                for asked, words in self.verbalizer.items()
            ]
        candidates = self._fixed_candidates or self._candidates(values)
        answer = None if label is None else candidates[label][0]
        return [Question(values, answer=answer, label=label, candidates=candidates)]

    def _ask_options(self, values: dict, answers: bool) -> Question:
        found = [self._evaluate(f"options.{key}", values) for key in self.options]
        options = read_options(**dict(zip(self.options, found, strict=True)))
        given = values[self.label] if answers else None
        values["options"] = [{"letter": name, "text": text} for name, text in options.texts.items()]
        render = self._compiled["answer"]
        candidates = {
            name: (self._render(render, {**values, "word": text, "letter": name}, "answer"),)
            for name, text in options.texts.items()
        }
        if not answers:
            return Question(values, candidates=candidates, options=options)
        try:
            label = options.right(given)
        except RowError as error:
            raise RowError(f"{self.column(self.label)}: {error}") from None
        answer = candidates[label]
        # Of options that say the same, whichever is named, the first is found.
        label = next(name for name, other in candidates.items() if other == answer)
        return Question(values, answer[0], label=label, candidates=candidates, options=options)

    def _candidates(self, values: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
        render = self._compiled["answer"]
        return {
            key: tuple(self._render(render, {**values, "word": word}, "answer") for word in words)
            for key, words in self.verbalizer.items()
        }

    @cached_property
    def _fixed_candidates(self) -> dict[str, tuple[str, ...]] | None:
        """The candidates, where the answer's text depends on nothing but the word."""
        fixed = variables_of(self.texts["answer"]) <= {"word"}
        return self._candidates({}) if fixed else None

    def _ask_span(self, values: dict, answers: bool) -> Question:
        context = values[self.context] = str(values[self.context])
        if not answers:
            return Question(values)
        references = [str(text) for text in as_list(self._evaluate("references", values))]
        if not references:
            raise RowError("no gold answer (references is empty); leave the row out")
        starts = as_list(self._evaluate("start", values)) if "start" in self.expressions else []
        answer = references[0]
        try:
            start = int(starts[0]) if starts else context.find(answer)
        except (TypeError, ValueError):
            problem = f"{starts[0]!r} is no character offset; give a whole number"
            raise RowError(f"start: {problem}") from None
        if not answer or start < 0 or context[start : start + len(answer)] != answer:
            place = f"at character {start} of" if starts else "in"
            raise RowError(
                f"the answer {answer!r} does not stand {place} {self.context}; "
                "mend the answer or its start"
            )
        values["reference"] = answer
        return Question(
            values,
            answer=self._render(self._compiled["answer"], values, "answer"),
            references=tuple(references),
            spans=((start, start + len(answer)),),
        )

    def _ask_entities(self, values: dict, answers: bool) -> list[Question]:
        spec = self.entity_spans
        tokens = [str(token) for token in as_list(values[spec["tokens"]])]
        values[self.context] = " ".join(tokens)
        tags = as_list(values[spec["tags"]]) if answers else []
        entities = read_entities(tokens, tags, spec["types"]) if answers else []
        join, questions = spec["join"], []
        for kind, words in spec["types"].items():
            texts = [text for type_, text, _, _ in entities if type_ == kind]
            scope = {**values, "type": words[0]}
            answer = None
            if answers:
                scope["entities"] = join.join(texts) or spec["none"]
                if self.read_spans(scope["entities"]) != texts:
                    raise RowError(f"{texts} cannot be told apart; change spans.join or spans.none")
                answer = self._render(self._compiled["answer"], scope, "answer")
            spans = tuple((start, end) for type_, _, start, end in entities if type_ == kind)
            questions.append(
                Question(scope, answer=answer, references=tuple(texts), asked=kind, spans=spans)
            )
        return questions

    def words(self, question: Question) -> Mapping[str, Sequence[str]]:
        """For each class the words that stand for it: the verbalizer's, or, of a row with options
        of its own, what the answer says of each.
        """
        if question.options is None:
            return self.verbalizer
        return {name: [text.strip()] for name, (text,) in question.candidates.items()}

    def class_texts(self, question: Question) -> Mapping[str, str]:
        """For each class the text that stands for it; empty where that is the class's name."""
        if question.options is not None:
            return question.options.texts
        words = {label: words[0].strip() for label, words in self.verbalizer.items()}
        return words if any(plain(word) != plain(label) for label, word in words.items()) else {}

    # Questions -> text

    def _render(self, compiled, values: Mapping[str, Any], key: str) -> str:
        try:
            return compiled(values)
        except SecurityError as error:
            raise UserError(f"{self.path}: {key}: {error}; {CURE}") from None
        except jinja2.UndefinedError as error:
            raise RowError(f"{key}: {error.message}; the template needs it") from None
        except jinja2.TemplateRuntimeError as error:  # Jinja looks filters up when it runs
            raise UserError(f"{self.path}: {key}: {error.message} See Jinja's filters") from None
        except _MISFITS as error:
            problem = " ".join(str(error).split())
            raise RowError(f"{key}: {problem}; the value does not fit the template") from None

    def _evaluate(self, key: str, values: Mapping[str, Any]) -> Any:
        value = self._render(lambda scope: self._expressions[key](scope), values, key)
        if isinstance(value, jinja2.Undefined):
            what = self.expressions[key]
            raise RowError(f"{key}: {what} is not there; mend the row or the expression")
        return value

    def text(self, key: str, question: Question, **more: Any) -> str:
        """One of the template's texts, rendered for a question; empty if the template lacks it."""
        scope = {**question.variables, **more}
        if self.form == "inference":
            for name in ("first", "second", "question"):
                if name in self._compiled and key not in ("first", "second"):
                    scope[name] = self._render(self._compiled[name], scope, name)
        if key.startswith("prompt"):
            return self._render(self._prompts[int(key[6:] or 0)], scope, "prompt")
        return self._render(self._compiled[key], scope, key) if key in self._compiled else ""

    def prompt(self, question: Question, phrasing: int = 0) -> str:
        """The prompt; `phrasing` picks one of `prompts`."""
        return self.text(f"prompt{phrasing}", question)

    def system(self, question: Question) -> str:
        """The instruction, empty where the template has none."""
        return self.text("system", question)

    def cloze(self, question: Question, mask: str) -> str:
        """The text with `mask` where the label word belongs."""
        return self.text("cloze", question, mask=mask)

    def pair(self, question: Question) -> tuple[str, str]:
        """The two texts of the inference form."""
        return self.text("first", question), self.text("second", question)

    # Text -> answers

    def read_answer(self, generated: str) -> str | None:
        """The answer in what a model wrote: cut at `stop`, found by `extract` (the last match of
        the first pattern that matches), stripped. None if the template has patterns and none
        matches.
        """
        for stop in self.stop:
            generated = generated.partition(stop)[0]
        for pattern in self.extract:
            matches = list(re.finditer(pattern, generated))
            if matches:
                whole = matches[-1].group()
                return next((group for group in matches[-1].groups() if group), whole).strip()
        return None if self.extract else generated.strip()

    def read_label(self, answer: str | None, question: Question | None = None) -> str | None:
        """The class that has the answer among its words, as `plain` compares them, or the option
        that the answer names or repeats; None if there is none.
        """
        if answer is None:
            return None
        if question and question.options:
            return question.options.read(answer)
        word, classes = plain(answer), self.verbalizer.items()
        return next((label for label, words in classes if word in map(plain, words)), None)

    def first_word(self, generated: str, question: Question) -> str | None:
        """The label word that stands first in what a model wrote; of several that begin there, the
        longest. Of a row's own options their texts, or their names, which are A, not a.
        """
        names: Iterable[str] = ()
        words = (word for words in self.verbalizer.values() for word in words)
        if question.options:
            names, words = question.options.texts.keys(), question.options.texts.values()
        longest_first = sorted((word.strip() for word in words), key=len, reverse=True)
        either = f"(?i:{'|'.join(map(re.escape, longest_first))})"
        either = "|".join([either, *map(re.escape, names)])
        match = re.search(rf"(?<!\w)(?:{either})(?!\w)", generated)
        return match.group() if match else None

    def read_spans(self, answer: str | None) -> list[str]:
        """The entities named in an answer of a `spans` template."""
        spec = self.entity_spans
        if answer is None or answer.strip() == spec["none"].strip():
            return []
        parts = [part.strip() for part in answer.split(spec["join"].strip() or spec["join"])]
        return [part for part in parts if part]
