"""What ``import-config`` is told and gives: a training of another program in the settings of this one. Imports no torch."""

import json
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any

from ...core.errors import UserError
from ...core.files import write_bytes
from ...core.settings import PARAMETERS, Flag, OnePath, OptionalPath, about, explained, setting, settings_class, settle
from .others.reading import read
from .others.taking import Found
from .pictures import TrainConfig
from .toml import to_toml


@explained
@settings_class()
class ImportConfig:
    """Which file of another program becomes a file of settings.

    Raises:
        UserError: A value is one that cannot be used.
    """

    file: OnePath = field(
        metadata=about(
            "A training of kohya's sd-scripts (TOML) or kohya_ss (JSON), a dataset file of sd-scripts, a configuration of "
            "OneTrainer or its concepts (JSON).",
            PARAMETERS,
            flag=Flag(default_shown=False),
            place=True,
        )
    )
    _: KW_ONLY
    output: OptionalPath = setting(
        None,
        "The TOML file to write; by default the name of the other with -imported.toml, in the present directory.",
        PARAMETERS,
        flag=Flag(aliases=("-o",)),
        place=True,
    )
    overwrite: bool = setting(False, "Replace a file that is there already.", PARAMETERS)

    def __post_init__(self) -> None:
        settle(self)


@dataclass(frozen=True)
class Imported:
    """A training of another program in the settings of this one.

    Attributes:
        config: The settings.
        output: The file that was written.
        absent: What has no counterpart, a line each.
    """

    config: TrainConfig
    output: Path
    absent: tuple[str, ...]


def import_config(config: ImportConfig) -> Imported:
    """Write a file of settings of one of another program.

    Args:
        config: Which, and where to.

    Returns:
        What was made.

    Raises:
        UserError: The file is none that is known, says what cannot be, or the new one is there already.
    """
    found = read(config.file)
    output = config.output or Path(f"{config.file.stem}-imported.toml")
    if output.exists() and not config.overwrite:
        raise UserError(f"{output} is there already; name another --output, or take --overwrite")
    settings: dict[str, Any] = {name: value for name, value in found.settings.items() if value is not None}
    if found.datasets:
        settings["dataset"] = tuple(found.datasets)
    try:
        made = TrainConfig(**settings)
    except UserError as error:
        raise UserError(f"{config.file}: {error}") from None
    write_bytes(output, _text(config.file, made, found, frozenset(settings)).encode())
    return Imported(made, output, tuple(found.absent))


def _text(file: Path, config: TrainConfig, found: Found, names: frozenset[str]) -> str:
    lines = [
        f"# From {_comment(file)}; for peft-diffusion train --config",
        *(f"# absent: {_comment(one)}" for one in found.absent),
    ]
    return "\n".join([*lines, to_toml(config, names)])


def _comment(text: object) -> str:
    """A text as a comment of TOML, which has no control characters."""
    return json.dumps(str(text), ensure_ascii=False)[1:-1].replace("\x7f", "\\u007f")
