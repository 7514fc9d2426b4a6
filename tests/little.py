"""How little the runs of the tests measure and draw."""

import importlib

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
