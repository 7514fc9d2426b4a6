"""The ``ss_network_*`` entries: how kohya's trainer, alone or with LyCORIS in it, says what it trained.

``ss_network_args`` holds what a person types there as ``--network_args NAME=VALUE``, as a JSON object of texts. See
``train_network.py`` of sd-scripts and ``create_network`` in ``lycoris/kohya.py``. What a method is called there it declares
itself: see ``Method.network``.
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from .. import methods as known_methods
from ..core.method import KOHYA, Network
from ..core.parsing import json_value


def network(methods: Mapping[str, Sequence[Mapping[str, Any]]], kernels: bool) -> Network | None:
    """Choose what kohya's trainer and LyCORIS are told of a file's methods: they know of one in a file.

    Args:
        methods: Those of a spec, by component.
        kernels: Whether a pair sits on a convolution with a kernel, which kohya's own module calls ``conv_dim``.

    Returns:
        The first method that those programs have; None where they have none.
    """
    known = known_methods.known()
    present = (one for several in methods.values() for one in several if one.get("method") in known)
    found = next((told for one in present if (told := known[one["method"]].network(one)) is not None), None)
    if found is not None and found.module == KOHYA and kernels:
        return Network(
            KOHYA, found.dim, found.alpha, {"conv_dim": f"{found.dim}", "conv_alpha": f"{found.alpha}", **found.args}
        )
    return found


def to_metadata(found: Network) -> dict[str, str]:
    """Say a network in the metadata of a file.

    Args:
        found: The network.

    Returns:
        The ``ss_network_*`` entries.
    """
    values = {"dim": found.dim, "alpha": found.alpha, "args": json.dumps(found.args) if found.args else None}
    told = {f"ss_network_{name}": str(value) for name, value in values.items() if value is not None}
    return {"ss_network_module": found.module, **told}


def from_metadata(metadata: Mapping[str, str]) -> Network | None:
    """Read the network that a file tells. What cannot be read is left out: it is shown, and never relied on.

    Args:
        metadata: Of the file.

    Returns:
        The network; None where the file tells none.
    """
    if "ss_network_module" not in metadata:
        return None
    dim, alpha = _number(metadata.get("ss_network_dim")), _number(metadata.get("ss_network_alpha"))
    try:
        args = json_value(metadata.get("ss_network_args") or "{}")
    except ValueError:
        args = {}
    told = {str(name): str(value) for name, value in args.items()} if isinstance(args, dict) else {}
    return Network(metadata["ss_network_module"], None if dim is None else int(dim), alpha, told)


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) else None
