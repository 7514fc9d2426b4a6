"""What ``inspect`` tells of a learned composition."""

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..core.learned_kinds import LEARNED_KINDS
from ..formats.composition import CompositionSpec

if TYPE_CHECKING:
    from rich.table import Table


def show_compositions(found: Sequence[CompositionSpec]) -> None:
    """Show compositions as tables, and of strengths each number.

    Args:
        found: What the files say of themselves.

    Raises:
        UserError: A file is damaged.
    """
    if not found:
        return
    from .screen import Screen

    console = Screen()
    for one in found:
        console.labelled(str(one.path), _rows(one))
        if one.kind == "strengths":
            console.print(_numbers(one))


def _rows(one: CompositionSpec) -> list[tuple[str, str]]:
    """Labels and values of what a file tells; what it does not tell is left out."""
    training = one.training
    means = training.get("mean_strengths")
    told_means = means if isinstance(means, list) else []
    rows = [("composes", f"{one.kind}: {LEARNED_KINDS[one.kind].words}")]
    for member, mean in itertools.zip_longest(one.adapters, told_means[: len(one.adapters)]):
        words = f", triggers {', '.join(member.triggers)}" if member.triggers else ""
        strength = f", mean strength {mean:.2f}" if isinstance(mean, float) else ""
        rows.append(("adapter", f"{member.file}{strength}{words}; sha256 {member.sha256}"))
    rows.append(("base", f"{one.base.get('name', 'unnamed')} (fingerprint {one.base.get('fingerprint', 'not told')})"))
    rows.append(("blocks", ", ".join(one.blocks)))
    told = [f"{name.replace('_', ' ')} {training[name]}" for name in ("steps", "batch_size", "seed") if name in training]
    for name, label in (("loss_before", "loss at equal parts"), ("loss", "loss")):
        values = training.get(name)
        if isinstance(values, list) and all(isinstance(value, float) for value in values):
            told.append(f"{label} {' and '.join(f'{value:.4f}' for value in values)}")
    for name, label in (("held_out_loss_before", "held-out loss before"), ("held_out_loss", "held-out loss")):
        value = training.get(name)
        if isinstance(value, float):
            told.append(f"{label} {value:.4f}")
    return [*rows, ("training", ", ".join(told))] if told else rows


def _numbers(one: CompositionSpec) -> "Table":
    """Each number of a table of strengths."""
    from rich.table import Table
    from rich.text import Text

    values = one.learned().tensors()["values"].tolist()
    table = Table(
        title=Text("strengths from the first quarter of the steps to the last", style="bold"), title_justify="left"
    )
    table.add_column("block", no_wrap=True)
    for member in one.adapters:
        table.add_column(Text(member.file), overflow="fold")
    for number, block in enumerate(one.blocks):
        table.add_row(Text(block), *("  ".join(f"{value:5.2f}" for value in adapter[number]) for adapter in values))
    return table
