"""The flags of a command, made from the settings that it goes by. Only this package knows cyclopts."""

import inspect
from collections.abc import Callable
from dataclasses import MISSING, field, make_dataclass
from functools import cache
from typing import Annotated, Any, Literal, get_args, get_origin

from cyclopts import CoercionError, CycloptsError, Group, Parameter, UnknownOptionError
from cyclopts.argument import Argument

from ..core import settings
from ..core.other_names import known_here_as
from ..core.settings import PARAMETERS, Described, Settings, not_among, pick, settings_of

_KINDS = "settings_read"  # the attribute of a command under which `reads` keeps what it takes


def reads(*kinds: type[Settings]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a command of a function of settings, with the flags of all of them.

    Args:
        kinds: The dataclasses of settings that the function takes, in the order of its parameters.

    Returns:
        The decorator. What it gives has the one parameter that cyclopts makes the flags from, and makes the settings
        themselves when they are read, so that what is wrong with them is told in their own words.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        told = [one for kind in kinds for one in settings_of(kind)]
        # cyclopts looks not into classes of the standard library. What nobody asks a class of flags for is not made:
        # a text of its signature, a comparison and a representation take longer than the class itself.
        named = {"__module__": function.__module__, "__doc__": function.__doc__}
        fields = [_field(one) for one in told]
        flags: Any = make_dataclass(function.__name__, fields, namespace=named, eq=False, repr=False)
        # Where nothing must be given, the command can be called without any flag.
        must = any(one.default is MISSING for one in told)
        hint: Any = Annotated[flags if must else flags | None, Parameter(name="*")]

        def run(config: Settings | None = None) -> None:
            given = flags() if config is None else config
            function(*(pick(kind, given) for kind in kinds))

        run.__name__, run.__doc__, run.__module__ = function.__name__, function.__doc__, function.__module__
        vars(run)[_KINDS] = kinds
        run.__annotations__ = {"config": hint, "return": None}
        default = inspect.Parameter.empty if must else None
        place = inspect.Parameter("config", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=hint, default=default)
        run.__signature__ = inspect.Signature([place])  # type: ignore[attr-defined]
        return run

    return decorate


def settings_read(command: Callable[..., None]) -> tuple[type[Settings], ...]:
    """Tell which settings a command takes.

    Args:
        command: What `reads` gave.

    Returns:
        The dataclasses.
    """
    kinds: tuple[type[Settings], ...] = vars(command)[_KINDS]
    return kinds


def _field(one: Described) -> tuple[str, Any, Any]:
    """A setting as ``make_dataclass`` takes it. Nothing is checked in it but what a text cannot be turned into."""
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
    return str(error)
