"""A quick start: optional packages that a command does not use are not imported, and garbage is looked for less often."""

import gc
import sys
from pathlib import Path

from ..bases.embedded import ICONS
from ..core.files import at_home

# The libraries import each where it is installed, whether or not it is used: together two seconds of seven.
OPTIONAL = ("bitsandbytes", "torchao", "peft")
# Python looks for garbage with every 700 objects more. To import torch and diffusers makes two million, which stay: looking
# through them took a sixth of the time.
_OBJECTS = 10_000
_QUANTIZED = b'"quantization_config"'  # in a configuration, of weights that one of them reads


class _Process:
    """Whether this process is the command's own: what libraries find is found out once in a process."""

    own = False


def claim() -> None:
    """Say that this process ends with the command, so that nobody else's diffusers and collector are changed."""
    _Process.own = True
    gc.set_threshold(_OBJECTS)


def import_lean(base: str, *options: object) -> None:
    """Import what looks for optional packages, with those hidden that this command does not use.

    Nothing is done in a process that is not the command's own, where one of them is imported already, or where the base or
    an option may need one.

    Args:
        base: The base, as ``--base`` takes it.
        options: Those that may need one, such as ``--quantize``; empty ones were not given.
    """
    if any(options) or not _Process.own or any(name in sys.modules for name in (*OPTIONAL, "diffusers")):
        return
    if not _is_plain(base):
        return
    hidden = dict.fromkeys(OPTIONAL)
    sys.modules.update(hidden)  # type: ignore[arg-type]  # None is how Python is told that there is no such module
    try:
        import diffusers.utils.import_utils  # noqa: F401
        import transformers.modeling_utils  # noqa: F401
    finally:
        for name in hidden:
            del sys.modules[name]


def _is_plain(base: str) -> bool:
    """Whether a base is here and its weights are read without any of the packages."""
    if base == ICONS:
        return True
    path = at_home(Path(base))
    if path.is_file():
        return True
    configs = sorted(path.glob("*/config.json")) if path.is_dir() else []
    return bool(configs) and not any(_QUANTIZED in config.read_bytes() for config in configs)
