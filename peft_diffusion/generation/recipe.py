"""The recipe of a picture, and files that carry it. Imports no torch."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

from ..bases import prompt_syntax, schedulers
from ..core.errors import UserError
from ..core.files import written_aside
from ..core.parsing import json_value, refusing
from ..core.strength_schedule import ByPart
from ..data.picture_formats import READ, Carried, format_of, own_text
from ..data.prompts import words_of
from ..formats.container import title
from . import amounts, hires

if TYPE_CHECKING:
    from PIL import Image

VERSION = 1
# Fields that a recipe has only where there is something to say.
_WHERE_THERE = frozenset(
    {"plugins", "base_sha256", "hires", "hires_upscaler", "hires_strength", "hires_steps", "tile", "controls", "compose"}
    | {"compose_file", "divided", "region_feather", "region_isolation"}
)
_MOST_PIXELS = 100_000_000  # more than are drawn here


@dataclass(frozen=True)
class UsedAdapter:
    """An adapter of a picture: where its file was, what was in it, how much of it was applied.

    ``data_sha256`` is the digest of its tensors alone, by which A1111 and kohya know it; "" in recipes that lack it.
    ``component`` and ``word`` are what was said of its names and words; "" for nothing. ``parts`` is what the strength is
    multiplied by in parts of the base and over the steps, as ``--adapter`` takes it; "" for nothing.
    """

    path: str
    sha256: str
    strength: float
    data_sha256: str = ""
    component: str = ""
    word: str = ""
    parts: str = ""

    @property
    def by_part(self) -> ByPart | None:
        """What the strength is multiplied by; None for nothing. Raises UserError where ``parts`` cannot be read."""
        return amounts.parse(self.parts, self.path)[1] if self.parts else None


@dataclass(frozen=True)
class UsedPicture:
    """A picture that another was made from, its mask or another file: where it was, and the digest of its bytes."""

    path: str
    sha256: str


@dataclass(frozen=True)
class UsedControl:
    """A picture that steered another: what ``--control`` said, the digests of the model's weights and of the picture."""

    kind: str
    model: str
    sha256: str
    picture: str
    picture_sha256: str
    scale: float


@dataclass(frozen=True)
class UsedRegion:
    """A region of a picture: a box or a mask, what it shows, and the strengths there.

    ``area`` is four numbers, or a PNG in base 64. ``adapters`` is JSON: by the number of an adapter of the recipe its
    strength in the region, as ``--adapter`` takes it.
    """

    area: str
    prompt: str
    adapters: str

    def amounts(self) -> dict[int, float | ByPart]:
        """Give the strengths in the region, by the number of the adapter.

        Raises:
            UserError: They cannot be read.
        """
        found: dict[int, float | ByPart] = {}
        with refusing("the strengths of a region of the recipe cannot be read"):
            for number, text in json_value(self.adapters).items():
                strength, parts = amounts.parse(text, f"adapter {number}")
                found[int(number)] = strength if parts is None else parts.scaled(strength)
        return found


USED_FILES = ("image", "mask", "compose_file")
"""The fields of a recipe that are a `UsedPicture`."""

_Used = TypeVar("_Used", UsedAdapter, UsedPicture, UsedControl, UsedRegion)


@dataclass(frozen=True)
class Recipe:
    """Everything that a picture was made from. ``scheduler`` None is the base's own; sizes are in pixels; ``guidance_stop``
    None is that of recipes from before there was one, which is 1.

    ``plugins`` are the modules that the methods of its adapters come from. ``sampler_options`` are those of the scheduler
    that drew, and ``vae`` is the fingerprint of the VAE; None where that is not known, as in recipes of older versions.

    ``prompt_weights``, ``clip_skip`` and ``zero_negative`` are how the prompts were read, ``prompt_2`` is what the second
    text encoder read; None is what the base and the settings have by default. ``written`` is the prompt with what it left
    open and the adapters that it named; None where it is the prompt.

    ``base_sha256`` is the digest of the one file that the base was read from; "" where it is no file.

    ``hires`` is how many times larger a second pass made the picture, whose first pass ``width`` and ``height`` are of.

    ``compose`` is how its adapters met; None where they were added. ``compose_file`` is what was learned of that.

    ``divided`` are its regions, and ``region_feather`` and ``region_isolation`` how they meet; None without any.

    ``base`` is the source that was named; ``base_name``, ``base_family`` and ``fingerprint`` are what was found there.
    """

    prompt: str
    negative: str
    seed: int
    width: int
    height: int
    steps: int
    guidance: float
    scheduler: str | None
    sampler: str
    base: str
    base_name: str
    base_family: str
    fingerprint: str
    device: str
    dtype: str
    adapters: tuple[UsedAdapter, ...]
    versions: Mapping[str, str]
    quantize: str | None = None
    image: UsedPicture | None = None
    mask: UsedPicture | None = None
    strength: float | None = None
    guidance_stop: float | None = None
    plugins: tuple[str, ...] = ()
    base_sha256: str = ""
    sampler_options: Mapping[str, Any] | None = None
    vae: str | None = None
    prompt_2: str | None = None
    prompt_weights: str | None = None
    clip_skip: int | None = None
    zero_negative: bool | None = None
    variation_seed: int | None = None
    variation_strength: float | None = None
    written: str | None = None
    prediction: str | None = None
    hires: float | None = None
    hires_upscaler: str | None = None
    hires_strength: float | None = None
    hires_steps: int | None = None
    tile: str | None = None
    controls: tuple[UsedControl, ...] = ()
    compose: str | None = None
    compose_file: UsedPicture | None = None
    divided: tuple[UsedRegion, ...] = ()
    region_feather: float | None = None
    region_isolation: float | None = None

    def to_json(self) -> dict[str, Any]:
        """As JSON values; those of `_WHERE_THERE` where there are."""
        told = asdict(self) | ({} if self.divided else {"region_feather": None, "region_isolation": None})
        return {name: value for name, value in told.items() if value not in (None, (), "") or name not in _WHERE_THERE}

    @classmethod
    def from_json(cls, values: Any) -> "Recipe":
        """Read a recipe.

        Args:
            values: As JSON gave them.

        Returns:
            The recipe.

        Raises:
            ValueError: A field is missing or of another type.
        """
        told: dict[str, Any] = {**_WITHOUT, **values} if isinstance(values, dict) else {}
        known: dict[str, Any] = {one.name: told.get(one.name) for one in fields(cls)}
        for name, value in known.items():
            if not isinstance(value, _KINDS[name]) or (isinstance(value, bool) and bool not in _KINDS[name]):
                raise ValueError(f"{name} is missing or of another type")
        if not all(isinstance(module, str) for module in told["plugins"]):
            raise ValueError("plugins are of another type")
        pictures = {name: _used(UsedPicture, told[name]) for name in USED_FILES if known[name] is not None}
        known |= pictures
        known["adapters"] = tuple(_used(UsedAdapter, one) for one in told["adapters"])
        known["controls"] = tuple(_used(UsedControl, one) for one in told["controls"])
        known["divided"] = tuple(_used(UsedRegion, one) for one in told["divided"])
        known["plugins"] = tuple(told["plugins"])
        return cls(**known)

    def other_tools(self, other: "Recipe") -> list[str]:
        """Tell what of the tools that drew differs in another recipe, so that it would be another picture.

        Args:
            other: That recipe.

        Returns:
            A few words each, first what is here, then what is there; nothing for what one of them does not tell.
        """
        if self.sampler != other.sampler:
            return [f"{self.sampler}, not {other.sampler}"]
        mine, theirs = self.sampler_options or {}, other.sampler_options or {}
        shared = (name for name in mine if name in theirs)  # versions of diffusers know different ones
        found = [f"{name} {mine[name]}, not {theirs[name]}" for name in shared if mine[name] != theirs[name]]
        if self.vae is not None and other.vae is not None and self.vae != other.vae:
            found.append(f"a VAE {self.vae}, not {other.vae}")
        return found

    @property
    def sampled_by(self) -> str:
        """What A1111 calls the scheduler."""
        return schedulers.label(self.scheduler) if self.scheduler else schedulers.label_of_class(self.sampler)

    def parameters(self) -> str:
        """The text that A1111 writes into its pictures, which galleries and other programs show.

        It has the prompt as it was drawn: instructions that were not followed are left out, and brackets that were letters
        here are letters there.
        """
        named = list(zip(_names(self.adapters), self.adapters, strict=True))
        loras = "".join(f" <lora:{name}:{_strengths(used)}>" for name, used in named)
        hashes = ", ".join(f"{name}: {used.data_sha256[:12]}" for name, used in named if used.data_sha256)
        words: tuple[str, ...] = (words_of(self.prompt).text, words_of(self.negative).text)
        if self.prompt_weights == "none":
            words = tuple(prompt_syntax.from_letters(text) for text in words)
        prompt, negative = words
        fields = {
            "Steps": self.steps,
            "Sampler": self.sampled_by,
            **(
                {"Variation seed": self.variation_seed, "Variation seed strength": f"{self.variation_strength:g}"}
                if self.variation_seed is not None and self.variation_strength
                else {}
            ),
            "CFG scale": f"{self.guidance:g}",
            "Seed": self.seed,
            "Size": f"{self.width}x{self.height}",
            **({"Model hash": self.base_sha256[:10]} if self.base_sha256 else {}),
            "Model": Path(self.base_name).stem if self.base_sha256 else self.base_name,
            **({"Clip skip": self.clip_skip} if self.clip_skip is not None else {}),
            **({"Denoising strength": f"{self.strength:g}"} if self.strength is not None else {}),
            **self._second_pass(),
            **({"Tiling": "True"} if self.tile == "both" else {}),  # A1111 has no other
            **({"Lora hashes": hashes} if hashes else {}),
            "Version": f"peft_diffusion {self.versions.get('peft_diffusion', '')}",
        }
        lines = [prompt + loras, *([f"Negative prompt: {negative}"] if negative else [])]
        return "\n".join([*lines, ", ".join(f"{key}: {_quoted(value)}" for key, value in fields.items())])

    def _second_pass(self) -> dict[str, object]:
        """What A1111 writes of its hires fix."""
        if self.hires is None or self.hires_strength is None or self.hires_upscaler is None:
            return {}
        return {
            "Denoising strength": f"{self.hires_strength:g}",
            "Hires upscale": f"{self.hires:g}",
            "Hires steps": self.hires_steps,
            "Hires upscaler": hires.label(self.hires_upscaler),
        }


def _used(kind: type[_Used], values: object) -> _Used:
    """A part of a recipe, whose fields are texts and numbers. Raises ValueError or TypeError for what is none."""
    if not isinstance(values, dict):
        raise ValueError(f"{values!r:.80} is no {kind.__name__}")
    made = kind(**values)
    for one in fields(kind):
        if not isinstance(getattr(made, one.name), one.type if isinstance(one.type, type) else ()):
            raise ValueError(f"{one.name} of a {kind.__name__} is of another type")
    return made


def _strengths(used: UsedAdapter) -> str:
    """A strength as A1111 has it: of the text encoders and of the UNet, where these differ; it has no blocks and steps."""
    text, network = amounts.of_text_and_network(used.strength, used.by_part)
    return f"{text:g}" if text == network else f"{text:g}:{network:g}"


def _names(adapters: Sequence[UsedAdapter]) -> list[str]:
    """A name for each adapter, as A1111 would call the file: without what ends a name there, and none twice."""
    names: list[str] = []
    for used in adapters:
        stem = re.sub(r"[:,<>\n]", "", title(Path(used.path)))
        tried = (stem if number == 1 else f"{stem}_{number}" for number in range(1, len(adapters) + 1))
        names.append(next(name for name in tried if name not in names))
    return names


def _quoted(value: object) -> str:
    """A value as A1111 writes it: quoted where it holds what parts the values."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if re.search(r"[,:\n]", text) else text


_KINDS: dict[str, tuple[type, ...]] = {
    "prompt": (str,), "negative": (str,), "seed": (int,), "width": (int,), "height": (int,), "steps": (int,),
    "guidance": (int, float), "scheduler": (str, type(None)), "sampler": (str,), "base": (str,), "base_name": (str,),
    "base_family": (str,), "fingerprint": (str,), "device": (str,), "dtype": (str,), "adapters": (list,),
    "versions": (dict,), "quantize": (str, type(None)), "image": (dict, type(None)), "mask": (dict, type(None)),
    "strength": (float, int, type(None)), "guidance_stop": (float, int, type(None)),
    "sampler_options": (dict, type(None)), "vae": (str, type(None)),
    "prompt_2": (str, type(None)), "prompt_weights": (str, type(None)), "clip_skip": (int, type(None)),
    "variation_seed": (int, type(None)), "variation_strength": (float, int, type(None)),
    "zero_negative": (bool, type(None)), "written": (str, type(None)), "prediction": (str, type(None)),
    "hires": (float, int, type(None)), "hires_upscaler": (str, type(None)), "hires_strength": (float, int, type(None)),
    "hires_steps": (int, type(None)), "tile": (str, type(None)), "compose": (str, type(None)),
    "plugins": (list,), "base_sha256": (str,), "controls": (list,), "divided": (list,),
    "compose_file": (dict, type(None)),
    "region_feather": (float, int, type(None)), "region_isolation": (float, int, type(None)),
}  # fmt: skip
"""What JSON has for each field, all of them."""

_WITHOUT: Mapping[str, Any] = MappingProxyType({"plugins": [], "base_sha256": "", "controls": [], "divided": []})
"""What fields of `_WHERE_THERE` that are never None are in a recipe that lacks them."""


def write(path: Path, image: "Image.Image", recipe: Recipe, quality: int | None = None) -> None:
    """Save a picture with its recipe, aside and then renamed.

    Args:
        path: A file, of the format that its ending says.
        image: The picture.
        recipe: What it was made from.
        quality: From 1 to 100, of a format that loses something; None for the usual.

    Raises:
        UserError: It cannot be written.
    """
    _save(path, image, carried(recipe), quality)


def carried(recipe: Recipe) -> Carried:
    """Make the texts by which a picture carries its recipe, for us and for programs that read A1111's.

    Args:
        recipe: What it was made from.

    Returns:
        The texts, which tell Pillow's ``save`` what to write in each format.
    """
    return Carried(json.dumps({"version": VERSION, "recipe": recipe.to_json()}), recipe.parameters())


def write_sheet(path: Path, sheet: "Image.Image", recipes: Sequence[Sequence[Recipe]], quality: int | None = None) -> None:
    """Save a sheet with the recipe of each of its pictures.

    Args:
        path: A file, of the format that its ending says.
        sheet: The picture.
        recipes: By row.
        quality: From 1 to 100, of a format that loses something; None for the usual.

    Raises:
        UserError: It cannot be written.
    """
    _save(path, sheet, _of_sheet(recipes), quality)


def check_sheet(path: Path, recipes: Sequence[Sequence[Recipe]]) -> None:
    """See before anything is drawn that a sheet can carry the recipes of all its pictures.

    Args:
        path: Its file.
        recipes: By row.

    Raises:
        UserError: They are too many for a JPEG.
    """
    if not _of_sheet(recipes).fits(format_of(path)):
        raise UserError(f"{path}: the recipes of so many pictures have no room in a JPEG; take .png or .webp")


def _of_sheet(recipes: Sequence[Sequence[Recipe]]) -> Carried:
    rows = [[recipe.to_json() for recipe in row] for row in recipes]
    return Carried(json.dumps({"version": VERSION, "sheet": rows}))


def read(path: Path) -> Recipe:
    """Read the recipe that a picture carries.

    Args:
        path: A PNG, JPEG or WebP file.

    Returns:
        The recipe.

    Raises:
        UserError: It is none of these, has no recipe, or that is damaged.
    """
    if not path.is_file():
        raise UserError(f"there is no picture {path}")
    from PIL import Image

    with refusing(f"{path} cannot be read as a PNG, JPEG or WebP picture"), Image.open(path, formats=READ) as image:
        if image.width * image.height > _MOST_PIXELS:
            raise UserError(f"{path} has more than {_MOST_PIXELS:,} pixels, so it is no picture with a recipe")
        image.load()  # text may stand after the pixels
        with refusing(f"{path}: its recipe is damaged"):
            text = own_text(image)
    if text is None:
        raise UserError(f"{path} carries no recipe: it was not made by peft_diffusion, or another program saved it again")
    with refusing(f"{path}: its recipe is damaged"):
        values = json_value(text)
        if "sheet" in values:
            raise UserError(f"{path} is a sheet of many pictures; a recipe is read from a single one")
        if values["version"] > VERSION:
            raise UserError(f"{path}: its recipe was written by a newer peft_diffusion; update the package")
        return Recipe.from_json(values["recipe"])


def check_target(path: Path) -> None:
    """Find out before any work whether a picture can be written.

    Args:
        path: Where.

    Raises:
        UserError: It cannot.
    """
    format_of(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder, not a file")
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is no regular file, so it cannot be replaced")
    check_folder(path.parent)


def check_folder(folder: Path) -> None:
    """Find out before any work whether files can be made in a folder.

    Args:
        folder: Need not exist yet.

    Raises:
        UserError: They cannot.
    """
    there = next((place for place in (folder, *folder.absolute().parents) if place.exists()), Path("/"))
    if not there.is_dir():
        raise UserError(f"{folder} cannot be a folder: {there} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"nothing can be written to {folder}: {there} is read-only")


def _save(path: Path, image: "Image.Image", texts: Carried, quality: int | None) -> None:
    check_target(path)
    kind = format_of(path)
    if not texts.fits(kind):
        raise UserError(f"{path}: the recipe has no room in a JPEG; take .png or .webp")
    with written_aside(path) as aside:
        image.save(aside, **texts.options(kind, quality))
