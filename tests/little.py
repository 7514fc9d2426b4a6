"""How little the runs of the tests measure and draw."""

import base64
import importlib
import os
from pathlib import Path
from typing import Any

_TASKS = "peft_diffusion.training.tasks"
# Six steps of training, which many tests make, take an eighth of the time of what a run measures with them.
LITTLE: dict[str, object] = {
    f"{_TASKS}.class_images._STEPS": 2,
    f"{_TASKS}.diffusion._DRAWS": 1,
    f"{_TASKS}.diffusion._SEEN": 2,
    f"{_TASKS}.diffusion._OTHER_PLACES": (0.65,),
    f"{_TASKS}.diffusion._OTHER_PROMPTS": ("a red apple", "a car"),
    f"{_TASKS}.language._SEEN": 2,
    f"{_TASKS}.prediction.PICTURES": 1,
    "peft_diffusion.training.watch.strength._STRENGTHS": (0.5,),
}


def measure_little_from_here() -> None:
    """Let all runs of this process and of those that it forks measure with few noises."""
    for place, value in LITTLE.items():
        module, _, name = place.rpartition(".")
        setattr(importlib.import_module(module), name, value)


# A process of the tests measures its signals with it in its environment.
SIGNALS = "TESTS_MEASURE_SIGNALS"


def measure_no_signals_from_here() -> None:
    """Let this process measure what is kept apart alone, unless `SIGNALS` is set in its environment.

    To try what the base predicts and to measure signals takes as long as their steps, and few tests of processes look.
    """
    from peft_diffusion.training.events import Signals
    from peft_diffusion.training.tasks.diffusion import DiffusionTask
    from peft_diffusion.training.tasks.language import LanguageTask

    def unless_asked(kind: type, name: str, instead: object) -> None:
        """Let a method of a class give something instead of what it measures."""
        measure = getattr(kind, name)
        setattr(kind, name, lambda task: measure(task) if SIGNALS in os.environ else instead)

    unless_asked(DiffusionTask, "fitting_prediction", None)
    for kind in (DiffusionTask, LanguageTask):
        unless_asked(kind, "signals", Signals())


STEPS = 4  # denoising steps in processes of the tests, where a command names none
# A process of the tests draws its plots with it in its environment.
PLOTS = "TESTS_DRAW_PLOTS"
_EMPTY = base64.b64decode(b"iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGP4DwABAQEAG7buVgAAAABJRU5ErkJggg==")


def draw_little_from_here() -> None:
    """Let this process and those that it forks draw by few steps, and write a point for each plot unless `PLOTS` is set.

    Two plots take as long as twenty steps, and no test of a process but that of the plots themselves looks at them.
    """
    from peft_diffusion.generation import settings
    from peft_diffusion.training.record import plots, recorder

    def little(path: Path, metrics: list[dict[str, Any]]) -> None:
        if PLOTS in os.environ:
            getattr(plots, drawn[path.name])(path, metrics)
        else:
            path.write_bytes(_EMPTY)

    drawn = {"loss.png": "draw", "signals.png": "draw_signals"}
    for name in drawn.values():
        setattr(recorder, name, little)
    settings._STEPS = STEPS
