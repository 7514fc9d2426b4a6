"""Schedulers to generate with, as data: what ``--scheduler`` calls them, and their classes in diffusers. No torch here."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, TypeAlias

SchedulerTable: TypeAlias = Mapping[str, tuple[str, Mapping[str, Any]]]
"""By name: the class in diffusers, and what is set besides the base's own configuration."""

SCHEDULERS: SchedulerTable = MappingProxyType(
    {
        # The class clips what it predicts to [-1, 1] unless told otherwise, which latents do not keep to.
        "ddim": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False}),
        "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
        "euler": ("EulerDiscreteScheduler", {}),
        "euler-a": ("EulerAncestralDiscreteScheduler", {}),
        "heun": ("HeunDiscreteScheduler", {}),
        "dpm++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
        "dpm++-karras": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "use_karras_sigmas": True}),
        "unipc": ("UniPCMultistepScheduler", {}),
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
