"""Which adapters of a library fit a base. Imports no torch where a base is named that needs none of its files."""

import json
from collections.abc import Mapping
from typing import NamedTuple

from ..bases import family as families
from ..bases.embedded import ICONS


class Wanted(NamedTuple):
    """What is known of a base that adapters are looked for.

    Attributes:
        family: The name of its family.
        name: What it is called; "" for any base of the family.
        fingerprint: Which weights it has; "" where that is not known.
        prediction: What it predicts; "" where that is not known.
    """

    family: str
    name: str = ""
    fingerprint: str = ""
    prediction: str = ""

    @classmethod
    def of(cls, told: Mapping[str, object]) -> "Wanted":
        """Take what a base, or a file of its, says.

        Args:
            told: Family, name, fingerprint and prediction type, as a spec has them of its base.

        Returns:
            That.
        """
        family, name, fingerprint, prediction = (
            str(told.get(key, "")) for key in ("family", "name", "fingerprint", "prediction_type")
        )
        return cls(family, name, fingerprint, prediction)


def named(base: str) -> Wanted:
    """Tell what adapters for a base have to fit.

    Args:
        base: The name of a family, or a base as ``--base`` takes it, of which the configurations are read.

    Returns:
        What is known of it.

    Raises:
        UserError: There is no such base.
    """
    if any(one.name == base for one in families.every()):
        return Wanted(base)
    if base == ICONS:
        return Wanted(families.SMALL_DIFFUSION.name, ICONS)
    from dataclasses import asdict

    from ..bases.skeleton import skeleton  # which brings torch

    return Wanted.of(asdict(skeleton(base).info))


def fits(kept: str, wanted: Wanted) -> bool:
    """Tell whether an adapter fits a base.

    Args:
        kept: What the library holds of it for that: the families of bases that it may fit, and what it says of its base.
        wanted: The base.

    Returns:
        Whether it does, as far as can be told; one that tells no family fits none.
    """
    found, told = json.loads(kept)[:2]  # a third, which nothing asks for, in libraries that were made before
    if wanted.family not in found:
        return False
    if wanted.prediction and told["prediction_type"] and told["prediction_type"] != wanted.prediction:
        return False
    if families.find(wanted.family).small:  # whose bases have nothing in common but being small
        if wanted.fingerprint and told["fingerprint"]:
            return bool(told["fingerprint"] == wanted.fingerprint)
        return not wanted.name or bool(told["name"] == wanted.name)
    return True
