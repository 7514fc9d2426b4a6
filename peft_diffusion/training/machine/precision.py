"""The precision that a base computes in while it is trained."""

import torch

from ..settings.choices import Precision


def pick_precision(asked: Precision, device: torch.device) -> Precision:
    """Choose the precision of the base in training.

    Args:
        asked: ``auto`` is bfloat16 on a GPU that has it, float16 on an older one, else float32.
        device: Where it trains.

    Returns:
        The precision.
    """
    if asked != "auto":
        return asked
    if device.type != "cuda":
        return "float32"
    return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
