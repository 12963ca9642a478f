"""Finds a template file and checks its fields: every mistake is one line that names the file, the
key and the cure.

The fields are described in data_templates/README.md; `template.py` says what they mean for a row.
"""

import copy
import difflib
import re
from pathlib import Path
from typing import Any

import jinja2

from recipelib.prompts.options import check_options
from recipelib.prompts.sandbox import SecurityError, compile_expression, compile_text, variables_of
from recipelib.prompts.values import class_name, plain
from recipelib.runtime import UserError

TEMPLATE_FOLDER = Path(__file__).resolve().parents[3] / "data_templates"

FORMS = ("generative", "extractive", "inference")
SAMPLERS = ("first", "random", "balanced", "nearest")
CLASS_METRICS = ("accuracy", "macro_f1", "matthews", "f1 CLASS")
METRICS = (
    *CLASS_METRICS,
    "exact_match",
    "numeric_match",
    "squad",
    "entity_f1",
    "loss",
)

# Fields whose text is a Jinja template, and fields that are a Jinja expression, whose value is used
# as it is.
TEXTS = ("system", "prompt", "answer", "cloze", "first", "second", "question", "yes", "no")
EXPRESSIONS = ("references", "start")
CURE = "a template may use its variables and what recipelib/prompts/sandbox.py allows"

KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(TEXTS + EXPRESSIONS, (str,)),
    **dict.fromkeys(("name", "description", "form", "label", "context"), (str,)),
    **dict.fromkeys(("messages", "completion", "history"), (str,)),
    **dict.fromkeys(("dataset", "columns", "verbalizer", "demonstrations", "rationale"), (dict,)),
    **dict.fromkeys(("optional", "prompts", "stop", "content_free", "guessed"), (list,)),
    "extract": (list,),
    "shorten": (list, dict),
    "metric": (str, list),
    "spans": (dict,),
    "options": (str, list, dict),
    "negatives": (int,),
}
_INNER = {
    "dataset": ("path", "name", "revision", "train", "eval", "field", "encoding"),
    "demonstrations": ("k", "sampler", "separator"),
    "rationale": ("text", "join"),
    "spans": ("tokens", "tags", "types", "join", "none"),
}


def find_template(name_or_path: str) -> Path:
    """The file of a template: a path, or the name of a file in `data_templates/`."""
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        return path
    inside = TEMPLATE_FOLDER / f"{name_or_path}.yaml"
    if inside.is_file():
        return inside
    known = sorted(file.stem for file in TEMPLATE_FOLDER.glob("*.yaml"))
    close = difflib.get_close_matches(name_or_path, known, 1)
    hint = (
        f"did you mean {close[0]!r}?"
        if close
        else f"pass a .yaml file or one of {', '.join(known)}"
    )
    raise UserError(f"--template {name_or_path}: no such template; {hint}")


def check_fields(fields: dict[str, Any], path: Path) -> dict[str, Any]:
    """The fields of a template with their defaults filled in.

    Raises:
        UserError: an unknown or missing key, a value of the wrong type, text that is not Jinja or
            that leaves the sandbox, fields that contradict one another.
    """

    def wrong(key: str, problem: str) -> UserError:
        return UserError(f"{path}: {key}: {problem}".replace("\n", " "))

    fields = copy.deepcopy(fields)
    for key, value in fields.items():
        if key not in KINDS:
            close = difflib.get_close_matches(key, KINDS, 1)
            hint = (
                f"did you mean {close[0]!r}?"
                if close
                else f"known keys: {', '.join(sorted(KINDS))}"
            )
            raise wrong(key, f"unknown key; {hint}")
        if not isinstance(value, KINDS[key]) or isinstance(value, bool):
            names = {
                "str": "text",
                "dict": "keys and values",
                "list": "a list",
                "int": "a whole number",
            }
            kinds = " or ".join(names[kind.__name__] for kind in KINDS[key])
            raise wrong(key, f"must be {kinds}, not {value!r}; put text into quotes")
        for inner, content in value.items() if key in _INNER else ():
            if inner not in _INNER[key]:
                raise wrong(f"{key}.{inner}", f"unknown key; known keys: {', '.join(_INNER[key])}")
            if inner in ("k", "types") or (content is None and key == "dataset"):
                continue
            if not isinstance(content, str):
                cure = f'write "{content}" in quotes'
                if isinstance(content, bool):  # YAML's yes, no, on, off, true and false
                    cure = "put what stands there into quotes"
                raise wrong(f"{key}.{inner}", f"{content!r} is not text; {cure}")
    if not fields.get("name"):
        raise wrong("name", "is missing; give the task a short name")
    # Runs write files under this name.
    if Path(fields["name"]).name != fields["name"] or fields["name"] == "..":
        raise wrong("name", f"{fields['name']!r} is no plain name; leave out slashes")
    if fields.get("form") not in FORMS:
        raise wrong("form", f"must be one of {', '.join(FORMS)}, not {fields.get('form')!r}")

    for key in ("optional", "prompts", "stop", "content_free", "extract", "guessed"):
        for item in fields.get(key, []):
            if not isinstance(item, str):
                raise wrong(key, f"YAML reads an item as {item!r}, not as text; put it into quotes")
            if not item and key in ("stop", "extract"):
                raise wrong(key, "an empty text matches everywhere; leave it out")
    for name, column in fields.get("columns", {}).items():
        if not isinstance(column, str):
            raise wrong(f"columns.{name}", f"must name a column, not {column!r}")

    if "options" in fields:
        check_options(fields, wrong)
    _check_words(fields, wrong)
    _check_jinja(fields, wrong)
    _check_shape(fields, wrong)
    return fields


def own_variables(fields: dict[str, Any]) -> set[str]:
    """The variables that a template's texts may use although no column brings them."""
    names = {"mask"}
    if "label" in fields:
        names.add("word")
    if "options" in fields:
        names |= {"options", "letter"}
    if fields["form"] == "inference":
        names |= {"first", "second", "question"} & fields.keys()
    if fields["form"] == "extractive":
        names |= {"type", "entities"} if "spans" in fields else {"reference"}
    return names


def _check_words(fields: dict, wrong) -> None:
    """Check that label words are text (YAML reads [yes, no, off] as booleans), and that no word
    stands for two labels. A single word becomes a list.
    """
    tables = [("verbalizer", fields["verbalizer"])] if "verbalizer" in fields else []
    if "spans" in fields:
        tables.append(("spans.types", fields["spans"].get("types")))
    for key, table in tables:
        if not isinstance(table, dict) or not table:
            raise wrong(key, "must map each label to its words")
        for label, words in table.items():
            if not isinstance(label, str):  # from Python; YAML's are refused when it is read
                problem = f"is not text; write {class_name(label)!r}"
                raise wrong(f"{key}.{label}", problem)
            if isinstance(words, str):
                table[label] = words = [words]
            if not isinstance(words, list) or not words:
                raise wrong(f"{key}.{label}", "needs one word or a list of words")
            for word in words:
                if not isinstance(word, str):
                    problem = f"YAML reads a word as {word!r}, not as text; put it into quotes"
                    raise wrong(f"{key}.{label}", problem)
                if not word.strip():
                    raise wrong(f"{key}.{label}", "an empty word; name one")
    seen: dict[str, str] = {}
    for label, words in fields.get("verbalizer", {}).items():
        for word in words:
            other = seen.setdefault(plain(word), label)
            if other != label:
                raise wrong(
                    f"verbalizer.{label}",
                    f"the word {word!r} also stands for {other!r}; give each its own",
                )


def _check_shape(fields: dict, wrong) -> None:
    """Check that a form has the fields it needs and that fields fit together; fill in the defaults
    that follow from the form.
    """
    form, given = fields["form"], set(fields)
    if "prompts" in fields:
        if "prompt" in fields:
            raise wrong("prompts", "stands beside 'prompt'; keep one of them")
        if not fields["prompts"]:
            raise wrong("prompts", "is empty; give at least one phrasing")
    elif "prompt" in fields:
        fields["prompts"] = [fields["prompt"]]
    elif form == "inference":
        fields["prompts"] = [
            "{{ first }}\n{{ second }}" + ("\n{{ question }}" if "question" in fields else "")
        ]
    elif "messages" not in fields:
        raise wrong("prompt", "is missing; it holds the text that the model is asked")
    fields.pop("prompt", None)

    if "verbalizer" in fields and "label" not in fields:
        raise wrong(
            "label",
            "is missing: 'label' names the class's column, 'verbalizer' gives each class its words",
        )
    if "messages" in fields and (form != "generative" or "label" in fields or "answer" in fields):
        raise wrong(
            "messages",
            "a ready conversation brings its own answers: form generative, no answer, no label",
        )
    if "completion" in fields and "messages" not in fields:
        raise wrong("completion", "names the turns behind those of 'messages'; name these too")
    if "history" in fields:
        others = ("messages", "label", "rationale", "cloze", "shorten", "prompts")
        beside = next((key for key in others if key in given), None)
        if form != "generative" or beside:
            raise wrong(
                "history",
                f"goes with a prompt and an answer of free text, not with {beside or form}",
            )
    if form == "inference":
        for key in ("first", "second", "label"):
            if key not in fields:
                raise wrong(
                    key, "is missing; the form asks whether 'first' and 'second' belong together"
                )
        fields.setdefault("yes", " yes")
        fields.setdefault("no", " no")
        fields.setdefault("negatives", 1)
        if fields["negatives"] < 0:
            raise wrong("negatives", "must be 0 or more")
    if form == "extractive":
        if "context" not in fields:
            raise wrong(
                "context", "is missing; it names the variable that the answer must be a span of"
            )
        if ("references" in fields) == ("spans" in fields):
            raise wrong("references", "an extractive template has either 'references' or 'spans'")
        if "spans" in fields:
            for key in ("tokens", "tags", "types"):
                if key not in fields["spans"]:
                    raise wrong(f"spans.{key}", "is missing")
            fields["spans"] = {"join": "; ", "none": "none", **fields["spans"]}
        fields.setdefault("answer", " {{ entities }}" if "spans" in fields else " {{ reference }}")
    if "label" in fields:
        fields.setdefault("answer", " {{ word }}")
    if "answer" not in fields and "messages" not in fields:
        raise wrong("answer", "is missing; it holds the text that the model is to write")
    for key in ("text", "join") if "rationale" in fields else ():
        if key not in fields["rationale"]:
            raise wrong(
                f"rationale.{key}",
                "is missing; 'text' is the reasoning, 'join' leads to the answer",
            )
    for text in fields.get("prompts", ()):
        if text != text.rstrip():
            raise wrong("prompt", "ends in white space; write |- and let the answer begin with it")
    if "cloze" in fields and "mask" not in variables_of(fields["cloze"]):
        raise wrong("cloze", "has no {{ mask }}; place it where the label word belongs")

    shorten = fields.get("shorten", [])
    for name in shorten:
        if not isinstance(name, str):
            raise wrong("shorten", f"{name!r} is not text; name fields of the template")
    sides = shorten if isinstance(shorten, dict) else dict.fromkeys(shorten, "right")
    for name, side in sides.items():
        if not isinstance(name, str) or side not in ("right", "left"):
            raise wrong("shorten", f"{name}: must be right or left, the side that is cut")
    asked = [fields[key] for key in TEXTS if key in fields and key != "answer"]
    texts = [*fields.get("prompts", ()), *asked]
    known = set().union(*map(variables_of, texts)) - own_variables(fields)
    for name in sides.keys() - known:
        raise wrong(
            "shorten", f"{name!r} stands in no text; name one of {', '.join(sorted(known))}"
        )
    fields["shorten"] = sides

    demonstrations = {
        "k": 4,
        "sampler": "first",
        "separator": "\n\n",
        **fields.get("demonstrations", {}),
    }
    if not isinstance(demonstrations["k"], int) or demonstrations["k"] < 0:
        raise wrong("demonstrations.k", "must be a whole number, 0 or more")
    if demonstrations["sampler"] not in SAMPLERS:
        raise wrong("demonstrations.sampler", f"must be one of {', '.join(SAMPLERS)}")
    if not isinstance(demonstrations["separator"], str):
        raise wrong("demonstrations.separator", "must be text")
    fields["demonstrations"] = demonstrations

    if "label" in fields:
        default = "accuracy"
    elif form == "extractive":
        default = "entity_f1" if "spans" in fields else "squad"
    else:
        default = "loss" if {"messages", "history"} & given else "exact_match"
    _check_metrics(fields, default, wrong)


def _check_metrics(fields: dict, default: str, wrong) -> None:
    """Check that a template's metrics exist and fit it; they become a list."""
    metrics = fields.get("metric", default)
    fields["metric"] = metrics = [metrics] if isinstance(metrics, str) else metrics
    if not metrics:
        raise wrong("metric", "is empty; name at least one")
    for name in metrics:
        kind, _, of = name.partition(" ") if isinstance(name, str) else (name, "", "")
        known = "f1 CLASS" if kind == "f1" and of else name
        if known not in METRICS:
            raise wrong("metric", f"must be one of {', '.join(METRICS)}, not {name!r}")
        if ("label" in fields) != (known in CLASS_METRICS):
            problem = f"{', '.join(CLASS_METRICS)} go with a label, others not"
            raise wrong("metric", f"{name} does not fit: {problem}")
        if known == "f1 CLASS" and of not in fields.get("verbalizer", {of: []}):
            classes = ", ".join(map(repr, list(fields["verbalizer"])[:8]))
            raise wrong("metric", f"{name}: {of!r} is no class of the verbalizer ({classes})")
        if name != "loss" and ("spans" in fields) != (name == "entity_f1"):
            raise wrong("metric", f"{name} does not fit: entity_f1 goes with spans, others not")
        if name == "loss" and len(metrics) > 1:
            raise wrong("metric", "loss compares no answers; let it stand alone")
        if metrics.count(name) > 1:
            raise wrong("metric", f"{name} stands twice; keep one")


def _check_jinja(fields: dict, wrong) -> None:
    texts = [(key, fields[key]) for key in TEXTS if key in fields]
    texts += [("prompts", text) for text in fields.get("prompts", [])]
    texts += [(f"rationale.{key}", text) for key, text in fields.get("rationale", {}).items()]
    for key, text in texts:
        try:
            compile_text(text)
        except SecurityError as error:
            raise wrong(key, f"{error}; {CURE}") from None
        except jinja2.TemplateSyntaxError as error:
            raise wrong(key, f"line {error.lineno}: {error.message}; see Jinja's syntax") from None
        except (RecursionError, SyntaxError):
            raise wrong(key, "is nested too deeply; write it more simply") from None
    expressions = {key: fields[key] for key in EXPRESSIONS if key in fields}
    expressions |= {f"options.{key}": text for key, text in fields.get("options", {}).items()}
    for key, expression in expressions.items():
        try:
            compile_expression(expression)
        except SecurityError as error:
            raise wrong(key, f"{error}; {CURE}") from None
        except (jinja2.TemplateSyntaxError, RecursionError) as error:
            raise wrong(
                key, f"{error}; write an expression without braces, such as answers.text"
            ) from None
    for pattern in fields.get("extract", []):
        try:
            re.compile(pattern)
        except re.error as error:
            raise wrong("extract", f"{pattern!r} is no regular expression: {error}") from None
