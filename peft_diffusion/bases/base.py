"""What can be asked of a base of any kind: a pipeline that denoises, or a causal language model."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, overload

import torch
from torch import nn

from ..core import site
from ..core.errors import UserError
from ..core.files import weights_sha256
from . import family as families
from .denoiser import Denoiser, kinds
from .digest import fingerprint
from .embedded import ICONS, embedded
from .pipelines import Pipeline, uncompiled

if TYPE_CHECKING:
    from .causal_lm import LanguageInfo, LanguageModel

Base: TypeAlias = "Pipeline | LanguageModel"
"""What adapters can be attached to."""


@dataclass(frozen=True)
class BaseInfo:
    """What an adapter must know of its base.

    Attributes:
        name: What it is called.
        family: The name of its family.
        prediction_type: What it predicts.
        resolution: Pixels a side of the square image that it was made for.
        step: Pixels that sides are multiples of.
        fingerprint: Which weights these are: see `bases.fingerprint`.
    """

    name: str
    family: str
    prediction_type: str
    resolution: int
    step: int
    fingerprint: str


class Skeleton:
    """A base without its weights: components on torch's meta device, whose names, classes and shapes are the true ones.

    Adapters of a file are built for one as for a base, with tensors of their own, wherever no weight of the base is asked
    for. `bases.skeleton` makes them. Its components and tokenizers are attributes, as a pipeline's are.

    Attributes:
        info: What an adapter must know of the base; the fingerprint is "".
        parts: The components by name.
    """

    def __init__(
        self,
        info: "BaseInfo | LanguageInfo",
        parts: Mapping[str, nn.Module],
        tokenizers: Mapping[str, Callable[[], Any]],
    ) -> None:
        """Take what is known of a base.

        Args:
            info: What an adapter must know of it.
            parts: The components by name.
            tokenizers: What makes the tokenizers, by the attribute of the pipeline that holds each.
        """
        self.info = info
        self.parts = dict(parts)
        self._tokenizers = dict(tokenizers)

    def __getattr__(self, name: str) -> Any:
        """A component, or a tokenizer, which is made when it is first asked for."""
        parts = self.__dict__.get("parts", {})
        if name in parts:
            return parts[name]
        make = self.__dict__.get("_tokenizers", {}).get(name)
        if make is None:
            raise AttributeError(name)
        self.__dict__[name] = made = make()
        return made


AnyBase: TypeAlias = "Base | Skeleton"
"""What adapters of a file can be built for."""


def denoiser_of(pipe: Pipeline) -> Denoiser:
    """Reach the network of a pipeline that denoises.

    Args:
        pipe: A pipeline of diffusers.

    Returns:
        Its denoiser.

    Raises:
        UserError: No family has a kind of network that knows it.
    """
    for kind in kinds():
        if kind.recognizes(pipe):
            return kind(pipe)
    raise UserError(
        f"{type(pipe).__name__} is no Stable Diffusion with a UNet: it has no unet, nor a network that denoises of another"
        " family of bases that is known here"
    )


def components(base: object) -> dict[str, nn.Module]:
    """List the parts of a base that can carry adapters.

    Args:
        base: A pipeline, or a `LanguageModel`.

    Returns:
        The modules by name, of the components of all families those that the base has; of one that ``torch.compile``
        wrapped, the module inside.
    """
    parts = {name: getattr(base, name, None) for name in families.components()}
    return {name: uncompiled(part) for name, part in parts.items() if isinstance(part, nn.Module)}


def network_of(base: object) -> tuple[str, nn.Module] | None:
    """Find the network of a base that denoises.

    Args:
        base: A pipeline, or a `LanguageModel`.

    Returns:
        Its name among the components and itself; None in a language model.
    """
    roles = families.components("denoiser")
    return next(((name, part) for name, part in components(base).items() if name in roles), None)


@contextmanager
def frozen(lent: "Base | None") -> Iterator[None]:
    """Freeze a base that is the caller's inside, and give it back with the modes and wishes for gradients that it had.

    Args:
        lent: A pipeline, or a `LanguageModel`; None where the base is our own, which is frozen when it is loaded.

    Yields:
        Once.

    Raises:
        UserError: It is a pipeline whose network is not known.
    """
    parts = list(components(lent).values())
    if lent is not None and network_of(lent) is not None:
        pipe: Any = lent
        parts.append(denoiser_of(pipe).vae)
    with site.frozen(parts):
        yield


def text_encoders(base: object) -> dict[str, str]:
    """List the components of a base that read words.

    Args:
        base: A pipeline, or a `LanguageModel`.

    Returns:
        The attribute that holds the tokenizer, by component.
    """
    rows = families.components()
    return {name: tokenizer for name in components(base) if (tokenizer := rows[name].tokenizer) is not None}


def dtype_of(base: Pipeline) -> torch.dtype:
    """Tell in which dtype a pipeline's network computes.

    Args:
        base: A pipeline.

    Returns:
        That of its first parameter.
    """
    return next(denoiser_of(base).network.parameters()).dtype


@overload
def describe(base: "LanguageModel") -> "LanguageInfo": ...
@overload
def describe(base: Pipeline) -> "BaseInfo": ...
@overload
def describe(base: AnyBase) -> "BaseInfo | LanguageInfo": ...
def describe(base: AnyBase) -> "BaseInfo | LanguageInfo":
    """Tell what an adapter must know of a base.

    Args:
        base: A pipeline, a `LanguageModel`, or the `Skeleton` of one.

    Returns:
        Its name, family and fingerprint among it.
    """
    from .causal_lm import LanguageModel  # which brings transformers

    if isinstance(base, Skeleton):
        return base.info
    if isinstance(base, LanguageModel):
        return base.describe()
    denoiser = denoiser_of(base)
    return BaseInfo(
        name=_name(base),
        family=denoiser.family.name,
        prediction_type=denoiser.prediction,
        resolution=denoiser.resolution,
        step=denoiser.step,
        fingerprint=fingerprint(components(base)),
    )


def checkpoint_sha256(pipe: Pipeline) -> str:
    """Digest the file that a pipeline was read from, by whose first ten digits A1111 knows a base.

    Args:
        pipe: The pipeline.

    Returns:
        The SHA-256 of the whole file, as hex digits; "" of what was read from a folder, the hub or none.
    """
    path = Path(str(pipe.config.get("_name_or_path") or ""))
    return weights_sha256(path) if path.is_file() else ""


def _name(pipe: Pipeline) -> str:
    where = str(pipe.config.get("_name_or_path") or "")
    try:
        if where == str(embedded("base")):
            return ICONS
    except UserError:
        pass  # a package without the embedded base still names others
    path = Path(where)
    return path.name if path.exists() and where else where or type(pipe).__name__
