"""The adapters that are compared: what each learns from, how it is trained, and which are on the base."""

import argparse
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft_diffusion.bases import embedded
from peft_diffusion.data.folder import scan
from peft_diffusion.generation import Adapters
from peft_diffusion.training import TrainConfig
from scripts.blends import judges
from scripts.blends.make_data import SAMPLES
from scripts.build_base.captions import with_article
from scripts.build_base.sources import icon_set

KEEP: Mapping[str, Any] = {"beside_keep": 1.0}
DROPOUT: Mapping[str, Any] = {"beside_dropout": 0.5}
BESIDE: Mapping[str, Any] = {**KEEP, **DROPOUT}
"""How an adapter is trained beside another one, as the guide has it."""


def drawings(data: Path, name: str) -> Path:
    """The drawings that an adapter is trained on."""
    kind = "subjects" if (data / "subjects" / name).exists() else "styles"
    own = data / kind / name / "train"
    return own if own.exists() else embedded(f"{kind}/{name}")


def prompts_of(folder: Path) -> list[str]:
    """The captions of a folder that is trained on, which call its adapter."""
    found = scan(folder)
    found.check()
    return [picture.caption for picture in found.pictures if picture.caption is not None]


def caption_held(data: Path, name: str, made: Path, count: int | None = None) -> None:
    """Write drawings of a style or character that nobody trained on, with captions that call its adapter; all by default."""
    kind = "subjects" if (data / "subjects" / name).exists() else "styles"
    given, rows = data / kind / name / "held", []
    made.mkdir(parents=True, exist_ok=True)
    for file, words in list(zip(sorted(given.glob("*.webp")), judges.captions(given), strict=True))[:count]:
        text = words if kind == "subjects" else icon_set(SAMPLES.get(name, name)).template.format(with_article(words))
        (made / file.name).write_bytes(file.read_bytes())
        rows.append(json.dumps({"file_name": file.name, "text": text}))
    (made / "metadata.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")


def config_of(what: str, file: Path, options: argparse.Namespace, given: Mapping[str, Any]) -> TrainConfig:
    """How an adapter is trained: by the package's defaults, but for what is given."""
    more = {**({"steps": options.train_steps} if options.train_steps else {}), **given}
    return TrainConfig(
        (drawings(options.data, what),),
        output=file,
        run_dir=options.output / "runs" / file.stem,
        device=options.device,
        preview_steps=0,
        overwrite=True,
        **more,
    )


@contextmanager
def emptied(adapters: Adapters) -> Iterator[None]:
    """Takes all adapters off the base in the end."""
    try:
        yield
    finally:
        for name in adapters.names:
            adapters.remove(name)
