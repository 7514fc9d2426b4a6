"""The flags of a command, made from the settings that it goes by, for cyclopts."""

import inspect
from collections.abc import Iterable
from dataclasses import field, make_dataclass
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

from cyclopts import CoercionError, CycloptsError, Group, Parameter, UnknownOptionError
from cyclopts.argument import Argument

from ..core import settings
from ..core.other_names import known_here_as
from ..core.settings import PARAMETERS, Described, not_among

if TYPE_CHECKING:
    from .commands import Command


@cache
def signature(command: "Command") -> inspect.Signature:
    """Make what cyclopts makes the flags of a command from.

    Args:
        command: The command.

    Returns:
        Its signature, of one parameter: a dataclass with all the settings that it takes.
    """
    # Where nothing must be given, the command can be called without any flag.
    flags, must = flags_of(command.__name__, command.__module__, command.settings), command.needs_some
    hint: Any = Annotated[flags if must else flags | None, Parameter(name="*")]
    default = inspect.Parameter.empty if must else None
    place = inspect.Parameter("config", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=hint, default=default)
    return inspect.Signature([place])


def flags_of(name: str, module: str, told: Iterable[Described]) -> Any:
    """Make a dataclass that cyclopts fills from flags.

    Args:
        name: What it is called.
        module: Where: cyclopts looks not into classes of the standard library.
        told: The settings, which nothing is checked of but what a text cannot be turned into.

    Returns:
        The class.
    """
    # What nobody asks of it is not made: a text of its signature, a comparison and a representation take longer than the
    # class itself.
    named = {"__module__": module, "__doc__": name}
    return make_dataclass(name, [_field(one) for one in told], namespace=named, eq=False, repr=False)


def _field(one: Described) -> tuple[str, Any, Any]:
    """A setting as ``make_dataclass`` takes it."""
    flag = one.setting.flag
    parameter = Parameter(
        help=one.setting.help,
        alias=flag.aliases,
        negative=None if flag.negative else (),
        consume_multiple=flag.greedy,
        show_default=None if flag.default_shown else False,
    )
    if one.setting.group != PARAMETERS:  # which is the panel of all that has no group
        parameter = Parameter.combine(parameter, Parameter(group=_group(one.setting.group)))
    hint = one.hint if one.nested is None else tuple[str, ...]  # settings in others are given as texts
    return one.name, Annotated[hint, parameter, one], field(default=one.default, kw_only=not one.positional)


def setting_of(argument: Argument) -> Described | None:
    """Find the setting that an argument of the command line gives.

    Args:
        argument: The argument, as cyclopts has it.

    Returns:
        The setting; None for an argument of the program's own, such as ``--debug``.
    """
    told = get_args(argument.field_info.annotation)
    return next((one for one in told if isinstance(one, Described)), None)


@cache
def _group(group: settings.Group) -> Group:
    return Group(group.title, sort_key=group.place)


def explained(error: CycloptsError) -> str:
    """Say what is wrong with a command line, in the words that settings have for a value that is not among their choices.

    Args:
        error: What cyclopts found.

    Returns:
        The message.
    """
    if isinstance(error, CoercionError) and error.argument and error.token and get_origin(error.target_type) is Literal:
        return not_among(error.argument.name, get_args(error.target_type), error.token.value)
    if isinstance(error, UnknownOptionError):
        option = (error.token.keyword or error.token.value).split("=", 1)[0]
        names = {one.name: one for argument in error.argument_collection if (one := setting_of(argument)) is not None}
        here = [
            f"{one.upper()}, without a flag" if names[one].positional else names[one].flag
            for one in known_here_as(option, names)
        ]
        if here:
            return f"Unknown option: {option}. Here it is {' or '.join(here)}."
        asked = option.lstrip("-").replace("-", "_")
        for one in names.values():
            if one.setting.flag.contrary_of == asked:
                contrary = f"leave it away, or take {one.flag} for the contrary"
                return f"Unknown option: {option}. That is the default here; {contrary}."
    return str(error)
