"""Options that differ from row to row: where they stand in a row, and which of them is right."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any

from recipelib.prompts.values import RowError, as_list, class_name, is_empty, plain, read_json

FIELDS = ("texts", "names")


def check_options(fields: dict[str, Any], wrong) -> None:
    """Check a template's `options` and write both of its fields as expressions.

    Raises:
        UserError: they are not what the README describes, or stand beside fields that need classes
            which all rows share.
    """
    options = fields["options"]
    if not isinstance(options, dict):
        options = {"texts": options}
    for key, value in options.items():
        if key not in FIELDS:
            raise wrong(f"options.{key}", f"unknown key; known keys: {', '.join(FIELDS)}")
        if isinstance(value, list):
            options[key] = _as_expression(key, value, wrong)
        elif not isinstance(value, str):
            raise wrong(f"options.{key}", f"must be an expression or a list, not {value!r}")
    if "texts" not in options:
        raise wrong("options.texts", "is missing; it says where a row's options stand")
    fields["options"] = options
    if fields["form"] != "generative":
        raise wrong("options", f"belong to the form generative, not to {fields['form']}")
    for other in ("verbalizer", "messages", "history"):
        if other in fields:
            raise wrong("options", f"stand beside {other!r}; keep one of them")
    if "label" not in fields:
        raise wrong("label", "is missing; it names the column that tells which option is right")
    if fields.get("metric", "accuracy") != "accuracy":
        raise wrong("metric", "of options is accuracy: they are no classes that rows share")


def _as_expression(key: str, items: list, wrong) -> str:
    """A list in YAML: of the columns that hold the texts, or the names themselves."""
    if key == "names":
        return f"[{', '.join(repr(str(item)) for item in items)}]"
    for item in items:
        if not (isinstance(item, str) and item.isidentifier()):
            problem = f"{item!r} is no plain name of a column; give it one under 'columns'"
            raise wrong("options", problem)
    return f"[{', '.join(items)}]"


@dataclass(frozen=True)
class Options:
    """A row's options.

    Attributes:
        names: of all places, those of empty options included.
        texts: name -> text of the options that are not empty.
    """

    names: list[str]
    texts: dict[str, str]

    def right(self, value: Any) -> str:
        """The name of the right option.

        Args:
            value: its name, its index from 0, its text, or a list with a 1 in its place.
        Raises:
            RowError: it is none of these, or could be an index as well as a text.
        """
        known = ", ".join(f"{name} ({text!r})" for name, text in self.texts.items())
        cure = "mend it, or name the options with options.names"
        found = self._name_of(value, cure)
        if found not in self.texts:
            what = "is no option's name, index or text" if found is None else "is an empty option"
            raise RowError(f"{value!r} {what} of {known}; {cure}")
        return found

    def _name_of(self, value: Any, cure: str) -> str | None:
        if isinstance(value, list | tuple):
            ones = [place for place, score in enumerate(value) if score == 1]
            fits = len(value) == len(self.names) and len(ones) == 1
            return self.names[ones[0]] if fits else None
        name = option_name(value)
        by_text = [key for key, text in self.texts.items() if plain(text) == plain(str(value))]
        by_case = [key for key in self.texts if key.casefold() == name.casefold()]
        if name in self.names or len(by_case) == 1:
            return name if name in self.names else by_case[0]
        if name.isdecimal() and int(name) < len(self.names):
            if isinstance(value, str) and by_text and by_text[0] != self.names[int(name)]:
                raise RowError(f"{value!r} is an index and an option's text as well; {cure}")
            return self.names[int(name)]
        return by_text[0] if by_text else None

    def read(self, answer: str | None) -> str | None:
        """The name of the option that a written answer names or repeats; None if there is none."""
        if answer is None:
            return None
        name = option_name(answer).casefold()
        by_name = (key for key in self.texts if key.casefold() == name)
        by_text = (key for key, text in self.texts.items() if plain(text) == plain(answer))
        return next(by_name, None) or next(by_text, None)


def read_options(texts: Any, names: Any = None) -> Options:
    """A row's options.

    Args:
        texts: a list of texts; a mapping of name and text, or of `text` and `label` to lists, as
            many data sets of the hub have it; a list of such mappings; or JSON text of these.
        names: a list of names, where `texts` has none; A, B, C, ... by default.
    Raises:
        RowError: it is nothing of this kind, or fewer than two options.
    """
    if isinstance(texts, str):
        if not texts.lstrip().startswith(("[", "{")):
            raise RowError(
                f"options: {texts!r} is a text; split it with an expression such as "
                "choices.split('|')"
            )
        texts = read_json(texts, "options")
    if isinstance(texts, Mapping):
        if any(not isinstance(value, str) and value is not None for value in texts.values()):
            names, texts = (_field(texts, key) for key in ("label", "text"))
        else:
            names, texts = list(texts), list(texts.values())
    texts = as_list(texts)
    if any(isinstance(option, Mapping) for option in texts):
        names = [_field(option, "label") for option in texts]
        texts = [_field(option, "text") for option in texts]
    names = [*map(option_name, ascii_uppercase if names is None else as_list(names))]
    if len(names) < len(texts):
        raise RowError(f"options: {len(texts)} texts and {len(names)} names; give each a name")
    names = names[: len(texts)]
    if len(set(names)) < len(names):
        raise RowError(f"options: two have the same name ({', '.join(names)}); give each its own")
    pairs = zip(names, texts, strict=True)
    named = {name: str(text).strip() for name, text in pairs if not is_empty(text)}
    if len(named) < 2:
        raise RowError(f"options: there are {len(named)}; give at least two, or leave the row out")
    return Options(names, named)


def _field(option: Any, key: str) -> Any:
    if not isinstance(option, Mapping) or key not in option:
        has = ", ".join(map(repr, option)) if isinstance(option, Mapping) else repr(option)
        raise RowError(
            f"options: no {key!r} beside {has}; say where they stand with options.texts and "
            "options.names"
        )
    return option[key]


def option_name(value: Any) -> str:
    """An option's name without what is written around it: "(B)" and "B." become "B"."""
    return class_name(value).strip(" ().:\n\t")
