"""The cache of latents and text embeddings: the VAE and frozen encoders run once, before the first step."""

import contextlib
import copy
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from peft_diffusion.bases.prompts import alike
from peft_diffusion.core import checksums
from peft_diffusion.core.errors import UserError

from . import inpainting_masks
from .buckets import Bucket, ResizeCrop, group, place
from .folder import TrainingImage
from .images import MAX_PIXELS, open_alpha, open_mask, open_picture, parse_colour

_VERSION = "peft_diffusion latents 1"

Key = tuple[int, bool, int | None]
"""What is encoded: a picture, whether it is flipped, and the mask that hides a part of it, if any."""

Origin: TypeAlias = Literal["vae", "cache", "damaged"]
"""Where a latent comes from: computed, found in the cache folder, or computed as what was found there is damaged."""


@dataclass(frozen=True)
class Latent:
    """The VAE's posterior for one picture: `mean` and `std`, (channels, height / 8, width / 8), on the CPU.

    The values are the VAE's own: its scaling (and shift) factor is not in them and is applied where they are used.
    For a base that paints parts anew, ``masks`` are (masks, 1, height / 8, width / 8), and ``hidden``, (masks, channels,
    height / 8, width / 8), the means of the picture without what each of them hides.
    ``where``, (1, height / 8, width / 8) from 0 to 1, is what of the picture is learned; None for all of it.
    """

    picture: int
    flipped: bool
    fit: ResizeCrop
    mean: Tensor
    std: Tensor
    masks: Tensor | None = None
    hidden: Tensor | None = None
    where: Tensor | None = None

    @property
    def sizes(self) -> tuple[int, int, int, int, int, int]:
        """What SDXL is told of a picture: height and width as it was, top and left of the crop, height and width now."""
        fit = self.fit
        left = fit.resized[0] - fit.crop[2] if self.flipped else fit.crop[0]
        return fit.original[1], fit.original[0], fit.crop[1], left, fit.bucket.height, fit.bucket.width


@dataclass(frozen=True)
class LatentCache:
    """One entry per picture in the pictures' order, then one per flipped picture if flips were asked for."""

    entries: tuple[Latent, ...]
    computed: int
    reused: int
    damaged: int
    """Files of the cache folder that were there but could not be trusted; computed again and replaced."""

    @property
    def fits(self) -> tuple[ResizeCrop, ...]:
        """How each image was brought to its size, in their order."""
        return tuple(entry.fit for entry in self.entries)

    @property
    def groups(self) -> dict[Bucket, tuple[int, ...]]:
        """Indices of the entries in each bucket, as `buckets.batches` takes them."""
        return group(self.fits)

    def stack(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Stack entries of one bucket.

        Args:
            indices: The entries.

        Returns:
            Means and standard deviations, (batch, channels, height, width) each.
        """
        chosen = [self.entries[index] for index in indices]
        return torch.stack([entry.mean for entry in chosen]), torch.stack([entry.std for entry in chosen])


def fingerprint(vae: nn.Module) -> str:
    """Digest the weights of a VAE and the settings that change what it computes.

    Args:
        vae: The module.

    Returns:
        SHA-256, in hex.
    """
    config = getattr(vae, "config", None) or {}
    settings = {str(key): value for key, value in dict(config).items() if not str(key).startswith("_")}
    if getattr(vae, "use_tiling", False):
        settings["use_tiling"] = True  # the seams of tiles show in what they cover
    state = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in sorted(vae.state_dict().items()):
        state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        state.update(checksums.bytes_of(tensor))
    return state.hexdigest()


def latent_key(digest: str, vae: str, fit: ResizeCrop, flipped: bool, background: str, mask: int | None = None) -> str:
    """Name an image's latent by all that it depends on.

    Args:
        digest: The image's SHA-256.
        vae: The `fingerprint` of the VAE.
        fit: How it is resized and cropped.
        flipped: Whether it is mirrored.
        background: The colour behind transparency.
        mask: The number of the inpainting mask that hides a part of it.

    Returns:
        SHA-256, in hex.
    """
    parts = [_VERSION, digest, vae, *fit.original, *fit.resized, *fit.crop, flipped, parse_colour(background)]
    parts += [] if mask is None else [mask]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def cache_latents(
    pictures: Sequence[TrainingImage],
    fits: Sequence[ResizeCrop],
    vae: nn.Module,
    *,
    background: str = "white",
    flip: bool | Sequence[bool] = False,
    masked: bool = False,
    alpha: bool | Sequence[bool] = False,
    folder: Path | None = None,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 4,
    max_pixels: int = MAX_PIXELS,
    on_progress: Callable[[int, int], None] | None = None,
) -> LatentCache:
    """Encode each image, brought to its bucket, once.

    The result is held on the CPU and, with a folder, kept there as one float32 file an image, found again by `latent_key`.
    The VAE runs where it is, in batches whose make-up does not depend on what the cache holds; on the CPU in float32 and one
    by one, so that a cache gives the same bits whatever else was asked for when it was filled.

    Args:
        pictures: The images.
        fits: How each becomes its bucket.
        vae: The VAE.
        background: The colour behind transparency.
        flip: Add every image mirrored, or those for which it is true.
        masked: Add each one with parts hidden, by `inpainting_masks.mask`, for a base that is told such.
        alpha: Take the transparency of images without a mask for what is learned of them, or of those for which it is true.
        folder: Where latents are kept.
        dtype: That of the result.
        batch_size: Images encoded at once, but on a CPU.
        max_pixels: Larger images are refused.
        on_progress: Called with the entries done and their total.

    Returns:
        One entry an image, then one per mirrored image; those with a mask have it at the latents' size.

    Raises:
        UserError: An image changed, the folder cannot be written, the VAE overflows, or a mask leaves nothing of an image.
        ValueError: There are not as many fits as images.
    """
    if len(pictures) != len(fits):
        raise ValueError(f"{len(pictures)} pictures with {len(fits)} fits")
    mark = "" if folder is None else fingerprint(vae)
    job = _Job(pictures, fits, background, max_pixels, _of_each(alpha, pictures), folder, mark)
    whole = _mirrored(_of_each(flip, pictures))
    hiding = (None, *range(inpainting_masks.COUNT)) if masked else (None,)
    entries: list[Key] = [(*one, mask) for mask in hiding for one in whole]
    encoder = ready(vae)
    done: dict[Key, tuple[Tensor, Tensor]] = {}
    origins = Counter[Origin]()
    for chunk in _chunks(entries, fits, min(batch_size, 1) if next(encoder.parameters()).is_cpu else batch_size):
        for entry, (mean, std), origin in job.encoded(chunk, encoder):
            done[entry] = mean.to(dtype), std.to(dtype)
            origins[origin] += 1
            if on_progress is not None:
                on_progress(len(done), len(entries))
    latents, cached = tuple(job.latent(one, done, hiding[1:]) for one in whole), origins["cache"]
    return LatentCache(latents, len(entries) - cached, cached, origins["damaged"])


def _of_each(given: bool | Sequence[bool], pictures: Sequence[TrainingImage]) -> Sequence[bool]:
    """What is asked for of each picture, where one answer may stand for all."""
    return [given] * len(pictures) if isinstance(given, bool) else given


def _mirrored(flips: Sequence[bool]) -> list[tuple[int, bool]]:
    """The numbers of all pictures as they are, then of those that are wanted mirrored too."""
    return [(index, False) for index in range(len(flips))] + [(index, True) for index, flip in enumerate(flips) if flip]


class _Damaged:
    """A cache file that is there but is not what was written."""


@dataclass(frozen=True)
class _Job:
    pictures: Sequence[TrainingImage]
    fits: Sequence[ResizeCrop]
    background: str
    max_pixels: int
    alpha: Sequence[bool]
    folder: Path | None
    vae: str

    def encoded(self, chunk: Sequence[Key], vae: nn.Module) -> Iterator[tuple[Key, tuple[Tensor, Tensor], Origin]]:
        """Mean and deviation of each entry of a batch, which is encoded whole where one of them is not in the folder.

        Raises UserError where the VAE overflows or the folder cannot be written.
        """
        stored = {entry: self.read(entry) for entry in chunk}
        missing = any(not isinstance(pair, tuple) for pair in stored.values())
        fresh = dict(zip(chunk, _encode(vae, self.pixels(chunk)), strict=True)) if missing else {}
        for entry, found in stored.items():
            pair = found if isinstance(found, tuple) else fresh[entry]
            _check_finite(pair, self.pictures[entry[0]], vae)
            if not isinstance(found, tuple):
                self.write(entry, pair)
            yield entry, pair, "cache" if isinstance(found, tuple) else "damaged" if found is not None else "vae"

    def latent(self, one: tuple[int, bool], done: Mapping[Key, tuple[Tensor, Tensor]], hiding: Sequence[int]) -> Latent:
        """A picture's latent, with those of what the masks leave of it."""
        mean, std = done[*one, None]
        plain = Latent(*one, self.fits[one[0]], mean, std, where=self._where(one, (mean.shape[-2], mean.shape[-1])))
        if not hiding:
            return plain
        hidden = torch.stack([done[*one, number][0] for number in hiding])
        # As diffusers' inpainting pipelines bring a mask to the latents' size.
        masks = [F.interpolate(self._mask(*one, number)[None], mean.shape[-2:])[0] for number in hiding]
        return replace(plain, masks=torch.stack(masks), hidden=hidden)

    def _where(self, one: tuple[int, bool], size: tuple[int, int]) -> Tensor | None:
        """What of a picture is learned, (1, height, width) of this size: resized, cropped and flipped as the picture is.

        Raises UserError where nothing is.
        """
        index, flipped = one
        picture = self.pictures[index]
        if picture.mask is not None:
            image: Image.Image | None = open_mask(picture.mask, self.max_pixels, picture.mask_digest)
        else:
            image = open_alpha(picture.path, self.max_pixels, picture.digest) if self.alpha[index] else None
        if image is None:
            return None
        # Bilinear: Lanczos overshoots, which would learn a little of what is outside.
        placed = place(image, self.fits[index], flipped, Image.Resampling.BILINEAR)
        where = F.adaptive_avg_pool2d(torch.from_numpy(np.array(placed))[None].float() / 255, size)
        if not bool(where.any()):
            bucket = self.fits[index].bucket
            what, fix = (
                (f"its mask {picture.mask} is black there", "make white what shall be learned, nearer to the middle")
                if picture.mask is not None
                else ("it is all transparent there", "take it out of the folder, or take --masks files or off")
            )
            raise UserError(
                f"{picture.path}: nothing of it would be learned: cropped to {bucket.width}x{bucket.height}, {what}; {fix}"
            )
        return where

    def _mask(self, index: int, flipped: bool, number: int) -> Tensor:
        bucket = self.fits[index].bucket
        found = inpainting_masks.mask(self.pictures[index].digest, number, bucket.width, bucket.height)
        return found.flip(-1) if flipped else found

    def pixels(self, entries: Sequence[Key]) -> Tensor:
        """The pictures of a batch, (batch, 3, height, width), from -1 to 1."""
        if len(entries) == 1:  # as on a CPU, each time
            return self._one(entries[0])[None]
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            return torch.stack(list(pool.map(self._one, entries)))

    def _one(self, entry: Key) -> Tensor:
        index, flipped, mask = entry
        picture = self.pictures[index]
        image = open_picture(picture.path, self.background, self.max_pixels, picture.digest)
        pixels = torch.from_numpy(np.array(place(image, self.fits[index], flipped)))
        pixels = pixels.permute(2, 0, 1).float() / 127.5 - 1
        return pixels if mask is None else pixels * (1 - self._mask(index, flipped, mask))

    def _key(self, entry: Key) -> str:
        index, flipped, mask = entry
        return latent_key(self.pictures[index].digest, self.vae, self.fits[index], flipped, self.background, mask)

    def read(self, entry: Key) -> tuple[Tensor, Tensor] | _Damaged | None:
        """Mean and deviation from the cache folder, if a sound file is there."""
        if self.folder is None:
            return None
        key = self._key(entry)
        path = self.folder / f"{key}.safetensors"
        if not path.is_file():
            return None
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                mean, std = file.get_tensor("mean"), file.get_tensor("std")
        except Exception:  # damage has no list of what it raises
            return _Damaged()
        sound = metadata.get("key") == key and metadata.get("sha256") == checksums.of_tensors(mean, std)
        return (mean, std) if sound else _Damaged()

    def write(self, entry: Key, pair: tuple[Tensor, Tensor]) -> None:
        """Keep a latent: written aside, then renamed, so that a run cut short leaves no half a file."""
        if self.folder is None:
            return
        key, (mean, std) = self._key(entry), pair
        aside = self.folder / f".{key}.{os.getpid()}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file({"mean": mean, "std": std}, aside, {"key": key, "sha256": checksums.of_tensors(mean, std)})
            aside.replace(self.folder / f"{key}.safetensors")
        except (OSError, SafetensorError) as error:
            with contextlib.suppress(OSError):
                aside.unlink()
            raise UserError(
                f"cannot write the latent cache {self.folder} ({error}): choose another folder or none"
            ) from error


def _chunks(entries: Sequence[Key], fits: Sequence[ResizeCrop], batch_size: int) -> Iterator[list[Key]]:
    if batch_size < 1:
        raise UserError(f"the batch size of the VAE must be 1 or more, not {batch_size}")
    for numbers in group([fits[index] for index, _, _ in entries]).values():
        for start in range(0, len(numbers), batch_size):
            yield [entries[number] for number in numbers[start : start + batch_size]]


def ready(vae: nn.Module) -> nn.Module:
    """Choose the VAE to run: a float32 copy of one in float16, where some overflow, and on a CPU of any half precision.

    Args:
        vae: The VAE.

    Returns:
        It, or the copy.
    """
    weight = next(vae.parameters())
    if weight.dtype == torch.float16 or (weight.device.type == "cpu" and weight.dtype != torch.float32):
        return copy.deepcopy(vae).float()
    return vae


@torch.no_grad()
def _encode(vae: nn.Module, pixels: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Mean and standard deviation per picture, float32 on the CPU."""
    weight = next(vae.parameters())
    posterior = cast(Any, vae).encode(pixels.to(weight.device, weight.dtype)).latent_dist
    # The VAE may answer channels last; files hold contiguous tensors only.
    means, stds = (part.float().cpu().contiguous() for part in (posterior.mean, posterior.std))
    return [(mean.clone(), std.clone()) for mean, std in zip(means, stds, strict=True)]


def _check_finite(pair: tuple[Tensor, Tensor], picture: TrainingImage, vae: nn.Module) -> None:
    if not all(bool(part.isfinite().all()) for part in pair):
        dtype = str(next(vae.parameters()).dtype).removeprefix("torch.")
        raise UserError(f"the VAE overflows in {dtype} on {picture.path}: load it in float32 or bfloat16")


class TextCache(Mapping[str, tuple[Tensor, ...]]):
    """Embeddings by prompt, each tensor as the encoders gave it without its batch dimension, on the CPU."""

    def __init__(self, rows: Mapping[str, tuple[Tensor, ...]]) -> None:
        self._rows = dict(rows)

    def __getitem__(self, prompt: str) -> tuple[Tensor, ...]:
        return self._rows[prompt]

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def stack(self, prompts: Sequence[str]) -> tuple[Tensor, ...]:
        """Stack the tensors of prompts.

        Args:
            prompts: Prompts that were encoded.

        Returns:
            (batch, ...) each; hidden states of prompts of several lengths are repeated to one: see `bases.prompts.alike`.

        Raises:
            KeyError: A prompt was not encoded.
        """
        columns = zip(*(self._rows[prompt] for prompt in prompts), strict=True)
        return tuple(_stacked(column) for column in columns)


def _stacked(column: Sequence[Tensor]) -> Tensor:
    if len({one.shape for one in column}) == 1:
        return torch.stack(tuple(column))
    return torch.cat(alike([one[None] for one in column]))


@torch.no_grad()
def cache_text(
    prompts: Iterable[str],
    encode: Callable[[list[str]], tuple[Tensor, ...]],
    batch_size: int = 16,
    on_progress: Callable[[int, int], None] | None = None,
) -> TextCache:
    """Encode each distinct prompt once.

    Args:
        prompts: In any order, repeated or not.
        encode: Gives tensors with one row a prompt, (prompts, ...) each.
        batch_size: Prompts encoded at once.
        on_progress: Called with the number of prompts encoded so far and their total.

    Returns:
        The rows by prompt.

    Raises:
        ValueError: The encoder gave another number of rows.
    """
    distinct = list(dict.fromkeys(prompts))
    rows: dict[str, tuple[Tensor, ...]] = {}
    for start in range(0, len(distinct), batch_size):
        batch = distinct[start : start + batch_size]
        encoded = [tensor.detach().cpu() for tensor in encode(batch)]
        for tensor in encoded:
            if len(tensor) != len(batch):
                raise ValueError(f"the text encoder gave {len(tensor)} rows for {len(batch)} prompts")
        rows.update((prompt, tuple(tensor[row].clone() for tensor in encoded)) for row, prompt in enumerate(batch))
        if on_progress is not None:
            on_progress(len(rows), len(distinct))
    return TextCache(rows)
