"""What reading a base takes, of whatever kind: device and dtype by name, and silence."""

import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars

from ..core.errors import UserError
from ..core.files import at_home
from ..core.parsing import json_value
from ..core.settings import not_among

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(device: str) -> torch.device:
    """Choose a device by its name.

    Args:
        device: Such as cpu or cuda:1; ``auto`` is an accelerator if there is one.

    Returns:
        The device.

    Raises:
        UserError: It cannot be used.
    """
    if device == "auto":
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return found or torch.device("cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen).cpu()  # which a device without memory cannot do
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from None
    return chosen


def named_source(source: object, kinds: str) -> str:
    """See that a base that is to be read is named.

    Args:
        source: What was given.
        kinds: What could be given instead of a name, in words.

    Returns:
        The name, of a folder, a file or on the hub.

    Raises:
        UserError: It is something else, such as a part of a pipeline.
    """
    if not isinstance(source, (str, os.PathLike)):
        raise UserError(f"a {type(source).__name__} is no base; give {kinds}, or the name or path of one")
    return str(source)


def is_hub_id(source: str) -> bool:
    """Tell whether a name is written as one on the hub.

    Args:
        source: The name of a base.

    Returns:
        Whether it is owner/name; a path may be written so too.
    """
    return re.fullmatch(r"[\w.-]+/[\w.-]+", source) is not None


def model_place(name: str) -> tuple[str, bool] | None:
    """Tell where a model of transformers lies that a person named.

    Args:
        name: A folder or hub id.

    Returns:
        What transformers takes for it, and whether that is on this machine; None where it is neither.
    """
    path = at_home(Path(name))
    if path.is_dir():
        return str(path.resolve()), True  # a folder such as "owner/name" would be looked up on the hub
    return (name, False) if is_hub_id(name) and not path.parent.is_dir() else None


def is_cached(hub_id: str) -> bool:
    """Tell whether a pipeline of the hub was fetched before.

    Args:
        hub_id: As owner/name.

    Returns:
        Whether its index lies in the cache of the hub's library.
    """
    try:
        return isinstance(try_to_load_from_cache(hub_id, "model_index.json"), str)
    except ValueError:  # what the hub would not take for a name
        return False


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Choose a dtype by its name.

    Args:
        dtype: float32, bfloat16 or float16; ``auto`` is the best that the device computes fast.
        device: Where it will be used.

    Returns:
        The dtype.

    Raises:
        UserError: There is no such dtype.
    """
    if dtype in _DTYPES:
        return _DTYPES[dtype]
    if dtype != "auto":
        raise UserError(not_among("dtype", ("auto", *_DTYPES), dtype))
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float16


_MOST_BLOCKS = 64
# What a base has at least and at most, each far beyond all that are known; of lists each entry.
_RANGES = {
    "num_train_timesteps": (1, 100_000),
    "layers_per_block": (1, 100),
    "transformer_layers_per_block": (1, 100),
    "num_hidden_layers": (1, 1000),
    "block_out_channels": (1, 16_384),
    "in_channels": (1, 1024),
    "out_channels": (1, 1024),
    "latent_channels": (1, 1024),
    "cross_attention_dim": (1, 65_536),
    "sample_size": (1, 65_536),
}


@contextmanager
def quiet(*libraries: Any) -> Iterator[None]:
    """Silence the bars and notices of libraries inside: a command has its own.

    Args:
        libraries: Their ``utils.logging`` modules, such as ``diffusers.utils.logging``.

    Yields:
        Once; afterwards the libraries say what they said before.
    """
    before = [(library, library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    of_hub = not are_progress_bars_disabled()  # which transformers switches with its own
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        for library, _, _ in before:
            library.set_verbosity_error()
            library.disable_progress_bar()
        try:
            yield
        finally:
            for library, verbosity, bars in before:
                library.set_verbosity(verbosity)
                if bars:
                    library.enable_progress_bar()
            if not of_hub:
                disable_progress_bars()


def refuse_beyond(folder: Path) -> None:
    """Refuse a folder whose configurations ask for more than any base has: it would fill all memory, or never be built.

    Args:
        folder: Of a base, with its configurations in it or one folder deeper.

    Raises:
        UserError: One does.
    """
    for path in sorted([*folder.glob("*config.json"), *folder.glob("*/*config.json")]):
        try:
            told = json_value(path.read_text("utf-8"))
        except (OSError, ValueError):  # which its reader will say better
            continue
        for name, (least, most) in _RANGES.items():
            value = told.get(name) if isinstance(told, dict) else None
            many = value if isinstance(value, list) else [value]
            numbers = [one for one in many if type(one) is int]
            if len(many) > _MOST_BLOCKS or any(not least <= one <= most for one in numbers):
                raise UserError(f"{path} has {name} {value!r:.60}, and no base is so: {least} to {most:,} is known; mend it")
