"""The judges by their names: small networks that travel with the package for icons, CLIP or DINOv2 for other bases.

Imports no torch.
"""

from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    from .judge import Judge

JudgeKind: TypeAlias = Literal["icons", "clip", "dino"]


def judge_of(kind: JudgeKind, model: str | None = None, device: str = "cpu") -> "Judge":
    """Load a judge.

    Args:
        kind: Which.
        model: The folder or hub id of CLIP or DINOv2; None for a usual one, which is fetched from the hub.
        device: Where CLIP or DINOv2 computes.

    Returns:
        The judge.

    Raises:
        UserError: There is no such model, or it is none of that kind.
    """
    if kind == "icons":
        from .icons import IconJudge  # all of which bring torch

        return IconJudge()
    from . import vision

    return vision.clip_judge(model, device) if kind == "clip" else vision.dino_judge(model, device)
