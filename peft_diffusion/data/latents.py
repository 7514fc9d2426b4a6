"""The cache of latents and text embeddings: the VAE and frozen encoders run once, before the first step."""

import contextlib
import copy
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from peft_diffusion.core.errors import UserError

from .buckets import Bucket, Fit, group, place
from .folder import Picture
from .pictures import MAX_PIXELS, open_picture, parse_colour

_VERSION = "peft_diffusion latents 1"


@dataclass(frozen=True)
class Latent:
    """The VAE's posterior for one picture: `mean` and `std`, (channels, height / 8, width / 8), on the CPU.

    The values are the VAE's own: its scaling (and shift) factor is not in them and is applied where they are used.
    """

    picture: int
    flipped: bool
    fit: Fit
    mean: Tensor
    std: Tensor


@dataclass(frozen=True)
class LatentCache:
    """One entry per picture in the pictures' order, then one per flipped picture if flips were asked for."""

    entries: tuple[Latent, ...]
    computed: int
    reused: int
    damaged: int
    """Files of the cache folder that were there but could not be trusted; computed again and replaced."""

    @property
    def fits(self) -> tuple[Fit, ...]:
        return tuple(entry.fit for entry in self.entries)

    @property
    def groups(self) -> dict[Bucket, tuple[int, ...]]:
        """Indices of the entries in each bucket, as `buckets.batches` takes them."""
        return group(self.fits)

    def stack(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Means and standard deviations of entries of one bucket, (batch, channels, height, width) each."""
        chosen = [self.entries[index] for index in indices]
        return torch.stack([entry.mean for entry in chosen]), torch.stack([entry.std for entry in chosen])


def fingerprint(vae: nn.Module) -> str:
    """SHA-256, in hex, over the weights of a VAE and the settings that change what it computes."""
    config = getattr(vae, "config", None) or {}
    settings = {str(key): value for key, value in dict(config).items() if not str(key).startswith("_")}
    state = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in sorted(vae.state_dict().items()):
        state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        state.update(_bytes(tensor))
    return state.hexdigest()


def latent_key(digest: str, vae: str, fit: Fit, flipped: bool, background: str) -> str:
    """The name of a picture's latent: SHA-256, in hex, over all that it depends on; `vae` is a `fingerprint`."""
    parts = [_VERSION, digest, vae, *fit.original, *fit.resized, *fit.crop, flipped, parse_colour(background)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def cache_latents(
    pictures: Sequence[Picture],
    fits: Sequence[Fit],
    vae: nn.Module,
    *,
    background: str = "white",
    flip: bool = False,
    folder: Path | None = None,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 4,
    max_pixels: int = MAX_PIXELS,
    on_progress: Callable[[int, int], None] | None = None,
) -> LatentCache:
    """Encode each picture, brought to its bucket by its fit, once; `flip` adds every picture mirrored.

    The result is held on the CPU in `dtype` and, with a `folder`, kept there as one float32 file per picture that
    is found again by `latent_key`. The VAE runs where it is, on the CPU in float32, in batches whose make-up does not
    depend on what the cache holds, so that a half-full cache gives the same bits. `on_progress` is called with the
    entries done and their total. Raises `UserError` for pictures that changed, a folder that cannot be written, or a
    VAE that overflows.
    """
    if len(pictures) != len(fits):
        raise ValueError(f"{len(pictures)} pictures with {len(fits)} fits")
    job = _Job(pictures, fits, background, max_pixels, folder, fingerprint(vae) if folder is not None else "")
    entries = [(index, flipped) for flipped in ((False, True) if flip else (False,)) for index in range(len(pictures))]
    encoder = _ready(vae)
    done: dict[tuple[int, bool], tuple[Tensor, Tensor]] = {}
    computed = damaged = 0
    for chunk in _chunks(entries, fits, batch_size):
        cached = {entry: job.read(entry) for entry in chunk}
        damaged += sum(isinstance(pair, _Damaged) for pair in cached.values())
        fresh = [entry for entry in chunk if not isinstance(cached[entry], tuple)]
        encoded = dict(zip(chunk, _encode(encoder, job.pixels(chunk)), strict=True)) if fresh else {}
        for entry in chunk:
            stored = cached[entry]
            pair = stored if isinstance(stored, tuple) else encoded[entry]
            _check_finite(pair, pictures[entry[0]], vae)
            if not isinstance(stored, tuple):
                computed += 1
                job.write(entry, pair)
            done[entry] = pair[0].to(dtype), pair[1].to(dtype)
            if on_progress is not None:
                on_progress(len(done), len(entries))
    latents = tuple(Latent(index, flipped, fits[index], *done[index, flipped]) for index, flipped in entries)
    return LatentCache(latents, computed, len(latents) - computed, damaged)


class _Damaged:
    """A cache file that is there but is not what was written."""


@dataclass(frozen=True)
class _Job:
    pictures: Sequence[Picture]
    fits: Sequence[Fit]
    background: str
    max_pixels: int
    folder: Path | None
    vae: str

    def pixels(self, entries: Sequence[tuple[int, bool]]) -> Tensor:
        """The pictures of a batch, (batch, 3, height, width), from -1 to 1."""
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            return torch.stack(list(pool.map(self._one, entries)))

    def _one(self, entry: tuple[int, bool]) -> Tensor:
        index, flipped = entry
        picture = self.pictures[index]
        image = open_picture(picture.path, self.background, self.max_pixels, picture.digest)
        pixels = torch.from_numpy(np.array(place(image, self.fits[index], flipped)))
        return pixels.permute(2, 0, 1).float() / 127.5 - 1

    def _key(self, entry: tuple[int, bool]) -> str:
        index, flipped = entry
        return latent_key(self.pictures[index].digest, self.vae, self.fits[index], flipped, self.background)

    def read(self, entry: tuple[int, bool]) -> tuple[Tensor, Tensor] | _Damaged | None:
        """Mean and deviation from the cache folder, if a sound file is there."""
        if self.folder is None:
            return None
        key = self._key(entry)
        path = self.folder / f"{key}.safetensors"
        if not path.exists():
            return None
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                mean, std = file.get_tensor("mean"), file.get_tensor("std")
        except (SafetensorError, OSError, ValueError):
            return _Damaged()
        sound = metadata.get("key") == key and metadata.get("sha256") == _checksum(mean, std)
        return (mean, std) if sound else _Damaged()

    def write(self, entry: tuple[int, bool], pair: tuple[Tensor, Tensor]) -> None:
        """Keep a latent: written aside, then renamed, so that a run cut short leaves no half a file."""
        if self.folder is None:
            return
        key, (mean, std) = self._key(entry), pair
        aside = self.folder / f".{key}.{os.getpid()}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file({"mean": mean, "std": std}, aside, {"key": key, "sha256": _checksum(mean, std)})
            aside.replace(self.folder / f"{key}.safetensors")
        except (OSError, SafetensorError) as error:
            with contextlib.suppress(OSError):
                aside.unlink()
            raise UserError(
                f"cannot write the latent cache {self.folder} ({error}): choose another folder or none"
            ) from error


def _chunks(entries: Sequence[tuple[int, bool]], fits: Sequence[Fit], batch_size: int) -> Iterator[list[tuple[int, bool]]]:
    if batch_size < 1:
        raise UserError(f"the batch size of the VAE must be 1 or more, not {batch_size}")
    for numbers in group([fits[index] for index, _ in entries]).values():
        for start in range(0, len(numbers), batch_size):
            yield [entries[number] for number in numbers[start : start + batch_size]]


def _ready(vae: nn.Module) -> nn.Module:
    """The VAE to run: on the CPU a float32 copy of one in half precision, which is slow and coarse there."""
    weight = next(vae.parameters())
    if weight.device.type == "cpu" and weight.dtype != torch.float32:
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


def _check_finite(pair: tuple[Tensor, Tensor], picture: Picture, vae: nn.Module) -> None:
    if not all(bool(part.isfinite().all()) for part in pair):
        dtype = str(next(vae.parameters()).dtype).removeprefix("torch.")
        raise UserError(f"the VAE overflows in {dtype} on {picture.path}: load it in float32 or bfloat16")


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _checksum(*tensors: Tensor) -> str:
    state = hashlib.sha256()
    for tensor in tensors:
        state.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        state.update(_bytes(tensor))
    return state.hexdigest()


class TextCache(Mapping[str, Tensor]):
    """Embeddings by prompt, each as the encoder gave it without its batch dimension, on the CPU."""

    def __init__(self, rows: Mapping[str, Tensor]) -> None:
        self._rows = dict(rows)

    def __getitem__(self, prompt: str) -> Tensor:
        return self._rows[prompt]

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def stack(self, prompts: Sequence[str]) -> Tensor:
        """The embeddings of a batch of prompts, (batch, ...). Raises `KeyError` for a prompt that was not encoded."""
        return torch.stack([self._rows[prompt] for prompt in prompts])


@torch.no_grad()
def cache_text(prompts: Iterable[str], encode: Callable[[list[str]], Tensor], batch_size: int = 16) -> TextCache:
    """Encode each distinct prompt once; `encode` gives one row per prompt, (prompts, ...)."""
    distinct = list(dict.fromkeys(prompts))
    rows: dict[str, Tensor] = {}
    for start in range(0, len(distinct), batch_size):
        batch = distinct[start : start + batch_size]
        encoded = encode(batch).detach().cpu()
        if len(encoded) != len(batch):
            raise ValueError(f"the text encoder gave {len(encoded)} rows for {len(batch)} prompts")
        rows.update((prompt, row.clone()) for prompt, row in zip(batch, encoded, strict=True))
    return TextCache(rows)
