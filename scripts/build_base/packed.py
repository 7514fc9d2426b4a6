"""The packed drawings: one zip of lossless WebP files with a `meta.json`, read without any renderer."""

import dataclasses
import io
import json
import os
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor


@dataclass(frozen=True)
class Drawing:
    """One icon of one set: its style, its name in the set, what it shows in words, and words near that."""

    style: str
    name: str
    subject: str
    tags: tuple[str, ...] = ()
    role: str = "base"
    licence: str = ""

    def row(self, file: str) -> dict[str, Any]:
        """The drawing as a row of `meta.json`."""
        return {"file": file, **dataclasses.asdict(self)}


def _decode(file: bytes) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))


def _open(path: Path) -> zipfile.ZipFile:
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}: run `python -m scripts.build_base.render` first")
    return zipfile.ZipFile(path)


def _rows(archive: zipfile.ZipFile, styles: tuple[str, ...] | None) -> list[dict[str, Any]]:
    return [row for row in json.loads(archive.read("meta.json")) if styles is None or row["style"] in styles]


def _drawing(row: dict[str, Any]) -> Drawing:
    values = {name: value for name, value in row.items() if name != "file"}
    return Drawing(**{**values, "tags": tuple(row["tags"])})


def packed_rows(path: Path, styles: tuple[str, ...] | None = None) -> list[Drawing]:
    """The drawings of a packed file, all or those of some styles, without their pixels."""
    with _open(path) as archive:
        return [_drawing(row) for row in _rows(archive, styles)]


def load_packed(path: Path, styles: tuple[str, ...] | None = None, each: int | None = None) -> tuple[list[Drawing], Tensor]:
    """The drawings of a packed file, all or those of some styles, and their pixels as bytes (count, 3, 128, 128)."""
    with _open(path) as archive:
        rows = _rows(archive, styles)
        if each is not None:
            by_style = [[row for row in rows if row["style"] == style] for style in {row["style"]: 0 for row in rows}]
            rows = [row for group in by_style for row in group[:: max(1, len(group) // each)][:each]]
        files = [archive.read(row["file"]) for row in rows]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        pixels = torch.from_numpy(np.stack(list(pool.map(_decode, files))))
    return [_drawing(row) for row in rows], pixels.permute(0, 3, 1, 2).contiguous()
