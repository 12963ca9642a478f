"""The table of plans, and what it comes to."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from recipelib.planning.strategies import Plan
from recipelib.runtime import gib, printable


def show_plans(title: str, plans: Sequence[Plan]) -> None:
    """Print a line for each plan; 100 columns wide outside of a terminal."""
    table = Table(
        title=Text(printable(title), "bold"),
        title_justify="left",
        caption="GiB of a GPU; seconds of a step: compute + waited + bubble",
        caption_justify="left",
    )
    for heading in ("trained", "on each GPU"):
        table.add_column(heading)
    for heading in ("GiB", "fits", "step", "compute", "traffic", "waited", "bubble"):
        table.add_column(heading, justify="right")
    for plan in plans:
        size, time = plan.memory.total / 2**30, plan.time
        cells = [plan.method, plan.layout, f"{size:,.1f}" if size < 1000 else f"{size:,.0f}"]
        cells.append("yes" if plan.fits else "no")
        parts = (time.total, time.compute, time.traffic, time.waited, time.bubble)
        cells += [f"{part:,.2f}" for part in parts]
        table.add_row(*map(Text, cells), style=None if plan.fits else "dim")
    plain = {} if sys.stdout.isatty() else {"width": 100, "force_terminal": False}
    Console(**plain).print(table)
    for plan in plans:
        if plan.memory.note:
            print(f"{plan.method} by {plan.layout}: {plan.memory.note}")


def answer(plans: Sequence[Plan], usable: float) -> str:
    """What the table comes to, in a line.

    Args:
        plans: as `compare_strategies` sorts them.
        usable: GiB of a GPU.
    """
    fastest: dict[str, Plan] = {}
    for plan in plans:
        if plan.fits:
            fastest.setdefault(plan.method, plan)
    if fastest:
        found = [
            f"{plan.method} by {plan.layout}, {plan.time.total:.2f} s a step"
            for plan in fastest.values()
        ]
        return f"fastest that fits: {'; '.join(found)}"
    least = plans[0]
    return (
        f"nothing fits into {usable:.0f} GiB; the least is {least.method} by {least.layout}, "
        f"{gib(least.memory.total)} GiB: more GPUs, fewer tokens (--length, --micro_batch) or "
        "--activation_checkpointing"
    )
