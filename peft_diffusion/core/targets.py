"""Named sets of sites per architecture, as data."""

import re
from dataclasses import dataclass

from torch import nn

from .errors import UserError

DEFAULT = "attention+ff"

_UNET = {
    "attention": r".*\.attn[12]\.(to_q|to_k|to_v|to_out\.0)",
    "attention+ff": r".*\.(attn[12]\.(to_q|to_k|to_v|to_out\.0)|ff\.net\.(0\.proj|2))",
}
_CLIP = {
    "attention": r".*\.self_attn\.(q|k|v|out)_proj",
    "attention+ff": r".*\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])",
}

# What a target's name means in an architecture, by the class of the component.
PATTERNS: dict[str, dict[str, str]] = {
    "UNet2DConditionModel": _UNET,
    "CLIPTextModel": _CLIP,
    "CLIPTextModelWithProjection": _CLIP,
}

# The parts of an architecture that take a strength of their own.
BLOCKS: dict[str, str] = {
    "UNet2DConditionModel": r"(down_blocks\.\d+|mid_block|up_blocks\.\d+)\b.*",
    "CLIPTextModel": r"(?:text_model\.)?encoder\.(layers\.\d+)\b.*",
    "CLIPTextModelWithProjection": r"(?:text_model\.)?encoder\.(layers\.\d+)\b.*",
}
OTHER_BLOCK = "other"

# Targets that are kinds of modules, the same in every architecture.
KINDS: dict[str, tuple[type[nn.Module], ...]] = {
    "all-linear": (nn.Linear,),
    "conv": (nn.Conv2d,),
    "all": (nn.Linear, nn.Conv2d),
}


@dataclass(frozen=True)
class Blocks:
    """The blocks of a component: their names, and which one a path lies in."""

    names: tuple[str, ...]
    pattern: str

    def of(self, path: str) -> int:
        """The index of the block that holds the module at ``path``."""
        match = re.fullmatch(self.pattern, path)
        return self.names.index(match[1] if match else OTHER_BLOCK)


def architecture(component: nn.Module) -> str:
    """The name that the tables know a component by: that of its class."""
    return type(component).__name__


def modules(component: nn.Module) -> dict[str, nn.Module]:
    """Every module of the base by its path, without what adapters brought."""
    brought = re.compile(r"(^|\.)(adapters|strengths|packed)(\.|$)")
    return {path: module for path, module in component.named_modules() if not brought.search(path)}


def blocks(component: nn.Module) -> Blocks:
    """The blocks of a component, in the order of its modules; whatever lies in none is in ``other``."""
    pattern = BLOCKS.get(architecture(component), r"(?!)")
    found = (re.fullmatch(pattern, path) for path in modules(component))
    return Blocks((*dict.fromkeys(match[1] for match in found if match), OTHER_BLOCK), pattern)


def resolve(component: nn.Module, target: str) -> list[str]:
    """The paths of the modules that a target names, in the order of the component.

    A target is a name of ``PATTERNS`` or ``KINDS``, or a regular expression that a path matches in full.
    Raises UserError where it matches nothing or is no valid expression.
    """
    paths = modules(component)
    if target in KINDS:
        found = [path for path, module in paths.items() if isinstance(module, KINDS[target])]
    else:
        pattern = PATTERNS.get(architecture(component), {}).get(target, target)
        try:
            found = [path for path in paths if path and re.fullmatch(pattern, path)]
        except re.error as error:
            raise UserError(f"target {target!r} is neither a name nor a regular expression: {error}") from None
    if not found:
        raise UserError(f"no module of {architecture(component)} matches the target {target!r}; {_offer(component)}")
    return found


def _offer(component: nn.Module) -> str:
    """What there is to choose from, in a line."""
    names = [*PATTERNS.get(architecture(component), {}), *KINDS]
    examples = [path for path, module in modules(component).items() if isinstance(module, KINDS["all"])]
    shapes = dict.fromkeys(re.sub(r"\d+", "N", path) for path in examples)
    shown = ", ".join(list(shapes)[:12])
    return f"names: {', '.join(names)}; modules, N for a number: {shown}{', ...' if len(shapes) > 12 else ''}"
