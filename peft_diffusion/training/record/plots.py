"""The plot of a run's losses."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...core.files import write_bytes
from .charts import running
from .measurements import best_step, measurements


def draw(path: Path, metrics: Sequence[Mapping[str, Any]]) -> None:
    """Draw the training loss, its running mean and the held-out loss over the steps.

    Args:
        path: A .png file.
        metrics: The lines of ``metrics.jsonl``.
    """
    # Not pyplot, which keeps state of its own and looks for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5))
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    trained = [(line["step"], line["loss"]) for line in metrics if "loss" in line]
    held_out = [(line["step"], line["held_out_loss"]) for line in metrics if "held_out_loss" in line]
    if trained:
        steps, losses = zip(*trained, strict=True)
        axes.plot(steps, losses, color="#c6dbef", linewidth=0.8, label="training, each step")
        axes.plot(*zip(*running(trained), strict=True), color="#2171b5", label="training, running mean")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), color="#d94801", marker="o", label="pictures kept apart")
    axes.set(xlabel="step", ylabel="loss", ylim=(0, None))
    axes.grid(alpha=0.3)
    if trained or held_out:
        axes.legend()
    _save(figure, path)


def draw_signals(path: Path, metrics: Sequence[Mapping[str, Any]]) -> None:
    """Draw what tells when to stop, one curve under the other over the steps; the best step is marked.

    Args:
        path: A .png file.
        metrics: The lines of ``metrics.jsonl``.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    measured = measurements(metrics)
    curves = {
        "unseen loss": [(one.step, one.unseen) for one in measured if one.unseen is not None],
        "leakage": [(one.step, one.leakage) for one in measured if one.leakage is not None],
        "memorisation": [(one.step, one.memorisation) for one in measured if one.memorisation is not None],
    }
    known = {name: curve for name, curve in curves.items() if curve}
    if not known:
        return
    figure = Figure(figsize=(8, 2.2 * len(known)))
    FigureCanvasAgg(figure)
    best = best_step({step: loss for step, loss in curves["unseen loss"] if loss is not None})
    panels = figure.subplots(len(known), sharex=True, squeeze=False)[:, 0]
    for axes, colour, (name, curve) in zip(panels, ("#d94801", "#6a51a3", "#238b45"), known.items(), strict=False):
        axes.plot(*zip(*curve, strict=True), color=colour, marker="o")
        axes.set_ylabel(name)
        axes.grid(alpha=0.3)
        if best is not None:
            axes.axvline(best, color="#888888", linestyle="--", linewidth=1, label=f"best: step {best}")
    if best is not None:
        panels[0].legend()
    panels[-1].set_xlabel("step")
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    # Margins by hand: a layout that finds them draws everything twice.
    figure.subplots_adjust(left=0.1, right=0.98, top=0.97, bottom=0.1, hspace=0.12)
    figure.align_ylabels()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    write_bytes(path, picture.getvalue())
