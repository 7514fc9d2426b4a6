"""What drawing says, in the words of requests: what is a flag at the command line is a field there. Imports no torch."""

import re
from collections.abc import Mapping
from dataclasses import fields
from types import MappingProxyType

from ..core.settings import flag
from .bodies import OWN, Extras
from .settings import ServeConfig

PLACE = f"alwayson_scripts.{OWN}.args[0]"
"""Where a request has what A1111 has no name for."""
FIELDS: Mapping[str, str] = MappingProxyType(
    {
        "prompts": "prompt", "negative": "negative_prompt", "adapter": "<lora:NAME:0.8> in the prompt",
        "base": "override_settings.sd_model_checkpoint", "clip_skip": "override_settings.CLIP_stop_at_last_layers",
        "steps": "steps", "guidance": "cfg_scale", "scheduler": "sampler_name", "width": "width", "height": "height",
        "batch_size": "batch_size", "tile": "tiling", "hires": "enable_hr", "hires_upscaler": "hr_upscaler",
        "hires_strength": "denoising_strength", "hires_steps": "hr_second_pass_steps", "seed": "seed",
        "variation_seed": "subseed", "variation_strength": "subseed_strength", "image": "init_images", "mask": "mask",
        "strength": "denoising_strength", **{name: f"{PLACE}.{name}" for name in Extras.model_fields},
    }
)  # fmt: skip
"""The field of a request for each setting of ``generate`` that one has."""

_OF_SERVER = frozenset(one.name for one in fields(ServeConfig)) - FIELDS.keys()
_QUOTED = r"""(?<!\w)(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")(?!\w)"""  # as repr writes what a person sent; no apostrophe
_FLAG = re.compile(rf"{_QUOTED}|(?<![\w-])(?P<of>serve(?:'s)? (?:with )?)?(?P<flag>--[a-z][a-z0-9-]*)(?![\w-])", re.DOTALL)
_NAMES = {flag(name): name for name in (*FIELDS, *_OF_SERVER)}


def as_request(message: str) -> str:
    """Write what drawing says for a person who sent a request.

    Args:
        message: Of an error or a note, with the flags of ``generate``.

    Returns:
        The same with the fields of requests in their place, those of our own script with their place the first time. What
        only the person who starts the server can say is told as a flag of ``serve``. What is quoted, as a prompt or the name
        of an adapter, stays as it was sent.
    """
    told: set[str] = set()

    def field(found: re.Match[str]) -> str:
        name = _NAMES.get(found["flag"] or "")  # what is quoted has none, and stays
        if name is None or found["of"]:
            return found[0]
        if name in _OF_SERVER:
            return f"serve's {found['flag']}"
        if name not in Extras.model_fields:
            return FIELDS[name]
        again = PLACE in told
        told.add(PLACE)
        return name if again else FIELDS[name]

    return _FLAG.sub(field, message)
