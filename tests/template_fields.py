"""One small template of each kind, for tests that change a field of it."""

from recipelib.prompts.template import PromptTemplate

ASK = {"name": "task", "form": "generative", "prompt": "Q: {{ text }}", "answer": " {{ gold }}"}
SORT = {
    "name": "task",
    "form": "generative",
    "prompt": "Q: {{ text }}",
    "label": "label",
    "verbalizer": {"bad": ["terrible", "really bad"], "good": ["great"]},
}
PAIR = {**SORT, "form": "inference", "first": "{{ text }}", "second": "It is {{ word }}."}
PAIR.pop("prompt")
SPAN = {
    "name": "task",
    "form": "extractive",
    "prompt": "{{ context }}?",
    "context": "context",
    "references": "answers.text",
}
NAMES = {
    "name": "task",
    "form": "extractive",
    "prompt": "{{ sentence }} {{ type }}?",
    "context": "sentence",
    "spans": {"tokens": "tokens", "tags": "tags", "types": {"PER": ["person"], "LOC": ["place"]}},
}


def make(fields, **more):
    return PromptTemplate({**fields, **more}, "task.yaml")


def first(template, row, **options):
    return template.questions(row, **options)[0]


def without(fields, *keys):
    return {key: value for key, value in fields.items() if key not in keys}


def one_line(error):
    message = str(error.value)
    assert "\n" not in message
    return message
