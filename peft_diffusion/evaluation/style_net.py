"""A small network that tells the style of a drawing, trained on the real drawings of eleven icon sets.

``scripts/build_base/style_net.py`` trains it. It learned from drawings that were resized, moved, mirrored, softened and made
noisy, and from some that went through the embedded base's autoencoder, so that a picture's softness is no sign of a style.
"""

import zlib
from pathlib import Path

import torch
from torch import Tensor, nn

from . import stored

WEIGHTS = Path(__file__).with_name("style_net.safetensors.xz")
SIZE = 128  # pixels a side of what it sees
WIDTHS = (24, 48, 96, 144)
_HELD_OUT_EVERY = 8


class StyleNet(nn.Module):
    """Convolutions at four sizes; the mean and the maximum of each, over the picture, are what styles are told by.

    Args:
        styles: The names of the styles that it tells.
    """

    def __init__(self, styles: tuple[str, ...]) -> None:
        super().__init__()
        self.styles = styles
        layers, before = [], 3
        for width in WIDTHS:
            layers.append(
                nn.Sequential(
                    nn.Conv2d(before, width, 3, stride=2, padding=1, bias=False),
                    nn.BatchNorm2d(width),
                    nn.ReLU(),
                    nn.Conv2d(width, width, 3, padding=1, bias=False),
                    nn.BatchNorm2d(width),
                    nn.ReLU(),
                )
            )
            before = width
        self.layers = nn.ModuleList(layers)
        self.drop = nn.Dropout(0.2)
        self.told = nn.Linear(2 * sum(WIDTHS), len(styles))

    def features(self, images: Tensor) -> Tensor:
        """Compute what styles are told by.

        Args:
            images: (count, 3, 128, 128) in [0, 1].

        Returns:
            Means and maxima of the layers, (count, 624), 0 or more.
        """
        found, values = [], 1 - images
        for layer in self.layers:
            values = layer(values)
            found += [values.mean((2, 3)), values.amax((2, 3))]
        return torch.cat(found, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Scores (count, styles) of images (count, 3, 128, 128) in [0, 1]."""
        scores: Tensor = self.told(self.drop(self.features(images)))
        return scores


def held_out(subject: str) -> bool:
    """Tell whether the networks here have never seen a subject, in any style.

    Args:
        subject: Its words, such as "red apple".

    Returns:
        Whether they have not: an eighth of all, by the name's checksum.
    """
    return zlib.crc32(subject.encode()) % _HELD_OUT_EVERY == 0


def load_style_net(path: Path = WEIGHTS) -> StyleNet:
    """Load the trained network.

    Args:
        path: Its weights; by default those that travel with the package.

    Returns:
        The network, ready to tell.
    """
    tensors, metadata = stored.read(path)
    net = StyleNet(tuple(metadata["styles"].split()))
    net.load_state_dict(tensors, strict=False)
    return net.eval()
