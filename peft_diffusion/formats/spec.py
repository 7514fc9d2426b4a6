"""What an adapter file says of itself."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from .. import methods
from ..core.errors import UserError
from ..core.parsing import json_value, refusing
from ..core.shortening import brief

KEY = "peft_diffusion"  # the metadata entry that holds it, as JSON
VERSION = 1


@dataclass(frozen=True)
class Spec:
    """Method and hyper-parameters per component, the base, the words that call it, and how it was trained.

    ``methods`` maps a component to its methods in the order in which they run at a site, each as ``{"method": name,
    ...hyper-parameters, "target": name or expression}``; ``base`` is a ``BaseInfo`` as a dict; ``training`` holds JSON
    values under the names of the training options.
    """

    methods: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    base: Mapping[str, Any] = field(default_factory=dict)
    triggers: tuple[str, ...] = ()
    training: Mapping[str, Any] = field(default_factory=dict)
    title: str = ""
    description: str = ""

    @property
    def trigger(self) -> str:
        """What calls the adapter, as captions have it, with ``{}`` for the caption.

        It is the trigger of its training where that is known, else the first of its words; "" where it names none.
        """
        trained = self.training.get("trigger")
        return trained if isinstance(trained, str) and trained else next(iter(self.triggers), "")

    def to_json(self) -> str:
        """As the metadata entry holds it."""
        return json.dumps({"version": VERSION, **asdict(self)}, sort_keys=True, ensure_ascii=False)

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str], where: str) -> Self | None:
        """Read the spec in a file's metadata.

        Args:
            metadata: Of the file.
            where: What errors call the file.

        Returns:
            The spec; None in a file of another program.

        Raises:
            UserError: It is damaged, or written by a newer version.
        """
        if KEY not in metadata:
            return None
        with refusing(f"{where}: its {KEY!r} metadata is damaged"):
            values = json_value(metadata[KEY])
            version = values.pop("version")
            if version > VERSION:
                raise UserError(f"{where}: written by a newer peft_diffusion (format {version}); update the package")
            known = {name: values[name] for name in cls.__dataclass_fields__ if name in values}
            spec = cls(**{**known, "triggers": tuple(known.get("triggers", ()))})
            _check(spec)
            spec.to_json()  # of what is nested too deep nothing can be written
        return spec


def other_weights(path: Path, base: Mapping[str, Any], here: str, did: str = "trained") -> str | None:
    """Say of a file that it was made on a base of other weights than the one that it is used on.

    Args:
        path: The file.
        base: What it says of its base.
        here: The fingerprint of the base that it is used on; "" for one without weights.
        did: What was done on that base.

    Returns:
        The warning; None where the weights are the same, or one of both is not known.
    """
    if not here or base.get("fingerprint") in (None, "", here):
        return None
    return f"{path} was {did} on {brief(str(base.get('name')))!r}, whose weights differ from this base's; results may differ"


def refuse_unknown(spec: Spec, where: str) -> None:
    """Refuse a file of a method whose plug-in was not loaded: a part of the adapter would be left out without a word.

    Args:
        spec: What the file says of itself.
        where: What errors call the file.

    Raises:
        UserError: There is such a method.
    """
    for name, module in missing_plugins(spec).items():
        raise UserError(
            f"{where}: method {name!r} is not known; it was trained with --plugin {module}: give that too, or in Python"
            f" peft_diffusion.load_plugin({module!r})"
        )


def missing_plugins(spec: Spec) -> dict[str, str]:
    """List the plug-ins that a file needs and that were not loaded.

    Args:
        spec: What the file says of itself.

    Returns:
        Their modules, by the method that each brings.
    """
    told = [(str(one.get("method")), one.get("plugin")) for several in spec.methods.values() for one in several]
    return {name: str(plugin) for name, plugin in told if plugin and name not in methods.known()}


def _check(spec: Spec) -> None:
    maps = (spec.methods, spec.base, spec.training, *(one for several in spec.methods.values() for one in several))
    words = (*spec.triggers, spec.title, spec.description)
    if not all(isinstance(value, dict) for value in maps) or not all(isinstance(word, str) for word in words):
        raise TypeError("a field of another type")
