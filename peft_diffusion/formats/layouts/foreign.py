"""Names of models that this package does not run, such as Flux.1 and Stable Diffusion 3, so that ``inspect`` tells of them.

They begin as OneTrainer's and diffusers' do for a transformer, and as kohya's for a third text encoder. A family of bases
that has such names itself, from a plug-in, reads them instead.
"""

import re
from collections.abc import Sequence
from functools import cache
from typing import ClassVar

from ..aliases import aliases
from ..container import Header
from ..layout import Place, Reading, ReadOnly, register
from ..names import Rows, dotted_starts, known_rows, prefixes

_TRANSFORMER = "transformer."
# What follows that in models of pictures: language models have it too.
_OF_TRANSFORMER = re.compile(
    r"transformer\.(?:(?:single_|joint_|double_|single_joint_)?transformer_blocks\.\d|layers\.\d+\.(?:attention|attn|feed_forward|adaLN)"
    r"|blocks\.\d+\.(?:attn[12]|self_attn|cross_attn|ffn)\.|(?:noise|context)_refiner|x_embedder|context_embedder"
    r"|time_text_embed|norm_out|proj_out|proj_in|img_in|txt_in)"
)
_FLAT = {"lora_transformer_": "transformer", "lora_te3_": "text_encoder_3"}
_DOTTED = {
    "transformer.": "transformer",
    "text_encoder_3.": "text_encoder_3",
    "text_encoders.t5xxl.transformer.": "text_encoder_3",
}


class Foreign(ReadOnly):
    """Names of other models' components."""

    name: ClassVar[str] = "foreign"

    def claims(self, name: str) -> int | None:
        """Those that no family here has."""
        start = _start(name)
        return len(start) if start else None

    def read(self, header: Header, names: Sequence[str]) -> Reading:
        """By the names alone."""
        places: dict[str, Place] = {}
        for name in names:
            start, known = _start(name), aliases()
            parts = known.parts(name)
            where, _, end = name.partition(".") if start in _FLAT else name.rpartition(".")
            if parts is not None and start in _DOTTED:
                where, end = parts.where, parts.end
            told = known.meaning(end)
            component = {**_FLAT, **_DOTTED}[start]
            places[name] = Place(component, where.removeprefix(start), told.suffix, change=told.change, stem=where)
        return Reading(places)


def _start(name: str) -> str:
    """What a name begins with, of those that no family here has; "" where it is none."""
    starts = _starts(known_rows())
    if not name.startswith(starts):  # asked for the names of all layouts
        return ""
    start = next(start for start in starts if name.startswith(start))
    return start if start != _TRANSFORMER or _OF_TRANSFORMER.match(name) else ""


@cache
def _starts(known: Rows) -> tuple[str, ...]:
    """What names begin with here and in no family."""
    own = {**prefixes(), **dotted_starts()}
    return tuple(start for start in (*_FLAT, *_DOTTED) if start not in own)


register(Foreign())
