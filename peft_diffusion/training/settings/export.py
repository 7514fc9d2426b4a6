"""What ``runs export`` is told: flags, TOML keys and Python arguments in one place. Imports no torch."""

from dataclasses import KW_ONLY, field
from pathlib import Path

from ...core.settings import PARAMETERS, Flag, OnePath, OptionalPath, about, explained, setting, settings_class, settle
from ...formats import layout as layouts
from ...formats.container import title
from ...formats.layout import SaveDtype


@explained
@settings_class()
class ExportConfig:
    """Which checkpoint of a run becomes an adapter file.

    Raises:
        UserError: A value is one that cannot be used.
    """

    run: OnePath = field(
        metadata=about("A run folder, or a checkpoint file of one.", PARAMETERS, flag=Flag(default_shown=False), place=True),
    )
    _: KW_ONLY
    step: int | None = setting(
        None, "The step whose weights are written, of a checkpoint that is kept; by default the newest.", PARAMETERS
    )
    output: OptionalPath = setting(
        None,
        "The adapter file to make; by default the name of the run's own with the step, in the present directory.",
        PARAMETERS,
        flag=Flag(aliases=("-o",)),
        place=True,
    )
    base: str | None = setting(None, "Where the base of the run lies now, if it has moved.", PARAMETERS)
    save_as: str | None = setting(None, "Layout of the file, as convert --to has them; by default the run's.", PARAMETERS)
    save_dtype: SaveDtype | None = setting(
        None, "What the numbers of the file are rounded to; by default as the run has it.", PARAMETERS
    )
    overwrite: bool = setting(False, "Replace a file that is there already.", PARAMETERS)

    def __post_init__(self) -> None:
        settle(self)
        if self.save_as is not None:
            layouts.find(self.save_as)


def of_step(run_output: Path, step: int) -> str:
    """Name the adapter file of a step of a run, where none was named.

    Args:
        run_output: The adapter file of the run.
        step: The steps done.

    Returns:
        The file's name.
    """
    return f"{title(run_output)}-{step:06}.safetensors"


def layout_of_step(run_output: Path, layout: str) -> str:
    """Choose the layout of such a file.

    Args:
        run_output: The adapter file of the run.
        layout: The layout of that.

    Returns:
        The same, or kohya's where files of the run's layout have one name in any folder.
    """
    return layout if title(run_output) == run_output.stem else layouts.DEFAULT
