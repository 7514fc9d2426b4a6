"""Loss scaling for gradients in float16, whose numbers below 6e-8 are 0."""

import torch
from torch import Tensor

_FIRST, _LEAST = 2.0**16, 2.0**-10
_GROWS_AFTER = 2000  # steps in a row that do not overflow


class LossScale:
    """What a loss is multiplied by before backward, as high as gradients allow (Micikevicius et al. 2018, section 3.2,
    https://arxiv.org/abs/1710.03740).

    With the numbers of `torch.amp.GradScaler`: it begins at 65536, is halved where gradients are not finite, when the step
    is left out, and doubled after 2000 steps that went well.

    Attributes:
        factor: The present scale, a scalar on the device; recorded steps read it there.
        kept: (scale, steps since it changed, steps left out), what a checkpoint keeps of it.
    """

    def __init__(self, device: torch.device) -> None:
        """Begin.

        Args:
            device: Where gradients are.
        """
        self.factor = torch.tensor(_FIRST, device=device)
        self.kept = torch.tensor([_FIRST, 0.0, 0.0], dtype=torch.float64)

    @property
    def scale(self) -> float:
        """The present scale."""
        return float(self.kept[0])

    @property
    def left_out(self) -> int:
        """Steps that were left out so far."""
        return int(self.kept[2])

    @property
    def hopeless(self) -> bool:
        """Whether gradients are not finite at scales at which nothing is left of others."""
        return self.scale < _LEAST

    def unscale(self, gradients: Tensor) -> bool:
        """Divide gradients by the scale, and choose the next one.

        Args:
            gradients: All of them, float32; changed in place.

        Returns:
            Whether they are finite; where not, the step is to be left out.
        """
        gradients.mul_(1 / self.scale)
        finite = bool(gradients.isfinite().all())
        if not finite:
            self.kept[0] /= 2
            self.kept[2] += 1
        self.kept[1] = self.kept[1] + 1 if finite else 0
        if self.kept[1] == _GROWS_AFTER:
            self.kept[0] *= 2
            self.kept[1] = 0
        self.factor.fill_(self.scale)
        return finite

    def go_on(self) -> None:
        """Take over the scale, after `kept` was filled."""
        self.factor.fill_(self.scale)
