"""The ``ss_network_*`` entries: how kohya's trainer, alone or with LyCORIS in it, says what it trained.

``ss_network_args`` holds what a person types there as ``--network_args NAME=VALUE``, as a JSON object of texts. See
``train_network.py`` of sd-scripts and ``create_network`` in ``lycoris/kohya.py``.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

KOHYA, LYCORIS = "networks.lora", "lycoris.kohya"


@dataclass(frozen=True)
class Network:
    """A network module of kohya's trainer, its rank and alpha where the file tells them, and its arguments."""

    module: str
    dim: int | None = None
    alpha: float | None = None
    args: Mapping[str, str] = field(default_factory=dict)


def network(methods: Mapping[str, Sequence[Mapping[str, Any]]], kernels: bool) -> Network | None:
    """The first of a spec's methods that those programs have; None where they have none. They know of one in a file.

    ``kernels`` tells that there is a LoRA on a convolution with a kernel, which kohya's own module calls ``conv_dim``.
    """
    known = (one for several in methods.values() for one in several if one.get("method") in _NETWORKS)
    first = next(known, None)
    if first is None:
        return None
    found = _NETWORKS[first["method"]](first)
    if found.module == KOHYA and kernels:
        return Network(
            KOHYA, found.dim, found.alpha, {"conv_dim": f"{found.dim}", "conv_alpha": f"{found.alpha}", **found.args}
        )
    return found


def to_metadata(found: Network) -> dict[str, str]:
    """As a file holds it."""
    values = {"dim": found.dim, "alpha": found.alpha, "args": json.dumps(found.args) if found.args else None}
    told = {f"ss_network_{name}": str(value) for name, value in values.items() if value is not None}
    return {"ss_network_module": found.module, **told}


def from_metadata(metadata: Mapping[str, str]) -> Network | None:
    """What a file says; None where it says nothing. What cannot be read is left out: it is told, and never relied on."""
    if "ss_network_module" not in metadata:
        return None
    dim, alpha = _number(metadata.get("ss_network_dim")), _number(metadata.get("ss_network_alpha"))
    try:
        args = json.loads(metadata.get("ss_network_args") or "{}")
    except (ValueError, RecursionError):
        args = {}
    told = {str(name): str(value) for name, value in args.items()} if isinstance(args, dict) else {}
    return Network(metadata["ss_network_module"], None if dim is None else int(dim), alpha, told)


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _flags(method: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, str]:
    """The arguments for those of a method's hyper-parameters that are on."""
    return {argument: "True" for name, argument in names.items() if method.get(name)}


def _low_rank(method: Mapping[str, Any]) -> tuple[int, float]:
    rank = int(method["rank"])
    return rank, float(method.get("alpha") or rank)


def _lora(method: Mapping[str, Any]) -> Network:
    rank, alpha = _low_rank(method)
    if method.get("init") == "pissa":
        rank, alpha = 2 * rank, 2 * alpha  # the first pair is taken off beside the trained one
    ratio = method.get("b_rate_ratio", 1.0)
    faster = {} if ratio == 1 else {"loraplus_lr_ratio": str(ratio)}
    if not method.get("rank_stabilized"):
        return Network(KOHYA, rank, alpha, faster)
    return Network(LYCORIS, rank, alpha, {"algo": "lora", "rs_lora": "True", **faster})


def _dora(method: Mapping[str, Any]) -> Network:
    args = {"algo": "lora", "dora_wd": "True", **_flags(method, {"rank_stabilized": "rs_lora"})}
    return Network(LYCORIS, *_low_rank(method), args)


def _loha(method: Mapping[str, Any]) -> Network:
    flags = _flags(method, {"weight_decompose": "dora_wd", "rank_stabilized": "rs_lora"})
    return Network(LYCORIS, *_low_rank(method), {"algo": "loha", **flags})


def _lokr(method: Mapping[str, Any]) -> Network:
    names = {
        "weight_decompose": "dora_wd",
        "rank_stabilized": "rs_lora",
        "full": "full_matrix",
        "decompose_both": "decompose_both",
    }
    return Network(LYCORIS, *_low_rank(method), {"algo": "lokr", "factor": str(method["factor"]), **_flags(method, names)})


def _oft(method: Mapping[str, Any]) -> Network:
    """LyCORIS takes the size of the blocks from the rank."""
    constraint = {"constraint": str(method["constraint"])} if method.get("constraint") else {}
    args = {"algo": "diag-oft", **constraint, **_flags(method, {"rescale": "rescaled"})}
    return Network(LYCORIS, int(method["block_size"]), None, args)


def _ia3(method: Mapping[str, Any]) -> Network:
    return Network(LYCORIS, None, None, {"algo": "ia3"})


_NETWORKS: dict[str, Callable[[Mapping[str, Any]], Network]] = {
    "lora": _lora,
    "dora": _dora,
    "loha": _loha,
    "lokr": _lokr,
    "oft": _oft,
    "ia3": _ia3,
}
