"""The flags of a command from a TOML file (``--config run.toml``), and what cyclopts would let pass."""

from pathlib import Path
from typing import Any

from cyclopts import App, ArgumentCollection, CycloptsError
from cyclopts.config import Dict

from ..core import settings_file
from .flags import setting_of


class RunFile:
    """Fills in, from a file, what the command line left open.

    Args:
        path: The TOML file, which is read as `settings_file.read` does, with its errors, when the command line is.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def plugins(self) -> list[str]:
        """The modules with methods of others that the file names."""
        return settings_file.plugins(self.path)

    def __call__(self, app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
        """Called by cyclopts when the command line is read."""
        told = [(one, argument) for argument in arguments if (one := setting_of(argument)) is not None]
        given = {one.name for one, argument in told if argument.tokens}
        # What the command line has is chosen, also where the file has something that would stand in its place.
        beaten = {one.name for one, _ in told if one.setting.instead_of in given}
        values = settings_file.read(self.path, [one for one, _ in told])
        nested: dict[str, Any] = {name: value for name, value in values.items() if name not in beaten}
        for name in reversed(commands):  # or cyclopts takes a setting that is called as a command for that command's own
            nested = {name: nested}
        Dict(nested, source=str(self.path))(app, commands, arguments)


def whole_numbers(_: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Refuse 1.5 where a whole number is meant: cyclopts would round it.

    Args:
        commands: The names of the command; cyclopts passes them.
        arguments: The arguments that were read.

    Raises:
        CycloptsError: There is such a number.
    """
    for argument in arguments:
        one = setting_of(argument)
        for token in argument.tokens if one is not None and one.single is int else ():
            if "." in token.value:
                raise CycloptsError(msg=f'Invalid value for {argument.name}: "{token.value}" is no whole number.')
