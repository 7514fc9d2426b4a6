"""Whether two adapter files can be used together, told from their headers. Imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from .. import methods
from ..core.wording import number_of
from ..formats import Inspection

Verdict: TypeAlias = Literal["yes", "no", "unknown"]


@dataclass(frozen=True)
class Compatibility:
    """The verdict on two files, and in words what it rests on."""

    verdict: Verdict
    reasons: tuple[str, ...]


def compare(first: Inspection, second: Inspection) -> Compatibility:
    """Compare two adapter files by the bases that they name, and by the shapes at the sites that both change.

    Args:
        first: What one file tells.
        second: What the other tells.

    Returns:
        Whether they can be used together, and why.
    """
    verdict, reason = _bases(first, second)
    shared = sorted(first.sites.keys() & second.sites.keys())
    compared = [(site, _shape(first.sites[site]), _shape(second.sites[site])) for site in shared]
    other = [(site, a, b) for site, a, b in compared if a and b and a != b]
    reasons = [reason]
    if other:
        site, a, b = other[0]
        verdict = "no"
        names = f"{first.names[site][0]} changes a weight of {a}, {second.names[site][0]} one of {b}"
        reasons.append(f"{len(other)} of the {len(shared)} sites of both have other shapes: {names}")
    elif shared:
        verdict = "yes" if verdict == "unknown" else verdict
        both, of = number_of(len(shared), "site"), f"{len(first.sites)} and {len(second.sites)}"
        reasons.append(f"both change {both} (of {of}), of equal shapes")
    elif {_of_original(first), _of_original(second)} == {True, False}:
        reasons.append("one names the sites of the UNet as the original does and one as diffusers does: not compared")
    else:
        reasons.append("no site is changed by both")
    return Compatibility(verdict, tuple(reasons))


def _bases(first: Inspection, second: Inspection) -> tuple[Verdict, str]:
    """What the bases that the files name say."""
    a, b = first.base, second.base
    if not a or not b:
        silent = " and ".join(str(found.path) for found, base in ((first, a), (second, b)) if not base)
        return "unknown", f"the base is not named in {silent}"
    if a.get("family") != b.get("family"):
        return "no", f"the bases are of different families: {_words(a)} and {_words(b)}"
    if a.get("prediction_type", "") and b.get("prediction_type", "") and a["prediction_type"] != b["prediction_type"]:
        return "no", f"the bases predict different things: {a['prediction_type']} and {b['prediction_type']}"
    if a.get("fingerprint") and a.get("fingerprint") == b.get("fingerprint"):
        return "yes", f"the same base: {_words(a)}"
    if a.get("fingerprint") and b.get("fingerprint"):
        return "unknown", f"bases with different weights: {_words(a)} and {_words(b)}"
    return "unknown", f"bases of the same family: {_words(a)} and {_words(b)}"


def _words(base: Mapping[str, str]) -> str:
    details = ", ".join(value for key in ("family", "fingerprint") if (value := base.get(key)))
    return f"{base.get('name', 'unnamed')} ({details})"


def _shape(tensors: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """The shape of the weight that is changed, (out, in, ...); () for methods whose files do not tell it."""
    return next((shape for method in methods.known().values() if (shape := method.weight_shape(tensors))), ())


def _of_original(found: Inspection) -> bool:
    """Whether a file has the names that the UNet had before diffusers."""
    return "original" in found.layouts
