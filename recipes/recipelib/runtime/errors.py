"""The one exception that ends a recipe without a traceback, and how errors become one line."""

import textwrap
from typing import Any


class UserError(Exception):
    """A mistake that the user can mend.

    Its text is the one line that is shown before exit code 2: the file, the key or row, what is
    wrong, and the cure.
    """

    def _render_traceback_(self) -> list[str]:
        """The lines that a notebook shows of it (IPython asks for them): also that one."""
        return [f"error: {self}"]


def first_line(message: object) -> str:
    """The first line with content, shortened."""
    lines = [line for line in str(message).splitlines() if line.strip()] or ["no message"]
    return textwrap.shorten(lines[0], 240, placeholder="...")


def one_line(text: Any) -> str:
    """A text on one line, its middle cut out where it is long: row values and other libraries'
    messages can hold whole documents.
    """
    line = " ".join(str(text).split())
    return line if len(line) <= 400 else f"{line[:250]} ... {line[-140:]}"


def require_at_least(arguments: Any, **least: float) -> None:
    """Refuse numbers that would fail late or mean nothing; None passes.

    Args:
        arguments: the object whose attributes are checked.
        least: argument -> its smallest value.
    Raises:
        UserError: the first argument that is below its limit.
    """
    for name, limit in least.items():
        value = getattr(arguments, name)
        if value is not None and not value >= limit:
            raise UserError(f"--{name} {value}: must be {limit} or more")
