"""``merge --into``: adapters folded into the weights of a base, and a checkpoint written that other programs read."""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..bases import single_file
from ..core.errors import FoldError, UserError
from ..core.events import Noted, Warned
from ..core.files import at_home, explained
from ..core.merge import folded
from ..core.weight_change import change_of, with_weights
from ..core.wording import number_of
from ..formats import container
from ..formats.container import is_finite, torch_dtype
from ..formats.file import DTYPES
from ..formats.metadata import OF_THE_BYTES
from .original_names import VAE, Row, bare, laid
from .results import Made
from .sources import Source, Where, bind_sources
from .tool_settings import MergeConfig
from .watch import Watch
from .weights import Weights, is_weights, is_whole_base, open_weights

_SHADOW = "model_ema."  # a running mean of the weights that older checkpoints hold beside them
_LAST_OF_SD2, _DOUBLED = 22, 23  # layers of its text encoder: diffusers leaves the last of 24 away, which draws nothing
_OF_DIFFUSERS, _OF_TRANSFORMERS = "diffusion_pytorch_model.safetensors", "model.safetensors"


class Folding:
    """Adapters that are folded into the weights of a base, one module at a time.

    Attributes:
        weights: Of the base.
        sites: The files that change each site, by component and by the path as `original_names.bare` spells it.
        dtype: Of the checkpoint; None: as the base has each tensor.
    """

    def __init__(self, weights: Weights, sources: Sequence[Source], dtype: torch.dtype | None) -> None:
        """Find the sites.

        Args:
            weights: Of the base.
            sources: The adapters.
            dtype: Of the checkpoint; None: as the base has each tensor.
        """
        self.weights = weights
        self.sites: dict[Where, list[Source]] = {}
        self._paths: dict[Where, str] = {}
        self.dtype = dtype
        self._last: tuple[Where, Mapping[str, Tensor]] | None = None
        for source in sources:
            for component, path in source.sites:
                self.sites.setdefault((component, bare(path)), []).append(source)
                self._paths[component, bare(path)] = path

    def tensor(self, component: str, key: str) -> Tensor:
        """Give a tensor of the base with all adapters in it.

        Args:
            component: The part of the base.
            key: Its name there.

        Returns:
            The tensor in the dtype of the checkpoint.

        Raises:
            UserError: It cannot be read, or holds a number that the dtype cannot.
        """
        path, _, kind = key.rpartition(".")
        changed = self._changed((component, path)).get(kind)
        value = self.weights.read(component, key) if changed is None else changed
        wanted = self.wanted(self.weights.places[component, key].dtype)
        rounded = value.to(wanted)
        if value.is_floating_point() and not is_finite(rounded):
            raise UserError(f"{component}.{key} has numbers that {wanted} cannot hold; take --dtype float32 or bf16")
        return rounded

    def wanted(self, own: torch.dtype) -> torch.dtype:
        """Tell the dtype that a tensor of the base has in the checkpoint.

        Args:
            own: The one that the base has it in.

        Returns:
            The dtype.
        """
        return self.dtype if self.dtype is not None and own.is_floating_point else own

    def leave_out(self, watch: Watch) -> dict[Where, str]:
        """Leave out the sites that have no change of weight and bias which the base could hold.

        Args:
            watch: Is told how far it is.

        Returns:
            Why, by site.
        """
        left: dict[Where, str] = {}
        for where, own in watch.each("looking at sites", self.sites.items()):
            component, _ = where
            module = self.weights.parts[component].get_submodule(self._paths[where])
            for source in own:
                try:
                    adapter = source.adapter((component, self._paths[where]), module)
                    bias = change_of(adapter, module, ".".join(where)).bias
                except FoldError as error:
                    left[where] = str(error)
                except UserError:  # it looks at the weight, which is there when it is folded
                    continue
                else:
                    if bias is not None and getattr(module, "bias", None) is None:
                        left[where] = f"{source.path} adds a bias, and the layer has none to hold it"
        self.sites = {where: own for where, own in self.sites.items() if where not in left}
        return left

    def _changed(self, where: Where) -> Mapping[str, Tensor]:
        """Weight and bias of a module, those of both that change; kept until another module is asked for."""
        if self._last is None or self._last[0] != where:
            self._last = (where, self._fold(where) if where in self.sites else {})
        return self._last[1]

    def _fold(self, where: Where) -> Mapping[str, Tensor]:
        component, path = where[0], self._paths[where]
        held = {kind: tensor.float() for kind, tensor in self.weights.of_module(component, path).items()}
        module = with_weights(self.weights.parts[component].get_submodule(path), held)
        adapters = []
        for source in self.sites[where]:
            adapter = source.adapter((component, path), module)
            adapter.bind(module)
            adapters.append((source.name, adapter, source.strength))
        return folded(held.get("weight", torch.zeros(0)), held.get("bias"), adapters)


def merge_into(config: MergeConfig, watch: Watch) -> Made:
    """Fold adapters into a base and write the checkpoint.

    Args:
        config: Which adapters and which base.
        watch: Is told how far it is.

    Returns:
        What was written.

    Raises:
        UserError: A file cannot be read or written, or an adapter cannot be folded; nothing is written.
    """
    choices = config.choices()
    weights = open_weights(config.into or "")
    plans, strengths = [one.parsed() for one in choices], [one.strength for one in choices]
    sources = bind_sources(plans, weights.skeleton, weights, str(config.into), watch.tell, strengths)
    folding = Folding(weights, sources, None if config.dtype is None else DTYPES[config.dtype])
    _refuse_left(folding.leave_out(watch), config.skip, watch)
    output = at_home(config.output)
    told = {"modelspec.merged_from": ", ".join((Path(config.into or "").stem, *(one.name for one in sources)))}
    if output.suffix == ".safetensors":
        _write_file(output, folding, told, watch)
    else:
        _write_folder(output, folding, watch)
    return watch.made(output, len(folding.sites))


def _refuse_left(left: Mapping[Where, str], skip: bool, watch: Watch) -> None:
    """Raises UserError where something cannot be folded that is not to be left out."""
    if left and not skip:
        where, why = next(iter(left.items()))
        raise UserError(
            f"{'.'.join(where)}: {why}; --skip leaves out {number_of(len(left), 'such site')}, and the checkpoint then"
            " draws without"
        )
    for where, why in left.items():
        watch.tell(Warned(f"left out {'.'.join(where)}: {why}"))


@dataclass(frozen=True)
class _Entry:
    """A tensor of the file that is written: its dtype, its shape, and how it is made."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]


def _write_file(output: Path, folding: Folding, told: Mapping[str, str], watch: Watch) -> None:
    weights = folding.weights
    if any(map(is_whole_base, weights.parts)):
        raise UserError(f"a language model is a folder; name a folder for --output, not {output}")
    entries = _of_rows(folding) if weights.stored is None else _of_stored(folding, weights.stored, watch)
    header = weights.header.metadata if weights.header is not None else {}
    metadata = {key: value for key, value in header.items() if key not in OF_THE_BYTES}
    _stream(output, entries, {**metadata, **told}, watch)


def _stream(
    output: Path, entries: Mapping[str, _Entry], metadata: Mapping[str, str], watch: Watch, component: str = ""
) -> None:
    tick, done = watch.ticks(f"writing tensors{component and f' of {component}'}"), [0]

    def tensor_of(name: str) -> Tensor:
        done[0] += 1
        tick(done[0], len(entries))
        return entries[name].make()

    container.write_each(output, {name: (one.dtype, one.shape) for name, one in entries.items()}, tensor_of, metadata)


def _of_rows(folding: Folding) -> dict[str, _Entry]:
    """A folder as a single file."""
    weights = folding.weights
    found = {row.name: _of_row(folding, row, None) for row in weights.rows() if weights.has(row.component, row.keys[0])}
    for name in list(found):  # which trainers look for
        layer = f".resblocks.{_LAST_OF_SD2}."
        doubled = name.replace(layer, f".resblocks.{_DOUBLED}.")
        if name.startswith("cond_stage_model.model.") and layer in name:
            found.setdefault(doubled, found[name])
    return found


def _of_row(folding: Folding, row: Row, shape: tuple[int, ...] | None) -> _Entry:
    """A tensor that the base's are laid into; with the shape that the single file has it in, where there is one."""
    weights = folding.weights
    first = weights.places[row.component, row.keys[0]]
    own = first.shape if len(row.keys) == 1 else (first.shape[0] * len(row.keys), *first.shape[1:])
    if shape is None:
        shape = own[::-1] if row.form == "turned" else (*own, 1, 1) if row.form == "convolution" and len(own) == 2 else own
    dtype = folding.wanted(first.dtype)

    def make() -> Tensor:
        return laid(row, [folding.tensor(row.component, key) for key in row.keys]).reshape(shape)

    return _Entry(dtype, shape, make)


def _of_stored(folding: Folding, stored: Mapping[str, Tensor], watch: Watch) -> dict[str, _Entry]:
    """A single file, with all that it holds but what is no longer true."""
    known = {row.name: row for row in folding.weights.rows()}
    found: dict[str, _Entry] = {}
    shadows = [name for name in stored if name.startswith(_SHADOW)]
    if shadows:
        left = number_of(len(shadows), "tensor")
        watch.tell(Noted(f"left out {left} {_SHADOW}*: a mean of the weights without the adapters"))
    for name in stored:
        if name in known:
            shape = _shape_of(folding.weights, name, stored)
            found[name] = _of_row(folding, known[name], shape)
        elif not name.startswith(_SHADOW):
            found[name] = _as_it_is(folding, name, stored)
    return found


def _shape_of(weights: Weights, name: str, stored: Mapping[str, Tensor]) -> tuple[int, ...]:
    return weights.header.tensors[name].shape if weights.header is not None else tuple(stored[name].shape)


def _as_it_is(folding: Folding, name: str, stored: Mapping[str, Tensor]) -> _Entry:
    """A tensor that belongs to no part of the base, such as a table of the noise schedule, which keeps its precision."""
    header = folding.weights.header
    shape = _shape_of(folding.weights, name, stored)
    dtype = stored[name].dtype if header is None else torch_dtype(header.tensors[name])
    wanted = folding.dtype if folding.dtype is not None and dtype.is_floating_point and len(shape) > 1 else dtype
    return _Entry(wanted, shape, lambda: stored[name].to(wanted))


def _write_folder(output: Path, folding: Folding, watch: Watch) -> None:
    if output.exists():
        raise UserError(f"{output} is there already; name a new folder, or a .safetensors file")
    weights = folding.weights
    with explained(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as aside:
            folder = Path(aside) / "base"
            if weights.path.is_dir():
                shutil.copytree(weights.path, folder, ignore=_without_weights)
            else:
                folder.mkdir()
                single_file.architecture(weights.path).write(folder)
            for component in weights.parts:
                _write_component(folder if is_whole_base(component) else folder / component, component, folding, watch)
            folder.rename(output)


def _without_weights(folder: str, names: Iterable[str]) -> set[str]:
    return {name for name in names if is_weights(Path(folder) / name) or name.startswith(".git")}


def _write_component(folder: Path, component: str, folding: Folding, watch: Watch) -> None:
    weights = folding.weights
    entries = {}
    for (part, key), place in weights.places.items():
        if part == component:
            name = place.name if place.row is None else key
            entries[name] = _Entry(folding.wanted(place.dtype), place.shape, lambda key=key: folding.tensor(component, key))  # type: ignore[misc]
    is_transformers = component != VAE and _is_transformers(folder)
    _stream(folder / (_OF_TRANSFORMERS if is_transformers else _OF_DIFFUSERS), entries, {}, watch, component)


def _is_transformers(folder: Path) -> bool:
    config = folder / "config.json"
    return config.is_file() and "architectures" in json.loads(config.read_text("utf-8"))
