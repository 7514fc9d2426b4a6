"""A pair at an embedding, whose weight has a row for each token."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...core.adapter import Site, float32_parameter
from ...core.errors import UserError
from ..shared.affine import WeightChange, read_alpha, single
from ..shared.hyper_parameters import ALPHA
from ..shared.sites import looked_up, weight_shape
from . import BASE, DOWN, MID, SINGULAR, SPARSE, UP, UP_BIAS


def read(site: Site, tensors: Mapping[str, Tensor]) -> "EmbeddingLora":
    """Read a pair at an embedding.

    ComfyUI's extraction has the change of the weight (rows, width) as ``up @ down``, peft has that of its transpose. Which
    one it is, the shapes tell.

    Args:
        site: The embedding.
        tensors: Those of the site, by suffix.

    Returns:
        The adapter.

    Raises:
        DamagedError: A half is missing.
        UserError: The pair does not fit the site, or stands beside what a pair at an embedding cannot have.
    """
    more = sorted(tensors.keys() & {MID, SINGULAR, UP_BIAS, *SPARSE})
    if more:
        raise UserError(f"{', '.join(more)} cannot stand at an embedding")
    (rows, width), down, up = weight_shape(site), tensors[DOWN], tensors[UP]
    if rows == width:
        raise UserError(f"an embedding of {rows} rows and as many columns does not tell which side of its pair is which")
    if down.shape[1:] == (rows,):
        down, up = up.t(), down.t()
    if down.shape[1:] != (width,) or up.shape != (rows, len(down)):
        shown = f"down {tuple(tensors[DOWN].shape)} and up {tuple(tensors[UP].shape)}"
        raise UserError(f"{shown} do not fit an embedding of {(rows, width)}")
    return EmbeddingLora(down, up, read_alpha(tensors, len(down)), 0.0)


class EmbeddingLora(WeightChange):
    """``down`` (rank, width), ``up`` (rows, rank): the row of a token changes by ``scale * up[token] @ down``.

    ``dropout`` drops the inputs of ``down`` while training, as at other sites.
    """

    def __init__(self, down: Tensor, up: Tensor, alpha: float, dropout: float, b_rate_ratio: float = 1.0) -> None:
        super().__init__()
        self.down = float32_parameter(down)
        self.up = float32_parameter(up)
        self.alpha = single(alpha)
        self.scale = self.alpha / len(down)
        self.dropout = dropout
        self.b_rate_ratio = b_rate_ratio

    def residual(self, x: Tensor, y: Tensor, base: Tensor) -> Tensor:
        """The change of the rows that were looked up."""
        hidden = F.dropout(looked_up(self.site, x, self.up), self.dropout, self.training)
        return (hidden @ (self.down * self.scale)).to(y.dtype)

    def change(self) -> Tensor:
        """``scale * up @ down``."""
        return self.up @ (self.down * self.scale)

    def by_rate(self) -> dict[float, list[nn.Parameter]]:
        """``up`` apart where LoRA+ trains it faster."""
        return super().by_rate() if self.b_rate_ratio == 1 else {1.0: [self.down], self.b_rate_ratio: [self.up]}

    def state(self) -> dict[str, Tensor]:
        """The kohya layout."""
        return {DOWN: self.down, UP: self.up, ALPHA: torch.tensor(self.alpha)}


def refuse_other_base(site: Site, weight: Tensor) -> None:
    """See that a weight that peft saved beside a pair is that of the site: it does so at embeddings, whatever they hold.

    Args:
        site: The layer. One that is quantized or has no weights, as that of a skeleton, is not compared.
        weight: What the file says is its weight.

    Raises:
        UserError: It is another one.
    """
    own = getattr(site, "weight", None)
    if not isinstance(own, nn.Parameter) or own.is_meta or not own.is_floating_point():
        return
    if own.shape != weight.shape or not torch.allclose(own.float(), weight.to(own.device).float(), rtol=0.01, atol=0.01):
        raise UserError(
            f"{BASE} {tuple(weight.shape)} is another weight than this {type(site).__name__}'s {tuple(own.shape)}, which the"
            " file was trained to change too; take the base that it was made for"
        )
