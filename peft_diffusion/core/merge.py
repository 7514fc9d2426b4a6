"""Fold adapters into the weights of their sites, and restore the very bytes."""

import math
from collections.abc import Iterable, Mapping, Sequence, Set
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import site as sites_of
from .adapter import Adapter, LowRank, parts_of
from .changes import one_at_a_time
from .errors import FoldError, UserError
from .quantized import QuantizedLinear, plain_parts, rebuilt, torchao_codes, torchao_kind
from .sharded import whole
from .slot import Slot, walk

_SAMPLES = 1024  # numbers of a merged weight that are kept to tell whether it is still what was written


@dataclass(frozen=True)
class Merged:
    """What merging did to a component. The errors are those of quantizing the changed weights again, 0 where none is.
    Weights that layerwise casting keeps in 8 bits between calls count as quantized: they are rounded to those.

    ``error`` is the Frobenius norm of the difference over that of the weights, ``error_of_change`` over that of what the
    adapters changed: where it is near 1 or above, rounding moved the weights as far as the adapters did.
    ``kinds`` names the ways in which weights were quantized.
    """

    sites: int
    quantized: int
    error: float
    error_of_change: float
    kinds: tuple[str, ...] = ()


def dense_weight(site: nn.Module) -> Tensor:
    """Read the weight of a site, also where it is sharded, or quantized by this package or by torchao.

    Args:
        site: A Linear or convolution.

    Returns:
        The weight in float32, (out, in, ...).

    Raises:
        UserError: Another program quantized it, or it is offloaded.
    """
    if _is_away(site):
        raise UserError(
            f"the weight of a {type(site).__name__} is read, but it is offloaded and not there between calls; take"
            " enable_model_cpu_offload() or group offloading in place of sequential offloading"
        )
    if isinstance(site, QuantizedLinear):
        return site.dense()
    weight = site.weight
    if torchao_kind(weight) is not None:
        dense: Tensor = weight.dequantize()  # type: ignore[operator]
        return dense.detach().to(torch.float32)
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise UserError(
            f"the weight of a {type(site).__name__} was quantized by another program and cannot be read here; load the base"
            " unquantized, with quantize= of load_base, or with torchao"
        )
    return whole(weight).detach().to(torch.float32)


@one_at_a_time
def merge(component: nn.Module) -> Merged:
    """Fold every adapter, at its present strength, into the weights: forward then costs what the base costs.

    The change is added in float32 and rounded once. A quantized weight is dequantized and quantized again.

    Args:
        component: The module whose adapters are folded.

    Returns:
        How many weights were changed, and the error that quantizing again made.

    Raises:
        UserError: Images have different strengths, one changes over the steps, or the weights are offloaded to where they
            cannot be written; nothing was changed.
        FoldError: A method is no change of weight and bias, another module has the weight too, or a module computes its
            weight anew whenever it is called; names site and adapter.

    Whatever ends it early, the component is then as it was.
    """
    found = sites_of.strengths(component)
    if found is None or found.merged:
        raise UserError("there is nothing to merge: no adapter is attached, or they are merged already")
    if found.schedules:
        raise UserError(f"{', '.join(found.schedules)}: a strength that changes over the steps cannot be merged")
    scalars = {name: found.scalar(name).tolist() for name in found.names}
    carriers = sites_of.sites(component)
    slots = {path: site._peft_diffusion for path, site in carriers.items()}
    _refuse_away(component, carriers, "merge")
    # Pairs always fold, so that what they make of a weight is computed when it is written: several gigabytes less.
    paired = {path for path, slot in slots.items() if _all_stored(slot)}
    folded: dict[str, dict[str, Tensor]] = {}
    for path, site in carriers.items():
        try:
            folded[path] = {} if path in paired else _folded(site, slots[path], scalars)
        except FoldError as error:
            raise FoldError(f"{path}: {error}") from None
    changing = {path: ["weight"] if path in paired else list(folded[path]) for path in carriers}
    _refuse_computed(carriers, changing)
    _refuse_tied(component, carriers, changing)
    errors = _Errors()
    places = {slot.place: slot.block for path, slot in slots.items() if path in paired and slot.place is not None}
    try:
        weighed = next(iter(slots.values())).component.slab.weighed(found.values[..., 0], places)
        alike = _plainly_held(carriers, slots, paired, weighed)
        _write_pairs(alike, {path: slots[path] for path in alike if any(_amounts(slots[path], scalars))}, weighed)
        for path, changed in folded.items():
            if path in alike:
                continue
            whole = _with_pairs(carriers[path], slots[path], scalars, weighed) if path in paired else changed
            stored = _encoded(carriers[path], whole, errors)
            slots[path].unmerged = {name: _held(carriers[path], name).detach().clone() for name in stored}
            _write(carriers[path], stored)
            slots[path].merged = {name: _sample(_held(carriers[path], name)) for name in stored}
    except BaseException:  # such as a device that is full, or Ctrl-C
        _restore(carriers, slots)
        raise
    found.merged = True
    return errors.report(len(carriers))


@one_at_a_time
def unmerge(component: nn.Module) -> None:
    """Write back the bytes that the weights had before `merge`.

    Args:
        component: A merged module.

    Raises:
        UserError: As `check_unmerge`.
    """
    check_unmerge(component)
    put_back(component)


@one_at_a_time
def put_back(component: nn.Module) -> None:
    """Write back the bytes that the weights had before `merge`, without looking at what is there; see `check_unmerge`.

    Args:
        component: A merged module.
    """
    found = sites_of.strengths(component)
    if found is not None:
        _restore(sites_of.sites(component), sites_of.slots(component))
        found.merged = False


def check_unmerge(component: nn.Module) -> None:
    """See that the weights can be put back as they were before `merge`.

    Args:
        component: A merged module.

    Raises:
        UserError: Nothing is merged, the weights are offloaded to where they cannot be written, or somebody has changed them
            since, which putting them back would undo too.
    """
    found = sites_of.strengths(component)
    if found is None or not found.merged:
        raise UserError("nothing is merged")
    carriers = sites_of.sites(component)
    _refuse_away(component, carriers, "unmerge")
    held = {
        (path, name): (written, _sample(_held(carriers[path], name)))
        for path, slot in sites_of.slots(component).items()
        for name, written in slot.merged.items()
    }
    if _all_equal(list(held.values())):
        return
    for (path, name), (written, now) in held.items():
        if not _alike(written, now):
            raise UserError(
                f"cannot unmerge: {path}.{name} was changed after the merge, as fuse_lora() and load_state_dict() do,"
                " and would lose that; undo it first (unfuse_lora()), or load the base anew"
            )


def _all_equal(samples: Sequence[tuple[Tensor, Tensor]]) -> bool:
    """Whether all pairs of samples are the same, which a device is asked once for each kind of numbers."""
    kinds: dict[tuple[torch.dtype, torch.device], list[tuple[Tensor, Tensor]]] = {}
    for written, now in samples:
        if written.dtype != now.dtype or written.device != now.device or written.dtype.itemsize == 1:
            return False
        kinds.setdefault((written.dtype, written.device), []).append((written, now))
    return all(torch.equal(*(torch.cat(side) for side in zip(*own, strict=True))) for own in kinds.values())


def _sample(tensor: Tensor) -> Tensor:
    """Some numbers of a tensor, from all of it: what changes a weight changes all of it."""
    return _some(whole(tensor).detach()).clone()


def _some(tensor: Tensor) -> Tensor:
    flat = tensor.reshape(-1)
    return flat[:: max(1, flat.numel() // _SAMPLES)]


def _alike(written: Tensor, now: Tensor) -> bool:
    """Whether a tensor is what was written, up to the rounding of a change that was undone, or of another dtype."""
    written = written.to(now.device)
    if not (now.is_floating_point() and written.is_floating_point()):
        return torch.equal(written, now)
    limit = 8 * max(torch.finfo(one.dtype).eps for one in (written, now)) * float(written.float().abs().max())
    return not bool(((written.float() - now.float()).abs() > limit).any())


def _restore(carriers: Mapping[str, nn.Module], slots: Mapping[str, Slot]) -> None:
    """Write back the bytes that were kept, wherever there are some."""
    together: tuple[list[Tensor], list[Tensor]] = [], []
    for path, slot in slots.items():
        for name, kept in slot.unmerged.items():
            held = _held(carriers[path], name)
            if type(held) is nn.Parameter and not held.is_inference() and held.device == kept.device:
                together[0].append(held.detach())
                together[1].append(kept)
            else:
                _write(carriers[path], {name: kept})
    if together[0]:
        torch._foreach_copy_(*together)
    for slot in slots.values():
        slot.unmerged, slot.merged = {}, {}


@torch.no_grad()
def unmerged_state(component: nn.Module) -> dict[str, Tensor]:
    """Give the state dict of the base, with the weights as they were before a merge where there is one.

    Args:
        component: The module.

    Returns:
        Tensors by name.
    """
    state: dict[str, Tensor] = dict(component.state_dict())
    for path, slot in sites_of.slots(component).items():
        parts: dict[str, dict[str, Tensor]] = {}
        for name, kept in slot.unmerged.items():
            whole, _, part = name.partition(".")
            parts.setdefault(f"{path}.{whole}" if path else whole, {})[part] = kept
        for key, kept_parts in parts.items():
            state[key] = rebuilt(state[key], kept_parts)
    return state


def _refuse_away(component: nn.Module, carriers: Mapping[str, nn.Module], doing: str) -> None:
    """Raises UserError for a weight that is not in its module but while that is called: what is written there is lost."""
    away = [
        path for path, site in carriers.items() if any(own is not None and own.is_meta for own in site._parameters.values())
    ]
    if away or _is_filed(component):
        raise UserError(
            f"cannot {doing}: the weights of {(away or list(carriers))[0]} are offloaded and not there between calls; call"
            f" pipe.remove_all_hooks(), or {doing} before you enable offloading"
        )


def _is_away(site: nn.Module) -> bool:
    return any(own is not None and own.is_meta for own in site._parameters.values())


def _is_filed(component: nn.Module) -> bool:
    """Whether diffusers' group offloading keeps weights in files, and leaves empty tensors in their places."""
    hooks = (getattr(getattr(module, "_diffusers_hook", None), "hooks", {}) for module in component.modules())
    groups = (getattr(hook, "group", None) for held in hooks for hook in held.values())
    return any(getattr(group, "offload_to_disk_path", None) is not None for group in groups)


def _refuse_computed(carriers: Mapping[str, nn.Module], folded: Mapping[str, Sequence[str]]) -> None:
    """Raises FoldError for a tensor that its module does not hold, but makes of others: what is written there is lost.

    So do torch's parametrizations, the older hooks of weight_norm and spectral_norm, and pruning.
    """
    for path, changed in folded.items():
        held = carriers[path]._parameters.keys() | carriers[path]._buffers.keys()
        for name in changed:
            if name not in held:
                raise FoldError(
                    f"{path}: its {name} is computed anew at every call, as parametrizations, weight_norm and pruning do, so"
                    " nothing can be merged into it; make it a parameter again (remove_parametrizations,"
                    " remove_weight_norm, prune.remove), or leave the adapters unmerged"
                )


def _refuse_tied(component: nn.Module, carriers: Mapping[str, nn.Module], folded: Mapping[str, Sequence[str]]) -> None:
    """Raises FoldError for a tensor that another module has too, as an output layer has its embedding's."""
    owners: dict[int, list[str]] = {}
    for path, module in walk(component):
        for own in module._parameters.values():
            owners.setdefault(id(own), []).append(path)
    for path, changed in folded.items():
        for name in changed:
            whole = name.partition(".")[0]
            others = [other for other in owners.get(id(_held(carriers[path], whole)), []) if other != path]
            if others:
                raise FoldError(
                    f"{path}: its {whole} is shared with {', '.join(others)}, which a merge would change too; leave the"
                    " adapters unmerged, or take the one at this site away"
                )


@torch.no_grad()
def _write(site: nn.Module, tensors: dict[str, Tensor]) -> None:
    # In place: compiled and captured models see it.
    for name, tensor in tensors.items():
        held = _held(site, name)
        with torch.inference_mode() if held.is_inference() else nullcontext():  # of a base that was loaded in that mode
            held.copy_(tensor)


def _held(site: nn.Module, name: str) -> Tensor:
    """A parameter of a site, the scales of its quantized weight, or with a dot a part of what torchao quantized."""
    whole, _, part = name.partition(".")
    tensor = getattr(site, whole)
    tensor = plain_parts(tensor)[part] if part else tensor
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is no tensor")
    return tensor


class _Errors:
    """Squared norms over the quantized weights of a component."""

    def __init__(self) -> None:
        self.quantized = 0
        self.kinds: set[str] = set()
        self.weights = self.changes = self.errors = 0.0

    def add(self, kind: str, before: Tensor, wanted: Tensor, after: Tensor) -> None:
        self.quantized += 1
        self.kinds.add(kind)
        self.weights += float(wanted.square().sum())
        self.changes += float((wanted - before).square().sum())
        self.errors += float((after - wanted).square().sum())

    def report(self, sites: int) -> Merged:
        def share(of: float) -> float:
            return math.sqrt(self.errors / of) if of else 0.0

        return Merged(sites, self.quantized, share(self.weights), share(self.changes), tuple(sorted(self.kinds)))


@torch.no_grad()
def _encoded(site: nn.Module, changed: dict[str, Tensor], errors: _Errors) -> dict[str, Tensor]:
    """What the site has to hold, so that it has these float32 tensors."""
    stored: dict[str, Tensor] = {}
    for name, wanted in changed.items():
        if name == "weight" and isinstance(site, QuantizedLinear):
            codes, scale = site.codes(wanted)
            errors.add(site.kind, site.dense(), wanted, site.dense(codes, scale))
            stored |= {"weight": codes, "weight_scale": scale}
        elif name == "weight" and (kind := torchao_kind(site.weight)) is not None:
            again = torchao_codes(_held(site, "weight"), wanted)
            errors.add(kind, dense_weight(site), wanted, again.dequantize())
            stored |= {f"weight.{part}": tensor for part, tensor in plain_parts(again).items()}
        else:
            held = _held(site, name)
            if held.dtype.itemsize == 1:
                errors.add(f"{held.dtype}".removeprefix("torch."), held.float(), wanted, wanted.to(held.dtype).float())
            stored[name] = wanted
    return stored


def _all_stored(slot: Slot) -> bool:
    return all(slot.adapters.stored(name) is not None for name in slot.adapters.names())


def _plainly_held(
    carriers: Mapping[str, nn.Module], slots: Mapping[str, Slot], paired: Set[str], weighed: Mapping[int, LowRank]
) -> dict[str, Tensor]:
    """The weights that are plain numbers beside the pairs that a slab has for them, by the path of the site."""
    found: dict[str, Tensor] = {}
    for path in paired:
        own = carriers[path]._parameters.get("weight")
        pair = weighed.get(-1 if (place := slots[path].place) is None else place)
        if type(own) is not nn.Parameter or pair is None or own.is_inference() or own.device != pair.down.device:
            continue
        if own.is_floating_point() and own.dtype.itemsize > 1:
            found[path] = own.detach()
    return found


@torch.no_grad()
def _write_pairs(weights: Mapping[str, Tensor], slots: Mapping[str, Slot], weighed: Mapping[int, LowRank]) -> None:
    """Write pairs into plain weights: what is kept of all of them are a few operations, as a device is slow to be asked."""
    kinds: dict[tuple[torch.dtype, torch.device], list[str]] = {}
    for path in slots:
        kinds.setdefault((weights[path].dtype, weights[path].device), []).append(path)
    for (dtype, device), paths in kinds.items():
        held = [weights[path] for path in paths]
        flat = torch.empty(sum(one.numel() for one in held), dtype=dtype, device=device)
        parts = zip(flat.split([one.numel() for one in held]), held, strict=True)
        kept = [part.view(one.shape) for part, one in parts]
        torch._foreach_copy_(kept, held)
        for path, one in zip(paths, kept, strict=True):
            slots[path].unmerged = {"weight": one}
        for path, one in zip(paths, held, strict=True):
            place = slots[path].place
            if place is not None:
                pair = weighed[place]
                one.copy_(torch.addmm(one.flatten(1).float(), pair.up, pair.down).view(one.shape))
        samples = [_some(one) for one in held]
        written = torch.cat(samples).split([len(one) for one in samples])
        for path, one in zip(paths, written, strict=True):
            slots[path].merged = {"weight": one}


def _amounts(slot: Slot, scalars: Mapping[str, Sequence[float]]) -> list[float]:
    """The strengths of the adapters of a site."""
    return [scalars[name][slot.block] for name in slot.adapters.names()]


@torch.no_grad()
def _with_pairs(
    site: nn.Module, slot: Slot, scalars: dict[str, list[float]], weighed: Mapping[int, LowRank]
) -> dict[str, Tensor]:
    """The weight of a site whose adapters are pairs, with all of them in it, in float32: one product for all.

    ``weighed`` is what the slab has of them, by place.
    """
    strengths = dict(zip(slot.adapters.names(), _amounts(slot, scalars), strict=True))
    if not any(strengths.values()):
        return {}
    weight = dense_weight(site)
    pair = None if slot.place is None else weighed.get(slot.place)
    if pair is None or pair.down.device != weight.device:
        stored = [(one.matrices(), strengths[name]) for name, one in slot.adapters.unbuilt.items()]
        ups = [up.float() * (scale * strength) for (_, up, scale), strength in stored]
        downs = [down.flatten(1).float() for (down, _, _), _ in stored]
        pair = LowRank(torch.cat(downs).to(weight.device), torch.cat(ups, 1).to(weight.device))
    whole = torch.addmm(weight.flatten(1), pair.up, pair.down)
    return {"weight": whole.view(weight.shape)}


@torch.no_grad()
def _folded(site: nn.Module, slot: Slot, scalars: dict[str, list[float]]) -> dict[str, Tensor]:
    """Those of weight and bias of a site that its adapters change, with all changes in them, in float32."""
    # A whole sublayer has no weight of its own; what sits there says so itself when it is asked to fold.
    weight = dense_weight(site) if hasattr(site, "weight") else torch.zeros(0)
    own_bias = getattr(site, "bias", None)
    bias = own_bias.detach().to(torch.float32) if isinstance(own_bias, Tensor) else None
    return folded(weight, bias, ((name, adapter, scalars[name][slot.block]) for name, adapter in slot.adapters.items()))


@torch.no_grad()
def folded(weight: Tensor, bias: Tensor | None, adapters: Iterable[tuple[str, Adapter, float]]) -> dict[str, Tensor]:
    """Fold adapters into the weight and bias of a site.

    Args:
        weight: The site's, in float32; empty where the site has none.
        bias: The site's, in float32; None where it has none.
        adapters: The name, the adapter, which is bound to the site, and its strength, in the order in which they run.

    Returns:
        Those of "weight" and "bias" that change, with all changes in them, in float32.

    Raises:
        FoldError: An adapter is no change of weight and bias, or adds a bias where there is none.
    """
    changed: dict[str, Tensor] = {}
    for name, adapter, strength in adapters:
        if strength == 0:
            continue
        for part in parts_of(adapter):
            weight_change, bias_change = part.fold(weight, bias)
            if weight_change is not None:
                changed["weight"] = weight = weight + strength * weight_change
            if bias_change is not None:
                if bias is None:
                    raise FoldError(f"adapter {name!r} adds a bias, but the site has none to hold it")
                changed["bias"] = bias = bias + strength * bias_change
    return changed
