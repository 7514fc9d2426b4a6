"""Which methods a run trains where: one for all components, or blocks of several that become one adapter."""

import math
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Union, get_args, get_origin, get_type_hints

from ... import methods
from ...bases import family as families
from ...core.errors import UserError, did_you_mean
from ...core.method import Method
from .shared import MethodSettings, SharedConfig


@dataclass(frozen=True)
class Placement:
    """A method at a target of a component; ``rate`` is its learning rate, None for the component's."""

    component: str
    target: str
    method: Method
    rate: float | None = None

    def spec(self) -> dict[str, Any]:
        """As a file's spec holds it."""
        return {**self.method.spec(), "target": self.target}


def blocks(config: MethodSettings) -> list[Placement]:
    """List which method is trained at which sites.

    Args:
        config: The settings.

    Returns:
        The placements: those of ``--block``, or one for each component.

    Raises:
        UserError: A method or hyper-parameter does not exist, or has a value that it cannot have.
    """
    if config.block:
        return [_parse_block(text, config) for text in config.block]
    chosen = _method(config.method, _pairs(config.option, "--option"), config)
    return [Placement(component, config.target or chosen.target, chosen) for component in config.components]


def check_methods(config: MethodSettings) -> None:
    """See that the methods of a run exist, have the hyper-parameters that were given, and can have these values.

    Args:
        config: The settings.

    Raises:
        UserError: One does not, no method of the run has one, or it cannot be.
    """
    names = method_names(config)
    for text in config.block:
        _rate_of(_pairs(_words(text)[3:], f"--block {text!r}"), text)
    if config.block and (config.option or config.method != SharedConfig.method or config.target is not None):
        raise UserError("--block names methods and targets itself; leave --method, --target and --option away")
    known = {field.name for name in names for field in fields(methods.find(name))}
    # Runs of older versions wrote the preset's rank down for every method.
    rank = None if config.resume else config.rank
    for given, value in (("rank", rank), ("alpha", config.alpha), ("dropout", config.dropout or None)):
        if value is not None and given not in known:
            raise UserError(f"--{given} says nothing to {', '.join(dict.fromkeys(names))}; leave it away")
    for text in config.block:
        _placed(text, config)
    if not config.block:
        _method(config.method, _pairs(config.option, "--option"), config)


def targets_of(config: MethodSettings) -> list[str]:
    """List the targets that a run names, whatever its base is.

    Args:
        config: The settings.

    Returns:
        The targets.

    Raises:
        UserError: A text is no placement.
    """
    if config.block:
        return [_words(text)[1] for text in config.block]
    return [] if config.target is None else [config.target]


def method_names(config: MethodSettings) -> list[str]:
    """Name the methods that a run trains.

    Args:
        config: The settings.

    Returns:
        One name for each placement.

    Raises:
        UserError: A text is no placement.
    """
    return [_words(text)[2] for text in config.block] if config.block else [config.method]


def plugins_of(config: MethodSettings, family: str) -> list[str]:
    """Name the modules of plug-ins that a run needs: those that its methods and its family of bases come from.

    Args:
        config: The settings.
        family: The name of the family.

    Returns:
        The modules.
    """
    found = [*(methods.find(name).plugin() for name in method_names(config)), families.plugin_of(family)]
    return list(dict.fromkeys(module for module in found if module))


def ranked(config: MethodSettings) -> bool:
    """Tell whether any method of a run has a rank.

    Args:
        config: The settings.

    Returns:
        Whether one has.
    """
    kinds = [methods.known()[name] for name in method_names(config) if name in methods.known()]
    return any(field.name == "rank" for kind in kinds for field in fields(kind))


def _parse_block(text: str, config: MethodSettings) -> Placement:
    """A placement at a component that is trained."""
    found = _placed(text, config)
    if found.component not in config.components:
        raise UserError(
            f"--block {text!r}: {found.component} is not among the --components {','.join(config.components)}"
            f"{did_you_mean(found.component, config.components)}"
        )
    return found


def _placed(text: str, config: MethodSettings) -> Placement:
    """``COMPONENT TARGET METHOD NAME=VALUE ...``, at whatever component."""
    component, target, name, *rest = _words(text)
    options = _pairs(rest, f"--block {text!r}")
    rate = _rate_of(options, text)
    options.pop("lr", None)
    return Placement(component, target, _method(name, options, config), rate)


def _rate_of(options: Mapping[str, str], text: str) -> float | None:
    """The learning rate among a block's options."""
    if "lr" not in options:
        return None
    rate = _number(options["lr"], f"--block {text!r}: lr", float)
    if not math.isfinite(rate) or rate <= 0:
        raise UserError(f"--block {text!r}: lr must be above 0, not {options['lr']}; leave it away for the component's rate")
    return rate


def _words(text: str) -> list[str]:
    words = text.split()
    if len(words) < 3:
        shape = f"COMPONENT TARGET METHOD NAME=VALUE ..., as in 'unet attention {methods.DEFAULT} rank=8'"
        raise UserError(f"--block {text!r}: a block is {shape}")
    return words


def _method(name: str, options: Mapping[str, str], config: MethodSettings) -> Method:
    """The method with its hyper-parameters: those given to it, and rank, alpha and dropout of the run where it has them."""
    kind = methods.find(name)
    hints = get_type_hints(kind)
    known = {field.name for field in fields(kind)}
    methods.refuse_unknown(kind, options)
    common = {"rank": config.rank, "alpha": config.alpha, "dropout": config.dropout or None}
    values: dict[str, Any] = {key: value for key, value in common.items() if key in known and value is not None}
    values |= {key: _value(text, key, hints[key]) for key, text in options.items()}
    return kind(**values)


def _pairs(texts: Sequence[str], where: str) -> dict[str, str]:
    """``NAME=VALUE`` texts as a dict."""
    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise UserError(f"{where}: {text!r} is no NAME=VALUE")
        found[name.replace("-", "_")] = value
    return found


def _value(text: str, name: str, hint: Any) -> Any:
    """A text as the type of a hyper-parameter."""
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if text.lower() == "none" and type(None) in kinds:
        return None
    if bool in kinds:
        if text.lower() not in ("true", "false"):
            raise UserError(f"{name} is true or false, not {text!r}")
        return text.lower() == "true"
    for kind in (int, float):
        if kind in kinds:
            return _number(text, name, kind)
    return text


def _number(text: str, name: str, kind: type[int] | type[float]) -> float:
    try:
        return kind(text)
    except ValueError:
        raise UserError(f"{name} must be a {'whole ' if kind is int else ''}number, not {text!r}") from None
