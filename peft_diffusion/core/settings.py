"""Dataclasses of settings: how one is made from others. Imports no torch."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, ClassVar, Protocol, TypeVar


class Settings(Protocol):
    """A dataclass of settings, such as `TrainConfig`."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


S = TypeVar("S", bound=Settings)


def pick(kind: type[S], *sources: Settings | Mapping[str, Any]) -> S:
    """A dataclass filled from the fields of others that have the same names, so that no field is copied by hand.

    Args:
        kind: The dataclass to make.
        sources: Dataclasses, and mappings of field names to values; of two with one name, the later one counts.

    Returns:
        The new dataclass. Every field comes from a source, also where the class has a default for it: a field that was
        renamed on one side alone would else fall back to its default without a word.

    Raises:
        TypeError: A field is in no source.
    """
    values: dict[str, Any] = {}
    for source in sources:
        values |= source if isinstance(source, Mapping) else {f.name: getattr(source, f.name) for f in fields(source)}
    names = [field.name for field in fields(kind)]
    absent = [name for name in names if name not in values]
    if absent:
        raise TypeError(f"{kind.__name__} needs {', '.join(absent)}, which none of its sources has")
    return kind(**{name: values[name] for name in names})
