"""``peft-diffusion runs``: the runs that there are, two of them side by side, and ``runs export``."""

from dataclasses import dataclass
from pathlib import Path

from ..core.errors import UserError
from ..core.settings import PARAMETERS, Flag, explained, setting, settle
from ..training.record.run_record import find, only
from .commands import reads


@explained
@dataclass(frozen=True)
class RunsConfig:
    """Which runs to show."""

    folders: tuple[Path, ...] = setting(
        (Path("runs"),),
        "A folder of run folders, to list them; or two run folders, to compare them.",
        PARAMETERS,
        flag=Flag(negative=True),
    )
    html: Path | None = setting(
        None,
        "With two run folders: write their curves and previews side by side into this page.",
        PARAMETERS,
    )

    def __post_init__(self) -> None:
        settle(self)


@reads(RunsConfig)
def runs(config: RunsConfig) -> None:
    """List the runs of a folder, or compare two runs.

    Nothing is loaded: the run folders tell all of it. `report.html` in each of them tells more.
    """
    folders = config.folders
    if len(folders) > 2:
        raise UserError(f"{len(folders)} folders were given: name one to list its runs, or two run folders to compare them")
    if len(folders) == 1 and config.html is not None:
        raise UserError("--html shows two runs side by side; name two run folders")
    from .run_tables import show_compared, show_list  # with rich, which takes time

    if len(folders) == 2:
        show_compared(only(folders[0]), only(folders[1]), config.html)
    else:
        show_list(find(folders[0]), folders[0])
