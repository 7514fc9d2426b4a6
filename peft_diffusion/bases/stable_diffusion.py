"""Stable Diffusion pipelines as bases."""

from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from ..core import quantized, site
from ..core.errors import UserError, first_line
from ..core.files import at_home, if_address
from ..core.parsing import refusing
from . import single_file
from .asked import PREDICTIONS, AskedPrediction
from .base import components, denoiser_of
from .denoiser import kinds
from .digest import quantize as quantize_all
from .embedded import ICONS, embedded
from .loading import is_hub_id, named_source, pick_device, pick_dtype, quiet, refuse_beyond
from .pipelines import Pipeline


def load_base(
    source: "str | Path | DiffusionPipeline" = ICONS,
    *,
    device: str = "auto",
    dtype: str = "auto",
    quantize: str | None = None,
    download: bool = True,
    prediction: AskedPrediction = "auto",
) -> DiffusionPipeline:
    """Load a pipeline that denoises, frozen, in eval mode.

    Args:
        source: ``"icons"`` (embedded), a diffusers folder, a single-file checkpoint, a hub id, or a pipeline, which is only
            checked and stays as it is.
        device: ``auto`` takes an accelerator if there is one.
        dtype: float32, bfloat16, float16, or ``auto``: bfloat16 on CUDA that has it, float16 on other accelerators, float32
            on a CPU.
        quantize: nf4 (4.5 bits a weight, needs bitsandbytes) or int8 for the Linear layers of network and text encoders; the
            rest, and what they compute, has the dtype.
        download: Whether a base of the hub may be fetched; otherwise it is read as it lies in the cache.
        prediction: What the network predicts, for a base that does not say so, or says it wrongly; ``auto`` believes it.

    Returns:
        The pipeline, on its device.

    Raises:
        UserError: There is no such base, it cannot be read or quantized, or it is no kind that is known.
    """
    if isinstance(source, DiffusionPipeline):
        own = denoiser_of(_as_asked(source, quantize)).prediction  # which refuses what it does not know
        if prediction != "auto" and PREDICTIONS[prediction] != own:
            raise UserError(
                f"this pipeline is loaded already, and its scheduler says that it predicts {own}; load it with"
                f" load_base(..., prediction={prediction!r})"
            )
        return source
    name = named_source(source, "a pipeline of diffusers")
    if quantize is not None:
        quantized.check(quantize)  # before gigabytes are read
    where = pick_device(device)
    chosen = pick_dtype(dtype, where)
    unusable = refusing(f"base {name!r} has a configuration that cannot be used")
    with quiet(diffusers_logging, transformers_logging), unusable:
        pipe: DiffusionPipeline = _frozen(_read(name, chosen, download))
        if prediction != "auto" and denoiser_of(pipe).prediction != PREDICTIONS[prediction]:
            config = {**pipe.scheduler.config, "prediction_type": PREDICTIONS[prediction]}
            pipe.register_modules(scheduler=type(pipe.scheduler).from_config(config))
    if quantize is not None:
        quantize_all(components(pipe), quantize, where)
    return pipe.to(where)


def _read(source: str, dtype: torch.dtype, download: bool) -> DiffusionPipeline:
    path = embedded("base") if source == ICONS else at_home(Path(source))
    try:
        if path.is_file():
            return single_file.read(path, dtype)
        if path.is_dir():
            if not (path / "model_index.json").is_file():
                raise UserError(f"{path} is no diffusers folder: it holds no model_index.json")
            refuse_beyond(path)
            return _pipeline_class(str(path), local_files_only=True).from_pretrained(
                str(path), dtype=dtype, local_files_only=True
            )
        if is_hub_id(source) and not path.parent.is_dir():
            local = not download
            return _pipeline_class(source, local_files_only=local).from_pretrained(
                source, dtype=dtype, local_files_only=local
            )
    except UserError:
        raise
    except Exception as error:
        # Whatever a damaged folder makes the libraries raise, the person needs to know which base it was.
        raise UserError(f"base {source!r} cannot be read: {first_line(error)}") from error
    known = f"neither {ICONS!r}, nor a folder, a file or a hub id (owner/name)"
    raise UserError(f"there is no base {source!r}: {known}{if_address(source)}")


def _pipeline_class(source: str, **options: Any) -> Any:
    """The class that reads a pipeline: that of a family that brings its own, else diffusers' choice.

    Raises UserError for a class that neither has.
    """
    own = {kind.pipeline_class.__name__: kind.pipeline_class for kind in kinds() if kind.pipeline_class is not None}
    name = DiffusionPipeline.load_config(source, **options).get("_class_name")
    if not isinstance(name, str):  # of a pipeline that brings its code
        return DiffusionPipeline
    if name not in own and not hasattr(diffusers, name):
        raise UserError(
            f"{source} is a {name}, which diffusers does not know; a family of bases of others comes in with --plugin"
            " MODULE, or in Python with peft_diffusion.load_plugin"
        )
    return own.get(name, DiffusionPipeline)


def _as_asked(pipe: Pipeline, quantize: str | None) -> Pipeline:
    if quantize is not None and any(quantized.kind_of(part) != quantize for part in components(pipe).values()):
        raise UserError(f"this pipeline is loaded already, and not as {quantize}; load it with load_base(..., quantize=...)")
    return pipe


def _frozen(pipe: Pipeline) -> Pipeline:
    denoiser = denoiser_of(pipe)
    for needed in ("family", "resolution", "step"):  # what a configuration does not tell is told now, not after training
        getattr(denoiser, needed)
    for name, part in {**components(pipe), "vae": denoiser.vae}.items():
        missing = next((path for path, own in part.named_parameters() if own.is_meta), None)
        if missing is not None:
            raise UserError(
                f"the base's {name} is to have {missing}, by its config.json, and its weights hold none; mend one"
            )
        site.freeze(part)
    return pipe
