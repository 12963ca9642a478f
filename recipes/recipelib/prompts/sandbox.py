"""Jinja2 for text that a user or a download brings: data stays data and Python stays out of reach.

`ImmutableSandboxedEnvironment` is the class that transformers uses for chat templates. On top of it
only the statements, filters and methods named here exist, undefined variables are errors,
underscore attributes are refused when the template is loaded rather than at some later row, and no
operation makes a huge text or number out of small ones. What is not limited is time: nested loops
over long data, or a regular expression that backtracks, can run for as long as they like.
"""

import re
from collections.abc import Mapping

from jinja2 import StrictUndefined, TemplateSyntaxError, Undefined, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.visitor import NodeTransformer

# What a prompt needs. Left out are those that reach attributes by their names (attr, format) or
# make a text as long as they are told to (center, indent, ljust, zfill).
FILTERS = (
    *("abs", "capitalize", "default", "dictsort", "first", "float", "int", "items", "last"),
    *("length", "list", "lower", "map", "max", "min", "reject", "rejectattr", "reverse", "select"),
    *("selectattr", "sort", "sum", "title", "trim", "truncate", "unique", "upper", "wordcount"),
)
METHODS = (
    *("capitalize", "casefold", "count", "endswith", "find", "get", "index", "isalpha", "isdigit"),
    *("islower", "isupper", "items", "join", "keys", "lower", "lstrip", "partition"),
    *("removeprefix", "removesuffix", "replace", "rfind", "rpartition", "rsplit", "rstrip"),
    *("split", "splitlines", "startswith", "strip", "title", "upper", "values"),
)
_STATEMENTS = (nodes.Output, nodes.If, nodes.For, nodes.Assign)
_LONGEST = 10_000_000  # characters or elements
_LARGEST = 2**64


def _limit(length: int) -> None:
    if length > _LONGEST:
        raise SecurityError(f"a value of over {_LONGEST:,} characters or elements")


def _limit_nested(value):
    """The value itself, unless its text would be too long: lists that hold one another grow tenfold
    with every line of a template.
    """
    length, rest = 0, [value]
    while rest:
        one = rest.pop()
        if isinstance(one, dict):
            rest += [*one.keys(), *one.values()]
        elif isinstance(one, list | tuple):
            rest += one
        length += len(one) + 8 if isinstance(one, str | list | tuple | dict) else 8
        _limit(length)
    return value


def _written(value):
    """What an expression writes: nothing for a null, and no Python for a method."""
    if callable(value) and not isinstance(value, Undefined):
        raise TypeError(f"{getattr(value, '__name__', value)} is a method; write () behind it")
    return "" if value is None else value


class _Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset("+*%")

    def getattr(self, obj, attribute):
        # What the data holds goes before a dictionary's methods: order.items, meta.values.
        if isinstance(obj, Mapping) and attribute in obj:
            return obj[attribute]
        return super().getattr(obj, attribute)

    def call_binop(self, context, operator, left, right):
        if operator == "+":
            _limit_nested([left, right])
        elif operator == "*" and (hasattr(left, "__len__") or hasattr(right, "__len__")):
            raise SecurityError("text or a list times a number is not allowed")
        elif operator == "%" and hasattr(left, "__len__"):
            raise SecurityError("formatting with % is not allowed")
        result = super().call_binop(context, operator, left, right)
        if isinstance(result, int) and abs(result) > _LARGEST:
            raise SecurityError("a number of over 64 bits")
        return result

    def call(self, context, method, *args, **kwargs):
        owner = getattr(method, "__self__", None)
        if isinstance(owner, str) and method.__name__ == "replace":
            return _replace(owner, *args, **kwargs)
        if isinstance(owner, str) and method.__name__ == "join":
            return _join(*args, separator=owner)
        return super().call(context, method, *args, **kwargs)

    def _generate(self, source, *args, **kwargs):
        # Jinja's hook between the tree and its code: every text and every expression passes here.
        _refuse(source)
        return super()._generate(_Limited().visit(source), *args, **kwargs)


def _join(parts, separator: str = "") -> str:
    texts = [str(_written(part)) for part in parts]
    _limit(sum(map(len, texts)) + len(separator) * len(texts))
    return separator.join(texts)


def _replace(text: object, old: str, new: str, count: int = -1) -> str:
    text = str(text)
    _limit(len(text) + text.count(old) * len(new))
    return text.replace(old, new, count)


def _regex_replace(text: object, pattern: str, replacement: str = "") -> str:
    text = str(text)
    length, references = len(text), replacement.count("\\")
    for match in re.finditer(pattern, text):
        longest = max(map(len, (match.group(), *match.groups(""))))
        length += len(replacement) + references * longest
        _limit(length)
    return re.sub(pattern, replacement, text)


class _Limited(NodeTransformer):
    """`a ~ b` as `[a, b]|join`, whose length is limited, and every list that a template makes as
    one whose text is.
    """

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        parts = nodes.List([self.visit(part) for part in node.nodes])
        return nodes.Filter(parts, "join", [], [], None, None, lineno=node.lineno)

    def visit_List(self, node: nodes.Expr) -> nodes.Expr:
        self.generic_visit(node)
        if getattr(node, "ctx", "load") != "load":  # names on the left of a set
            return node
        return nodes.Filter(node, "limited", [], [], None, None, lineno=node.lineno)

    visit_Tuple = visit_Dict = visit_List


def _environment() -> _Sandbox:
    environment = _Sandbox(undefined=StrictUndefined, keep_trailing_newline=True, finalize=_written)
    # cycler, joiner, lipsum, namespace and range: nothing that a prompt needs, all of them stepping
    # stones. No loader is set either.
    environment.globals.clear()
    environment.filters = {name: environment.filters[name] for name in FILTERS}
    environment.filters |= {"join": _join, "replace": _replace, "regex_replace": _regex_replace}
    environment.filters["limited"] = _limit_nested
    return environment


ENVIRONMENT = _environment()


def _refuse(tree: nodes.Template) -> None:
    """Refuse a template that holds anything but what is named above, before any row is read."""
    for node in tree.find_all(nodes.Node):
        names = []
        if isinstance(node, nodes.Stmt) and not isinstance(node, _STATEMENTS):
            raise SecurityError(f"{type(node).__name__.lower()} is not allowed")
        if isinstance(node, nodes.Pow):
            raise SecurityError("the operator ** is not allowed")
        if isinstance(node, nodes.Call):
            called = getattr(node.node, "attr", getattr(node.node, "name", "this"))
            if not isinstance(node.node, nodes.Getattr) or called not in METHODS:
                raise SecurityError(f"calling {called} is not allowed, only {', '.join(METHODS)}")
        if isinstance(node, nodes.Getattr):
            names = [node.attr]
        elif isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const):
            names = [node.arg.value]
        elif isinstance(node, nodes.Filter):
            if node.name not in ENVIRONMENT.filters:
                known = ", ".join(sorted({*ENVIRONMENT.filters} - {"limited"}))
                raise SecurityError(f"the filter {node.name} is not allowed, only {known}")
            if node.name in ("map", "selectattr", "rejectattr", "sort", "unique", "sum"):
                values = [*node.args, *(keyword.value for keyword in node.kwargs)]
                names = [value.value for value in values if isinstance(value, nodes.Const)]
        for name in names:
            if isinstance(name, str) and any(part.startswith("_") for part in name.split(".")):
                raise SecurityError(f"access to {name!r} is not allowed")


def compile_text(source: str):
    """A function of the variables that renders `source`.

    Raises:
        TemplateSyntaxError, SecurityError: the text is no template, or tries to leave the sandbox.
    """
    template = ENVIRONMENT.from_string(source)

    def render(variables) -> str:
        parts, length = [], 0
        for part in template.generate(variables):
            length += len(part)
            _limit(length)
            parts.append(part)
        return "".join(parts)

    return render


def compile_expression(source: str):
    """A function of the variables that returns the value of the expression `source` itself, a list
    for instance.
    """
    return ENVIRONMENT.compile_expression(source, undefined_to_none=False)


def variables_of(source: str, *, expression: bool = False) -> set[str]:
    """The names of the variables that a template, or an expression, reads."""
    from jinja2.meta import find_undeclared_variables

    return find_undeclared_variables(
        ENVIRONMENT.parse("{{ " + source + " }}" if expression else source)
    )


__all__ = [
    "SecurityError",
    "TemplateSyntaxError",
    "compile_expression",
    "compile_text",
    "variables_of",
]
