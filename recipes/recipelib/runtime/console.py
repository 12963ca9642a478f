"""What a run prints: lines, bars and tables, by the main process only."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

from tqdm.auto import tqdm

from recipelib.runtime.ranks import is_main_process


def say(text: str) -> None:
    """Print a line once, not once per process."""
    if is_main_process():
        print(text, flush=True)


def progress_bar(description: str | None, total: int) -> tqdm:
    """A progress bar over rows that the caller updates; shown by the main process only, and only
    if it has a description.
    """
    return tqdm(
        total=total,
        desc=description,
        unit="row",
        disable=description is None or not is_main_process(),
        dynamic_ncols=True,
    )


def print_table(title: str, rows: Mapping[str, object]) -> None:
    """Print names and values in two columns, on the main process only.

    In a terminal the table has the terminal's width and colors; in a file or a pipe it is plain
    text, 100 columns wide.
    """
    if not is_main_process():
        return

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    plain = {} if sys.stdout.isatty() else {"width": 100, "force_terminal": False}
    table = Table(title=Text(printable(title), "bold"), title_justify="left", show_header=False)
    table.add_column(style="cyan", overflow="fold")
    table.add_column(overflow="fold")
    for name, value in rows.items():  # as Text: rich would read [brackets] in a str as markup
        table.add_row(Text(printable(name)), Text(printable(value)))
    Console(**plain).print(table)


def print_columns(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table with a name in each row's first column and figures in the others, on the main
    process only. No name is broken; a terminal that is too narrow cuts it.
    """
    if not is_main_process():
        return

    from rich.cells import cell_len
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    cells = [[printable(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(cell_len, column)) for column in zip(*cells, strict=True)]
    wide = max(100, sum(widths) + 3 * len(widths) + 1)
    plain = {} if sys.stdout.isatty() else {"width": wide, "force_terminal": False}
    table = Table(title=Text(printable(title), "bold"), title_justify="left")
    for number, (name, width) in enumerate(zip(cells[0], widths, strict=True)):
        side = {"justify": "right", "min_width": width} if number else {"style": "cyan"}
        table.add_column(Text(name), no_wrap=True, **side)
    for row in cells[1:]:
        table.add_row(*map(Text, row))
    Console(**plain).print(table)


def printable(value: object) -> str:
    """A value as text; control characters, and what the stream's encoding lacks, are escaped."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value:.4g}" if isinstance(value, float) and abs(value) < 1000 else f"{value:,.0f}"
    text = "-" if value is None else str(value)
    text = "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)
