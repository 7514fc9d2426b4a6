"""Schedulers to generate with, as data: what ``--scheduler`` calls them, and their classes in diffusers. No torch here."""

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, TypeAlias

from ..core.errors import UserError, did_you_mean

SchedulerTable: TypeAlias = Mapping[str, tuple[str, Mapping[str, Any]]]
"""By name: the class in diffusers, and what is set besides the base's own configuration."""

SCHEDULERS: SchedulerTable = MappingProxyType(
    {
        # The class clips what it predicts to [-1, 1] unless told otherwise, which latents do not keep to.
        "ddim": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False}),
        "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
        "euler": ("EulerDiscreteScheduler", {}),
        "euler-a": ("EulerAncestralDiscreteScheduler", {}),
        "lms": ("LMSDiscreteScheduler", {}),
        "heun": ("HeunDiscreteScheduler", {}),
        "dpm2": ("KDPM2DiscreteScheduler", {}),
        "dpm2-a": ("KDPM2AncestralDiscreteScheduler", {}),
        "dpm++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
        "dpm++-sde": ("DPMSolverSinglestepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
        "dpm++-2m-sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
        "dpm++-3m-sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}),
        "unipc": ("UniPCMultistepScheduler", {}),
        "ddpm": ("DDPMScheduler", {"clip_sample": False, "variance_type": "fixed_small"}),
        "lcm": ("LCMScheduler", {"clip_sample": False}),
        "tcd": ("TCDScheduler", {"clip_sample": False}),
    }
)
"""For bases that predict the noise or the velocity of a variance preserving process."""

FLOW_SCHEDULERS: SchedulerTable = MappingProxyType(
    {
        "euler": ("FlowMatchEulerDiscreteScheduler", {}),
        "heun": ("FlowMatchHeunDiscreteScheduler", {}),
    }
)
"""For bases that predict the flow from latents to noise (Lipman et al. 2023, https://arxiv.org/abs/2210.02747)."""

SPACINGS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "karras": {"use_karras_sigmas": True},  # Karras et al. 2022, https://arxiv.org/abs/2206.00364
        "exponential": {"use_exponential_sigmas": True},
        "beta": {"use_beta_sigmas": True},  # Lee et al. 2024, https://arxiv.org/abs/2407.12173
        "trailing": {"timestep_spacing": "trailing"},  # which A1111 calls SGM Uniform
        "uniform": {"timestep_spacing": "linspace"},
    }
)
"""How the noise levels of the steps are spaced, by the word that stands behind the name of a scheduler."""

BY_STEPS = ("euler", "lms", "heun", "dpm2", "dpm2-a")
"""Those that space noise levels between those of their steps, so that these must reach from the noisiest to the last."""

NOT_UNIFORM = ("dpm++", "dpm++-2m-sde", "dpm++-3m-sde", "unipc", "lcm", "tcd")
"""Those that diffusers, told "linspace", spaces otherwise than A1111 does by its Uniform: they leave the last level out, or
take levels of their own."""

FROM_NOISE = ("lcm", "tcd")
"""Those that space their steps so by themselves: as "trailing" does, from the noisiest on, so that it is no other name."""

_LABELS = {
    "ddim": "DDIM", "pndm": "PLMS", "euler": "Euler", "euler-a": "Euler a", "lms": "LMS", "heun": "Heun", "dpm2": "DPM2",
    "dpm2-a": "DPM2 a", "dpm++": "DPM++ 2M", "dpm++-sde": "DPM++ SDE", "dpm++-2m-sde": "DPM++ 2M SDE",
    "dpm++-3m-sde": "DPM++ 3M SDE", "unipc": "UniPC", "ddpm": "DDPM", "lcm": "LCM", "tcd": "TCD",
    "karras": "Karras", "exponential": "Exponential", "beta": "Beta", "trailing": "SGM Uniform", "uniform": "Uniform",
}  # fmt: skip
_OTHERS = {  # of ComfyUI and diffusers; "simple" and "normal" take the levels of "trailing" and "uniform", to a timestep
    "simple": "trailing", "normal": "uniform",
    "euler-ancestral": "euler-a", "dpm-2": "dpm2", "dpm-2-ancestral": "dpm2-a", "uni-pc": "unipc", "ddim-uniform": "ddim",
}  # fmt: skip


def _words(text: str) -> str:
    return re.sub(r"[\s_-]+", "-", text.strip().lower()).replace("dpmpp", "dpm++")


_NOT_HERE = {
    "dpm++-2s-a": "dpm++-sde, or euler-a", "dpm++-2m-sde-heun": "dpm++-2m-sde", "dpm-fast": "dpm++", "dpm-adaptive": "dpm++",
    "restart": "heun", "ddim-cfg++": "ddim", "dpm++-2s-ancestral": "dpm++-sde, or euler-a",
}  # fmt: skip
"""Samplers of A1111 and ComfyUI that diffusers lacks, and what is to be taken in their place."""

_KNOWN = {_words(label): name for name, label in _LABELS.items()} | {name: name for name in _LABELS} | _OTHERS


_BY_CLASS: Mapping[str, str] = MappingProxyType(
    {
        kind: name
        for table in (FLOW_SCHEDULERS, SCHEDULERS)
        for name, (kind, changes) in table.items()
        if changes.get("algorithm_type") != "sde-dpmsolver++"  # which no scheduler is by itself
    }
)
"""Schedulers by their classes in diffusers, as these are by themselves."""


def parted(name: str) -> tuple[str, str]:
    """Part the name of a scheduler.

    Args:
        name: As `canonical` gives it.

    Returns:
        The scheduler, and how its steps are spaced, "" for as the base says.
    """
    head, _, spacing = name.rpartition("-")
    return (head, spacing) if spacing in SPACINGS else (name, "")


def canonical(text: str) -> str:
    """Read the name of a scheduler, as ``--scheduler``, A1111 or ComfyUI call it.

    Args:
        text: Such as "euler-a", "DPM++ 2M Karras" or "dpmpp_3m_sde exponential".

    Returns:
        The name here: a scheduler, and perhaps a spacing behind a dash.

    Raises:
        UserError: There is none of the name.
    """
    words = _words(text)
    endings = [(ending, name) for ending, name in _KNOWN.items() if name in SPACINGS and words.endswith(f"-{ending}")]
    ending, spacing = max(endings, key=lambda one: len(one[0]), default=("", ""))
    called = words.removesuffix(f"-{ending}") if ending else words
    name = _KNOWN.get(called, "")
    if called in _NOT_HERE:
        raise UserError(f"diffusers has no scheduler {text!r}; the nearest here is {_NOT_HERE[called]}")
    if name not in SCHEDULERS:
        there = f"{', '.join(SCHEDULERS)}, each also with -{', -'.join(SPACINGS)} behind it"
        raise UserError(f"there is no scheduler {text!r}; there are: {there}{did_you_mean(words, SCHEDULERS)}")
    if name in FROM_NOISE and spacing == "trailing":
        return name
    return f"{name}-{spacing}" if spacing else name


def label(name: str) -> str:
    """Say what A1111 calls a scheduler.

    Args:
        name: As `canonical` gives it.

    Returns:
        Its name there.
    """
    return " ".join(_LABELS.get(one, one) for one in parted(name) if one)


def label_of_class(kind: str) -> str:
    """Say what A1111 calls a scheduler of diffusers, such as a base's own.

    Args:
        kind: The name of its class.

    Returns:
        Its name there; that of the class, where there is none.
    """
    return label(_BY_CLASS[kind]) if kind in _BY_CLASS else kind
