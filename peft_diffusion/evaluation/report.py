"""``report.html``: an evaluation as one page that needs nothing else. Imports no torch."""

from collections.abc import Mapping, Sequence
from typing import TypeAlias

from markupsafe import Markup
from PIL import Image

from .. import __version__
from ..core.settings import settings_of
from ..training.record import charts
from ..training.record.report import inlined, render
from .intervals import KIND, LEVEL
from .measured import MEASURES, Alone, Evaluation, Interference, written
from .settings import EvaluateConfig

NAME = "report.html"
TOGETHER = "strengths at which two go together"
TOGETHER_EXPLAINED = "what both lose there more than alone, as shares of what the base loses on their unseen pictures"
_SIDE = 1600  # pixels of a sheet in the page
# What is drawn in one chart, by its heading.
_CHARTS: Mapping[str, tuple[str, ...]] = {
    "Loss on unseen pictures": ("loss",),
    "Style, called and not called": ("style", "leak"),
    "As its own pictures, and named so": ("likeness", "named"),
    "Subject and prompt": ("subject", "prompt"),
    "Changed where it is not called": ("moved",),
    "Distance to training pictures": ("nearness",),
}
_LOOKS: tuple[charts.Look, ...] = ("second", "first")

Chart: TypeAlias = tuple[str, str, list[tuple[charts.Look, str]], Markup]
"""Heading, explanation, the look and name of each curve, and the drawing."""


def page(found: Evaluation, sheets: Mapping[str, Image.Image], config: EvaluateConfig) -> str:
    """Make the page of an evaluation.

    Args:
        found: What was found.
        sheets: The pictures of each adapter, by name.
        config: How it was found.

    Returns:
        HTML.
    """
    return render(
        "evaluation.html",
        {
            "title": " / ".join(one.name for one in found.alone),
            "trust": found.trust,
            "adapters": [
                (one, headings(one), rows(one), drawn(one), inlined(sheets[one.name], _SIDE)) for one in found.alone
            ],
            "matrices": matrices(found),
            "together": [one.words() for one in found.together],
            "together_explained": TOGETHER_EXPLAINED,
            "names": [one.name for one in found.alone],
            "measures": {name: one for name, one in MEASURES.items() if any(name in own.values for own in found.alone)},
            "level": f"{LEVEL:.0%}",
            "interval": KIND,
            "settings": [(one.flag, _plain(getattr(config, one.name))) for one in settings_of(EvaluateConfig)],
            "version": __version__,
        },
    )


def headings(one: Alone) -> list[str]:
    """List the measures of an adapter.

    Args:
        one: The adapter.

    Returns:
        What each is called, in the order of `rows`.
    """
    return [measure.title for name, measure in MEASURES.items() if name in one.values]


def rows(one: Alone) -> list[tuple[str, list[str]]]:
    """Write the figures of an adapter.

    Args:
        one: The adapter.

    Returns:
        For each strength its value and those of the `headings`.
    """
    known = {name: measure for name, measure in MEASURES.items() if name in one.values}
    return [
        (f"{strength:g}", [written(one.values[name][strength], measure) for name, measure in known.items()])
        for strength in one.values["loss"]
    ]


def drawn(one: Alone) -> list[Chart]:
    """Draw the curves of an adapter over strength.

    Args:
        one: The adapter.

    Returns:
        The charts.
    """
    found: list[Chart] = []
    for heading, names in _CHARTS.items():
        curves, told = [], []
        for look, name in zip(_LOOKS, names, strict=False):
            if name in one.values:
                points = [(strength, value.mean) for strength, value in one.values[name].items()]
                ends = [MEASURES[name].ends(value) for value in one.values[name].values()]
                curves.append(charts.Curve(MEASURES[name].title, points, look, dots=look == "second", ends=ends))
                told.append(MEASURES[name].explained)
        form = MEASURES[names[0]].form
        chart = charts.lines(curves, heading, form, over="strength") if curves else Markup("")
        if chart:
            found.append((heading, "; ".join(told), [(curve.look, curve.name) for curve in curves], chart))
    return found


def matrices(found: Evaluation) -> list[tuple[str, str, list[tuple[str, list[str]]]]]:
    """Write the interference of adapters.

    Args:
        found: What was found.

    Returns:
        Tables: what is told, what that means, and for each adapter, in a row, its figure with each one on.
    """
    if not found.interference:
        return []
    by_pair = {(one.own, one.other): one for one in found.interference}
    names = [one.name for one in found.alone]
    tables = [
        ("loss", "by how much the loss on the row's unseen pictures rises with the column on too; above 0 is harm"),
        (
            "style",
            "pictures of the row's prompts that are told the row's style with the column on too; alone: on the diagonal",
        ),
        ("style of the other", "pictures of the row's prompts that are told the column's style"),
        ("likeness", "how far they went from the base's to the row's own pictures; alone: on the diagonal"),
    ]
    made = []
    for title, explained in tables:
        lines = [(own, [_cell(title, own, other, by_pair, found.alone) for other in names]) for own in names]
        if title != "loss" or all(one.loss is not None for one in found.interference):
            made.append((title, explained, lines))
    return made


def _cell(title: str, own: str, other: str, by_pair: Mapping[tuple[str, str], Interference], alone: Sequence[Alone]) -> str:
    if own == other:
        values = next(one.values for one in alone if one.name == own).get(title, {})
        return written(values[1.0], MEASURES[title]) if 1.0 in values and title in ("style", "likeness") else "–"
    one = by_pair[own, other]
    value = {"loss": one.loss, "style": one.style, "style of the other": one.style_of_other, "likeness": one.likeness}[title]
    if value is None:
        return "–"
    kind = MEASURES[{"loss": "fall", "style of the other": "style"}.get(title, title)]
    return ("+" if title == "loss" and value.mean > 0 else "") + written(value, kind)


def _plain(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None or value == "" else str(value)
