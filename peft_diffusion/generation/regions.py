"""Pictures with regions: their masks, what each region is told, and the batch in which they are drawn."""

import base64
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ..bases import denoiser_of
from ..bases.pipelines import Pipeline, computes_on, guides, uncompiled
from ..bases.regional_attention import COMPILED, attending
from ..core import regions
from ..core.errors import UserError
from ..core.parsing import refusing
from ..core.strength_schedule import ByPart
from ..fast import drawing
from .region_settings import FEATHER, ISOLATED_SUBJECTS, Region
from .settings import Tile
from .source import opened
from .tiling import DIMENSIONS

if TYPE_CHECKING:
    from .sampler import Cell

_LIKE = 48.0  # how far a colour may lie from that of a region, as where a picture was saved as JPEG
_COLORS_SHOWN = 4
_BLACK = "its mask is black; white is the region, and what is transparent counts as black"
_PNG = "png:"


@dataclass(frozen=True)
class Area:
    """Where a region is.

    Attributes:
        box: Left, top, right, bottom: shares of the sides, or pixels; None for a mask.
        mask: White in the region; None for a box.
    """

    box: tuple[float, ...] | None = None
    mask: Image.Image | None = field(default=None, repr=False)

    @classmethod
    def of(cls, region: Region, read: Callable[[Path, str], Image.Image] = opened) -> "Area":
        """Read the pictures of a region.

        Args:
            region: What was said of it.
            read: Opens a picture of a region, with the CSS colour of what is transparent.

        Returns:
            Where it is.

        Raises:
            UserError: A picture cannot be read, or has no such colour.
        """
        if region.mask is not None:
            return cls(None, read(region.mask, "black").convert("L"))
        if region.painted is None:
            return cls(tuple(region.box))
        pixels = np.asarray(read(region.painted, "white").convert("RGB"), dtype=np.float32)
        wanted = np.array([int(region.color[start : start + 2], 16) for start in (1, 3, 5)], dtype=np.float32)
        found = np.sqrt(((pixels - wanted) ** 2).sum(-1)) < _LIKE
        if not found.any():
            colors, counts = np.unique(pixels.astype(np.uint8).reshape(-1, 3), axis=0, return_counts=True)
            most = colors[np.argsort(-counts, kind="stable")[:_COLORS_SHOWN]]
            there = ", ".join(f"#{color.tobytes().hex()}" for color in most)
            raise UserError(f"{region.painted} has nothing of the colour {region.color}; most of it is {there}")
        return cls(None, Image.fromarray(found.astype(np.uint8) * 255))

    def coverage(self, width: int, height: int) -> Tensor:
        """Tell how much of each pixel is in the region.

        Args:
            width: Of the picture, in pixels.
            height: Of the picture, in pixels.

        Returns:
            (height, width), from 0 to 1.
        """
        if self.mask is not None:
            fitted = (
                self.mask if self.mask.size == (width, height) else self.mask.resize((width, height), Image.Resampling.BOX)
            )
            return torch.from_numpy(np.asarray(fitted, dtype=np.float32) / 255)
        box = self.shared(width, height).box or (0.0, 0.0, 1.0, 1.0)
        left, top, right, bottom = (one * side for one, side in zip(box, (width, height) * 2, strict=True))

        def along(low: float, high: float, side: int) -> Tensor:
            places = torch.arange(side, dtype=torch.float32)
            return (torch.clamp(places + 1, max=high) - torch.clamp(places, min=low)).clamp(0, 1)

        return along(top, bottom, height)[:, None] * along(left, right, width)

    def shared(self, width: int, height: int) -> "Area":
        """Say a box in shares of the sides, so that it is the same part of a larger picture, as of a second pass.

        Args:
            width: Of the picture that its pixels are of.
            height: Of the same.

        Returns:
            The area, with what of a box lies outside of the picture cut off.
        """
        if self.box is None or max(self.box) <= 1:
            return self
        sides = (width, height) * 2
        return replace(self, box=tuple(min(1.0, one / side) for one, side in zip(self.box, sides, strict=True)))

    def text(self) -> str:
        """Write it for a recipe, which holds masks too.

        Returns:
            What `parse_area` reads.
        """
        if self.mask is None:
            return ",".join(map(repr, self.box or ()))
        stream = io.BytesIO()
        self.mask.save(stream, "PNG", optimize=True)
        return _PNG + base64.b64encode(stream.getvalue()).decode()


def parse_area(text: str) -> Area:
    """Read where a region is from a recipe.

    Args:
        text: Of `Area.text`.

    Returns:
        The same.

    Raises:
        UserError: It is none.
    """
    with refusing("a region of the recipe cannot be read"):
        if text.startswith(_PNG):
            mask = Image.open(io.BytesIO(base64.b64decode(text.removeprefix(_PNG), validate=True)), formats=["PNG"])
            return Area(None, mask.convert("L"))
        return Area(tuple(Region(box=[float(one) for one in text.split(",")]).box))


@dataclass(frozen=True)
class DrawnRegion:
    """A region of a picture that is drawn.

    Attributes:
        area: Where it is.
        prompt: What it shows; None for what the whole picture does.
        strengths: Those of the adapters that differ from the whole picture's, by name.
    """

    area: Area
    prompt: str | None = None
    strengths: Mapping[str, float | ByPart] = field(default_factory=dict)


def picture_masks(parts: Sequence[DrawnRegion], width: int, height: int, feather: float, tile: Tile | None = None) -> Tensor:
    """Make the masks of the regions of a picture; where several overlap, they share.

    Args:
        parts: The regions.
        width: In pixels.
        height: In pixels.
        feather: How wide edges are, as a share of the shorter side.
        tile: Which edges of the picture meet, where regions have edges too.

    Returns:
        (1 + regions, height, width): first what is in no region. At each pixel they sum to 1.
    """
    covered = [part.area.coverage(width, height) for part in parts]
    own = torch.stack(covered) if covered else torch.zeros(0, height, width)
    total = own.sum(0)
    masks = torch.cat([(1 - total).clamp(min=0)[None], own / total.clamp(min=1)])
    radius = round(feather * min(width, height) / 2)
    if radius:
        padded, sides = masks[None], {3: (radius, radius, 0, 0), 2: (0, 0, radius, radius)}
        for dimension, beyond in sides.items():
            padded = F.pad(padded, beyond, mode="circular" if dimension in DIMENSIONS[tile] else "replicate")
        masks = F.avg_pool2d(padded, 2 * radius + 1, stride=1)[0]
    return masks


@dataclass(frozen=True)
class Division:
    """How a picture is divided into regions.

    Attributes:
        parts: The regions.
        feather: How wide their edges are, as a share of the shorter side.
        isolation: The share of the noise levels, from the noisiest, at which they do not attend to each other; None for what
            suits the strengths that adapters have, see `isolated`.
    """

    parts: tuple[DrawnRegion, ...]
    feather: float = FEATHER
    isolation: float | None = None

    def isolated(self, whole: Mapping[str, float | ByPart]) -> float:
        """Tell how long regions do not attend to each other.

        Args:
            whole: The strengths of adapters in the whole picture.

        Returns:
            The share of the noise levels, from the noisiest.
        """
        if self.isolation is None:  # what prompts alone say goes together
            return ISOLATED_SUBJECTS if any(self.groups(whole, 1 + len(self.parts))) else 0.0
        return self.isolation

    def groups(self, whole: Mapping[str, float | ByPart], count: int) -> list[int]:
        """Say which regions are normalized together: those in which adapters have the same strengths.

        Args:
            whole: The strengths of adapters in the whole picture.
            count: Of regions, with what is in none and such as cover nothing.

        Returns:
            The number of the group of each.
        """
        own = [_acting(whole), *(_acting({**whole, **part.strengths}) for part in self.parts)]
        each = [own.index(one) for one in own]
        known = list(dict.fromkeys(each))
        return [known.index(one) for one in each] + [0] * (count - len(own))

    def on(self, width: int, height: int) -> "Division":
        """Say where regions are in shares of a picture, so that they are there in every pass.

        Args:
            width: Of the picture as it is drawn first, in pixels.
            height: The same.

        Returns:
            The same regions.

        Raises:
            UserError: A region holds nothing of the picture.
        """
        for number, part in enumerate(self.parts, 1):
            if not bool(part.area.coverage(width, height).any()):
                where = _BLACK if part.area.box is None else f"its box {part.area.text()} lies outside"
                which = f"region {number} of {len(self.parts)}"  # which nobody takes for a place counted from 0
                raise UserError(f"{which} holds nothing of a picture of {width}x{height}: {where}")
        return replace(self, parts=tuple(replace(part, area=part.area.shared(width, height)) for part in self.parts))

    def cut(self, width: int, height: int) -> list[str]:
        """Tell of boxes that reach beyond a picture, as those for a larger one do.

        Args:
            width: Of the picture, in pixels.
            height: The same.

        Returns:
            What the person should know, one for each.
        """
        boxes = [(number, part.area.box) for number, part in enumerate(self.parts, 1) if part.area.box is not None]
        return [
            f"region {number} of {len(self.parts)} reaches beyond a picture of {width}x{height}: its box"
            f" {','.join(f'{one:g}' for one in box)} is cut off there"
            for number, box in boxes
            if max(box) > 1 and (box[2] > width or box[3] > height)
        ]

    def worded(self, prompts: Iterator[str]) -> "Division":
        """Give regions other prompts, each that has one.

        Args:
            prompts: One for each region, also for those that have none.

        Returns:
            The same with these.
        """
        read = [(part, next(prompts)) for part in self.parts]
        return replace(self, parts=tuple(part if part.prompt is None else replace(part, prompt=one) for part, one in read))


def _acting(strengths: Mapping[str, float | ByPart]) -> dict[str, float | ByPart]:
    """The strengths of what acts, those that are the same for all parts as numbers."""
    plain = {name: one.strength if one == ByPart(getattr(one, "strength", 0.0)) else one for name, one in strengths.items()}
    return {name: one for name, one in plain.items() if one != 0}


def columns(cells: "Sequence[Cell]") -> "list[Cell]":
    """List what is drawn in the regions of pictures, as pictures of their own.

    Args:
        cells: The pictures of a batch.

    Returns:
        Of each picture what is in none of its regions, and its regions; of all as many. Without any regions the pictures.
    """
    most = max((len(cell.division.parts) for cell in cells if cell.division is not None), default=0)
    found = []
    for cell in cells:
        whole, parts = replace(cell, division=None), () if cell.division is None else cell.division.parts
        found.append(whole)
        for part in parts:
            prompt = cell.prompt if part.prompt is None else part.prompt
            found.append(replace(whole, prompt=prompt, strengths={**(cell.strengths or {}), **part.strengths}))
        found += [whole] * (most - len(parts))
    return found


@dataclass(frozen=True)
class Regional:
    """A batch of pictures with regions.

    Attributes:
        divisions: How each is divided.
        isolations: How long the regions of each do not attend to each other, as `Division.isolated`.
        groups: Of each, which regions are normalized together.
        tile: Which edges of the pictures meet.
    """

    divisions: tuple[Division, ...]
    isolations: tuple[float, ...]
    groups: tuple[tuple[int, ...], ...]
    tile: Tile | None = None

    @classmethod
    def of(cls, cells: "Sequence[Cell]", tile: Tile | None = None) -> "Regional | None":
        """Lay out pictures.

        Args:
            cells: The pictures.
            tile: Which edges of them meet.

        Returns:
            The batch; None where no picture has regions.
        """
        if all(cell.division is None for cell in cells):
            return None
        divisions = [cell.division or Division(()) for cell in cells]
        count = 1 + max(len(division.parts) for division in divisions)
        each = [(one, cell.strengths or {}) for one, cell in zip(divisions, cells, strict=True)]
        isolations = tuple(one.isolated(whole) for one, whole in each)
        return cls(tuple(divisions), isolations, tuple(tuple(one.groups(whole, count)) for one, whole in each), tile)

    @property
    def count(self) -> int:
        """Regions of a picture, with what is in none."""
        return len(self.groups[0])

    def masks(self, width: int, height: int) -> Tensor:
        """Make the masks of all pictures.

        Args:
            width: In pixels.
            height: In pixels.

        Returns:
            (pictures, regions, height, width).
        """
        found = torch.zeros(len(self.divisions), self.count, height, width)
        for number, one in enumerate(self.divisions):
            own = picture_masks(one.parts, width, height, one.feather, self.tile)
            found[number, : len(own)] = own
        return found

    def told(self, encoding: Mapping[str, Tensor], width: int, height: int) -> dict[str, Tensor]:
        """Bring what a pipeline is told of each region to what it is told of each picture.

        Args:
            encoding: Embeddings by the name of the argument: hidden states (pictures * regions, tokens, width), and
                summaries (pictures * regions, width).
            width: Of the pictures, in pixels.
            height: Of the pictures, in pixels.

        Returns:
            Hidden states (pictures, regions * tokens, width), and of summaries the mean by areas.
        """
        areas = self.masks(width, height).mean((2, 3))
        found = {}
        for name, one in encoding.items():
            each = one.unflatten(0, (len(self.divisions), self.count))
            if one.ndim == 3:
                found[name] = each.flatten(1, 2)
            else:
                found[name] = torch.einsum("prw,pr->pw", each.float(), areas.to(one.device)).to(one.dtype)
        return found

    @contextmanager
    def drawn(self, pipe: Pipeline, width: int, height: int, beside: Sequence[Any] = ()) -> Iterator[None]:
        """Compute the pictures by regions inside.

        Args:
            pipe: The one that draws.
            width: In pixels.
            height: In pixels.
            beside: Networks beside the one that denoises, which are told the same.

        Yields:
            Once.

        Raises:
            UserError: The network is compiled, or attends in a way that knows no regions.
        """
        denoiser = denoiser_of(pipe)
        network = denoiser.network
        if any(uncompiled(part) is network and part is not network for part in pipe.components.values()):
            raise UserError(COMPILED)  # what is compiled knows nothing of a thread's regions
        latents = height // denoiser.factor, width // denoiser.factor
        masks = self.masks(width, height).to(computes_on(pipe))
        layout = regions.Layout(masks, latents, [network, *beside], self.groups)

        @contextmanager
        def changing() -> Iterator[None]:
            with ExitStack() as engines:
                for one in sorted(layout.networks, key=id):  # in which no thread waits for one that waits for it
                    engines.enter_context(drawing.held(one))
                yield

        def isolate(_: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            if regions.present() is layout:
                timestep = denoiser.read_call(args, kwargs).timestep
                now = float(torch.as_tensor(timestep).flatten()[0]) if any(0 < one < 1 for one in self.isolations) else 0.0
                layout.isolated = tuple(one == 1 or (one > 0 and guides(pipe, now, one)) for one in self.isolations)

        # Before the hooks that call the networks beside it.
        handle = network.register_forward_pre_hook(isolate, with_kwargs=True, prepend=True)
        try:
            apart = layout.norm_groups > 1
            with attending(layout.networks, changing, norms_apart=apart), regions.using(layout):
                yield
        finally:
            handle.remove()
