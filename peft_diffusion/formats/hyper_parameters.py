"""What the tensors of a site tell of the methods that made them, by names, shapes and the values of scalars alone."""

from collections.abc import Callable, Mapping

Shapes = Mapping[str, tuple[int, ...]]
Scalars = Mapping[str, float | None]
Values = dict[str, float]


def methods_of(shapes: Shapes, scalars: Scalars) -> dict[str, Values]:
    """The methods of a site by name, each with those of its hyper-parameters that its tensors tell.

    Shapes by suffix, and the values of what is a scalar. What has no sensible shape tells nothing.
    """
    found = {method: read for mark, (method, read) in _MARKS.items() if mark in shapes}
    if "diff" in shapes:  # of a whole change, which is no method here; "diff_b" is then its bias
        found.pop("bitfit", None)
    if "lora" in found and "dora_scale" in shapes:
        found["dora"] = found.pop("lora")
    return {method: read(shapes, scalars) for method, read in found.items()}


def _size(shapes: Shapes, suffix: str, side: int) -> int:
    """A side of a tensor; 0 where it has none."""
    shape = shapes.get(suffix, ())
    return shape[side] if side < len(shape) else 0


def _ranked(rank: int, scalars: Scalars) -> Values:
    """A rank, and the alpha that no alpha and an alpha of 0 mean too."""
    return {"rank": rank, "alpha": scalars.get("alpha") or rank} if rank else {}


def _lora(shapes: Shapes, scalars: Scalars) -> Values:
    return _ranked(_size(shapes, "lora_down.weight", 0), scalars)


def _decomposed(shapes: Shapes) -> Values:
    return {"weight_decompose": True} if "dora_scale" in shapes else {}


def _loha(shapes: Shapes, scalars: Scalars) -> Values:
    return {**_ranked(_size(shapes, "hada_w1_b", 0), scalars), **_decomposed(shapes)}


def _lokr(shapes: Shapes, scalars: Scalars) -> Values:
    if "lokr_w1" in shapes:
        factor = max(_size(shapes, "lokr_w1", 0), _size(shapes, "lokr_w1", 1))
    else:
        factor = max(_size(shapes, "lokr_w1_a", 0), _size(shapes, "lokr_w1_b", 1))
    rank = _size(shapes, "lokr_w2_b", 0) or _size(shapes, "lokr_w1_b", 0)
    told = _ranked(rank, scalars) or {"full": True}  # without a rank alpha says nothing
    return {"factor": factor, **told, **_decomposed(shapes)}


def _oft(shapes: Shapes, scalars: Scalars) -> Values:
    constraint = scalars.get("alpha") or 0.0
    rescale: Values = {"rescale": True} if "rescale" in shapes else {}
    return {"block_size": _size(shapes, "oft_blocks", 1), **({"constraint": constraint} if constraint else {}), **rescale}


def _ia3(shapes: Shapes, scalars: Scalars) -> Values:
    return {"on_input": bool(scalars.get("on_input"))}


def _first_side(suffix: str, name: str) -> Callable[[Shapes, Scalars], Values]:
    return lambda shapes, scalars: {name: _size(shapes, suffix, 0)}


def _nothing(shapes: Shapes, scalars: Scalars) -> Values:
    return {}


# The tensor names by which files of each method are known; what a Method reads is declared in its own file.
_MARKS: dict[str, tuple[str, Callable[[Shapes, Scalars], Values]]] = {
    "lora_down.weight": ("lora", _lora),
    "lora_up.weight": ("lora", _lora),
    "hada_w1_a": ("loha", _loha),
    "lokr_w1": ("lokr", _lokr),
    "lokr_w1_a": ("lokr", _lokr),
    "oft_blocks": ("oft", _oft),
    "on_input": ("ia3", _ia3),
    "diff_b": ("bitfit", _nothing),
    "b_norm": ("bitfit", _nothing),
    "bottleneck_down": ("bottleneck", _first_side("bottleneck_down", "hidden")),
    "prefix_keys": ("prefix", _first_side("prefix_keys", "length")),
    "prompt_vectors": ("prompt", _first_side("prompt_vectors", "vectors")),
    "tokens_vectors": ("tokens", _first_side("tokens_vectors", "vectors")),
    "vectors": ("tokens", _first_side("vectors", "vectors")),
}
