"""Jinja2 for templates that a user wrote or downloaded: they read data and cannot reach Python.

`ImmutableSandboxedEnvironment` is the class that transformers uses for chat templates. In addition,
only the statements, filters and methods named here exist, undefined variables are errors,
underscore attributes are refused when the template is loaded rather than at some later row, and no
operation makes a huge text or number out of small ones. Time is not limited: nested loops over long
data, or a regular expression that backtracks, can run for as long as they like.
"""

import re
from collections.abc import Mapping

from jinja2 import StrictUndefined, TemplateSyntaxError, Undefined, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.visitor import NodeTransformer

# The filters and methods that a prompt needs. Left out are those that reach attributes by their
# names (attr, format) or make a text of any length asked for (center, indent, ljust, zfill).
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
    """The value itself, refused if its text would be too long: lists that hold one another can grow
    tenfold with every line of a template.
    """
    length, rest = 0, [value]
    while rest:
        item = rest.pop()
        if isinstance(item, dict):
            rest += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple):
            rest += item
        length += len(item) + 8 if isinstance(item, str | list | tuple | dict) else 8
        _limit(length)
    return value


def _written(value):
    """What an expression writes: nothing for None; a method that is not called is an error."""
    if callable(value) and not isinstance(value, Undefined):
        raise TypeError(f"{getattr(value, '__name__', value)} is a method; write () behind it")
    return "" if value is None else value


class _Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset("+*%")

    def getattr(self, obj, attribute):
        # A key of the data goes before a dictionary's method of that name: order.items.
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
        # Jinja calls this between parsing and compiling, for every text and every expression.
        _refuse(source)
        return super()._generate(_Limited().visit(source), *args, **kwargs)


def _join(parts, separator: str = "") -> str:
    texts = [str(_written(value)) for value in parts]
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
    """Rewrites a template's tree so that lengths are limited: `a ~ b` becomes `[a, b]|join`, and
    every list, tuple or dict that a template makes passes through the filter `limited`.
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
    # The globals are cycler, joiner, lipsum, namespace and range: a prompt needs none of them, and
    # all are stepping stones out of the sandbox. No loader is set either.
    environment.globals.clear()
    environment.filters = {name: environment.filters[name] for name in FILTERS}
    environment.filters |= {"join": _join, "replace": _replace, "regex_replace": _regex_replace}
    environment.filters["limited"] = _limit_nested
    return environment


ENVIRONMENT = _environment()


def _refuse(tree: nodes.Template) -> None:
    """Refuse a template that uses anything not named above, before any row is read."""
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
    """A function that renders `source` with the variables it is given.

    Raises:
        TemplateSyntaxError: the text is not a template.
        SecurityError: it tries to leave the sandbox.
    """
    template = ENVIRONMENT.from_string(source)

    def render(variables) -> str:
        chunks, length = [], 0
        for chunk in template.generate(variables):
            length += len(chunk)
            _limit(length)
            chunks.append(chunk)
        return "".join(chunks)

    return render


def compile_expression(source: str):
    """A function that evaluates the expression `source` with the variables it is given; it returns
    the value itself, such as a list, and not its text.
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
