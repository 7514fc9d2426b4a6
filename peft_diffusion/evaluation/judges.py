"""The judges there are: a row each, from which ``--judge``, its help and what loads them are made. Imports no torch.

To add one, write a class of `judge.Judge` and a row of ``_EVERY``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from ..core.wording import any_of

if TYPE_CHECKING:
    from .judge import Judge


def _icons(model: str, device: str) -> "Judge":
    from .icons import IconJudge  # which brings torch, as all that computes

    return IconJudge()


def _clip(model: str, device: str) -> "Judge":
    from .vision import clip_judge

    return clip_judge(model, device)


def _dino(model: str, device: str) -> "Judge":
    from .vision import dino_judge

    return dino_judge(model, device)


@dataclass(frozen=True)
class JudgeRow:
    """A judge that can be asked for.

    Attributes:
        name: What ``--judge`` calls it.
        words: What it is, for help.
        load: Makes it, of a model (a folder or hub id) and the device where that computes.
        model: The model where none is named, which is fetched from the hub; "" of a judge that comes with the package.
        against: The sample styles that pictures may be taken for where no others are named: those that it was trained on.
    """

    name: str
    words: str
    load: 'Callable[[str, str], "Judge"]'
    model: str = ""
    against: tuple[str, ...] = ()


_EVERY = (
    JudgeRow(
        "icons",
        "small networks for drawings that come with the package",
        _icons,
        against=("openmoji", "twemoji", "fluent-flat"),
    ),
    JudgeRow("clip", "CLIP, which also reads prompts", _clip, "openai/clip-vit-large-patch14"),
    JudgeRow("dino", "DINOv2", _dino, "facebook/dinov2-base"),
)

JUDGES: dict[str, JudgeRow] = {one.name: one for one in _EVERY}
"""By name, the default first."""

if TYPE_CHECKING:
    JudgeKind: TypeAlias = str
else:
    JudgeKind: TypeAlias = Literal[tuple(JUDGES)]


def explanation() -> str:
    """Tell what there is, as the help of ``--judge``.

    Returns:
        A sentence.
    """
    return f"Who judges: {any_of([f'{one.words} ({one.name})' for one in _EVERY])}."


def explanation_of_models() -> str:
    """Tell which models there are, as the help of ``--judge-model``.

    Returns:
        A sentence.
    """
    usual = " and ".join(f"{one.model} for --judge {one.name}" for one in _EVERY if one.model)
    return f"The folder or hub id of a judge that does not come with the package; by default {usual}."


def judge_of(kind: JudgeKind, model: str | None = None, device: str = "cpu") -> "Judge":
    """Load a judge.

    Args:
        kind: Which, of `JUDGES`.
        model: A folder or hub id, of a judge that takes one; None for its usual one, which is fetched from the hub.
        device: Where the model computes.

    Returns:
        The judge.

    Raises:
        UserError: There is no such model, or it is none of that kind.
    """
    row = JUDGES[kind]
    return row.load(row.model if model is None else model, device)
