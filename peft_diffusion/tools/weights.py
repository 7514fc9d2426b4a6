"""The weights of a base, read one tensor at a time: a folder of diffusers or transformers, or a checkpoint of one file."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from huggingface_hub import snapshot_download
from torch import Tensor, nn

from ..bases import family as families
from ..bases import single_file
from ..bases.base import Skeleton
from ..bases.embedded import ICONS, TINY_LM, embedded
from ..bases.loading import is_hub_id
from ..bases.skeleton import skeleton
from ..core.errors import UserError, first_line
from ..core.files import at_home
from ..core.meta import shapes_alone
from ..core.parsing import json_value, refusing
from ..formats import container
from .original_names import VAE, Row, bare, rows, taken

_PICKLES = (".bin", ".pt", ".ckpt", ".pth")
_WEIGHTS = (".safetensors", *_PICKLES)
_INDEX = ".index.json"
_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")


@dataclass(frozen=True)
class Place:
    """Where a tensor of a base lies.

    Attributes:
        tensors: Those of the file.
        name: What the file calls it.
        shape: In the base.
        row: What the tensor of the file is made of, in a single file.
    """

    tensors: Mapping[str, Tensor]
    name: str
    shape: tuple[int, ...]
    row: Row | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that it is read in, which of a safetensors file its header tells."""
        return self.tensors.dtype(self.name) if isinstance(self.tensors, container.Stored) else self.tensors[self.name].dtype


@dataclass(frozen=True)
class Weights:
    """The weights of a base. No tensor of a safetensors file stays in memory.

    Attributes:
        path: Where they lie.
        skeleton: The base without them.
        parts: Its components, and its autoencoder where there is one, on the meta device.
        places: By component and name as `original_names.bare` spells it.
        header: Of the single file, where it is one of safetensors.
        stored: All tensors of a single file; empty for a folder.
    """

    path: Path
    skeleton: Skeleton
    parts: Mapping[str, nn.Module]
    places: Mapping[tuple[str, str], Place]
    header: container.Header | None = None
    stored: Mapping[str, Tensor] | None = None

    def has(self, component: str, key: str) -> bool:
        """Tell whether there is a tensor.

        Args:
            component: The part of the base.
            key: The name of the tensor there.

        Returns:
            Whether there is.
        """
        return (component, key) in self.places

    def read(self, component: str, key: str) -> Tensor:
        """Read a tensor.

        Args:
            component: The part of the base.
            key: Its name there.

        Returns:
            The tensor in the shape that the base has it in, of the dtype of the file.

        Raises:
            UserError: It is not there, does not fit, or is damaged.
        """
        place = self.places.get((component, key))
        if place is None:
            raise UserError(f"{self.path} holds no tensor {component}.{key}")
        tensor = place.tensors[place.name]
        numbers = math.prod(place.shape) * (1 if place.row is None else len(place.row.keys))
        if tensor.numel() != numbers:
            raise UserError(f"{self.path}: tensor {place.name} {tuple(tensor.shape)} is no {component}.{key} {place.shape}")
        return tensor.reshape(place.shape) if place.row is None else taken(place.row, key, tensor, place.shape)

    def of_module(self, component: str, path: str) -> dict[str, Tensor]:
        """Read weight and bias of a module.

        Args:
            component: The part of the base.
            path: The module's path there.

        Returns:
            Those that there are, by "weight" and "bias".
        """
        keys = {kind: bare(f"{path}.{kind}") for kind in ("weight", "bias")}
        return {kind: self.read(component, key) for kind, key in keys.items() if self.has(component, key)}

    def rows(self) -> list[Row]:
        """List the tensors of the base as a single file has them.

        Returns:
            A row for each.
        """
        return rows(self.parts)


def is_whole_base(component: str) -> bool:
    """Tell whether a component is all that its base has, and lies in the base's folder itself.

    Args:
        component: Its name.

    Returns:
        Whether it is, as a language model.
    """
    return families.role_of(component) == "language model"


def open_weights(source: str | Path) -> Weights:
    """Find the weights of a base.

    Args:
        source: A folder of diffusers or transformers, a checkpoint of one file, ``"icons"`` or ``"tiny-lm"``, or a hub id,
            which is fetched.

    Returns:
        The weights, of which nothing is read yet.

    Raises:
        UserError: There is no such base, or it cannot be read.
    """
    path = _located(str(source))
    bones = skeleton(str(source) if str(source) in (ICONS, TINY_LM) else path)
    if path.is_file():
        return _of_file(path, bones)
    parts = {**bones.parts, **_autoencoder(path)}
    folders = {name: path if is_whole_base(name) else path / name for name in parts}
    places: dict[tuple[str, str], Place] = {}
    for component, folder in folders.items():
        named = {bare(name): (tensors, name) for tensors in map(_opened, weight_files(folder)) for name in tensors}
        for key, shape in _shapes(parts[component]).items():
            if key in named:
                places[component, key] = Place(*named[key], shape)
    return Weights(path, bones, parts, places)


def _located(source: str) -> Path:
    if source in (ICONS, TINY_LM):
        return embedded("base" if source == ICONS else "text/base")
    path = at_home(Path(source))
    if path.exists() or not is_hub_id(source) or path.parent.is_dir():
        if not path.exists():
            raise UserError(f"there is no base {source!r}: neither a folder, a file nor a hub id (owner/name)")
        return path
    try:
        return Path(snapshot_download(source, ignore_patterns=["*.onnx*", "*.msgpack", "*.ckpt", "*non_ema*"]))
    except Exception as error:  # of the network, the hub and its library
        raise UserError(f"base {source!r} cannot be fetched: {first_line(error)}") from None


def _autoencoder(path: Path) -> dict[str, nn.Module]:
    """The autoencoder of a folder; nothing where there is none, or no weights of it."""
    config = path / VAE / "config.json"
    if not config.is_file() or not any(map(is_weights, config.parent.iterdir())):
        return {}
    with refusing(f"{config} cannot be used"):
        return {VAE: _on_meta(json_value(config.read_text("utf-8")))}


def _on_meta(config: Mapping[str, Any]) -> nn.Module:
    with shapes_alone():
        made: nn.Module = AutoencoderKL.from_config(dict(config))
    return made


def _of_file(path: Path, bones: Skeleton) -> Weights:
    parts = {**bones.parts, VAE: _on_meta(single_file.architecture(path).configs()[VAE])}
    header = container.read_header(path) if path.suffix == ".safetensors" else None
    stored = container.Stored(header) if header is not None else single_file.unpickled(path)
    shapes = {component: _shapes(module) for component, module in parts.items()}
    found = ((row, key) for row in rows(parts) if row.name in stored for key in row.keys)
    places = {(row.component, key): Place(stored, row.name, shapes[row.component][key], row) for row, key in found}
    return Weights(path, bones, parts, places, header, stored)


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {bare(name): tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def weight_files(folder: Path) -> list[Path]:
    """Find the files of a component's weights.

    Args:
        folder: Of the component.

    Returns:
        One, or all that an index names; of several precisions the plain one, and safetensors before pickles.

    Raises:
        UserError: There is none.
    """
    for ending in _WEIGHTS:
        for stem in _STEMS:
            index = folder / f"{stem}{ending}{_INDEX}"
            if index.is_file():
                with refusing(f"{index} cannot be read"):
                    names = set(json_value(index.read_text("utf-8"))["weight_map"].values())
                return [folder / Path(name).name for name in sorted(names)]
        plain = [folder / f"{stem}{ending}" for stem in _STEMS]
        variants = [file for stem in _STEMS for file in sorted(folder.glob(f"{stem}.*{ending}"))]
        chosen = next((file for file in (*plain, *variants) if file.is_file()), None)
        if chosen is not None:
            return [chosen]
    raise UserError(f"{folder} holds no weights: neither {_STEMS[0]}.safetensors nor the like")


def is_weights(file: Path) -> bool:
    """Tell whether a file of a base's folder holds weights, or says which do.

    Args:
        file: The file.

    Returns:
        Whether it does.
    """
    return file.suffix in _WEIGHTS or file.name.endswith(_INDEX)


def _opened(file: Path) -> Mapping[str, Tensor]:
    return container.Stored(container.read_header(file)) if file.suffix == ".safetensors" else single_file.unpickled(file)
