"""Named sets of sites per architecture, as data."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from .errors import UserError
from .slot import slot_of

_UNET = {
    "attention": r".*\.attn[12]\.(to_q|to_k|to_v|to_out\.0)",
    "attention+ff": r".*\.(attn[12]\.(to_q|to_k|to_v|to_out\.0)|ff\.net\.(0\.proj|2))",
    "outputs": r".*\.(attn[12]\.to_out\.0|ff\.net\.2)",  # of the sublayers, where Houlsby's bottlenecks sit
    "ff-outputs": r".*\.ff\.net\.2",  # where Pfeiffer's do
    "conv-outputs": r".*\.resnets\.\d+\.conv2",
    "sublayers": r".*\.(attn[12]|ff)",  # as a whole, which parallel bottlenecks run beside
    "attentions": r".*\.attn[12]",  # as a whole, which prefixes extend
    "self-attentions": r".*\.attn1",
    "cross-attentions": r".*\.attn2",
}
_CLIP = {
    "attention": r".*\.self_attn\.(q|k|v|out)_proj",
    "attention+ff": r".*\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])",
    "outputs": r".*\.(self_attn\.out_proj|mlp\.fc2)",
    "ff-outputs": r".*\.mlp\.fc2",
    "sublayers": r".*\.mlp",  # its attention returns more than a tensor
    # Without those of the keys: they add the same to all scores of a query, which the softmax takes out again.
    "biases": r"(.*\.)?(self_attn\.(q|v|out)_proj|mlp\.fc[12]|layer_norm[12]|final_layer_norm)",
    "tokens": r"(.*\.)?token_embedding",
}
_LLAMA = {
    "attention": r".*\.self_attn\.[qkvo]_proj",
    "attention+ff": r".*\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)",
    "outputs": r".*\.(self_attn\.o_proj|mlp\.down_proj)",
    "ff-outputs": r".*\.mlp\.down_proj",
    "sublayers": r".*\.mlp",  # its attention returns more than a tensor
    "attentions": r".*\.self_attn",  # as a whole, which prefixes extend
    "tokens": r"(.*\.)?embed_tokens",
}
_GPT2 = {
    "attention": r".*\.attn\.(c_attn|c_proj)",
    "attention+ff": r".*\.(attn\.(c_attn|c_proj)|mlp\.(c_fc|c_proj))",
}
_GPT_NEOX = {
    "attention": r".*\.attention\.(query_key_value|dense)",
    "attention+ff": r".*\.(attention\.(query_key_value|dense)|mlp\.(dense_h_to_4h|dense_4h_to_h))",
}
_LIKE_LLAMA = ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2", "SmolLM3")

# What a target's name means in an architecture, by the class of the component.
PATTERNS: dict[str, dict[str, str]] = {
    "UNet2DConditionModel": _UNET,
    "CLIPTextModel": _CLIP,
    "CLIPTextModelWithProjection": _CLIP,
    **{f"{family}ForCausalLM": _LLAMA for family in _LIKE_LLAMA},
    "GPT2LMHeadModel": _GPT2,
    "GPTNeoXForCausalLM": _GPT_NEOX,
}

# The parts of an architecture that take a strength of their own.
BLOCKS: dict[str, str] = {
    "UNet2DConditionModel": r"(down_blocks\.\d+|mid_block|up_blocks\.\d+)\b.*",
    "CLIPTextModel": r"(?:text_model\.)?encoder\.(layers\.\d+)\b.*",
    "CLIPTextModelWithProjection": r"(?:text_model\.)?encoder\.(layers\.\d+)\b.*",
    **{f"{family}ForCausalLM": r"model\.(layers\.\d+)\b.*" for family in _LIKE_LLAMA},
    "GPT2LMHeadModel": r"transformer\.(h\.\d+)\b.*",
    "GPTNeoXForCausalLM": r"gpt_neox\.(layers\.\d+)\b.*",
}
OTHER_BLOCK = "other"

# Output layers over the vocabulary: no kind of modules takes them in. They are large, and often share their weight with the
# token embedding, so that nothing can be merged into them. An expression may still name them.
HEADS: frozenset[str] = frozenset(("lm_head", "embed_out"))

# Targets that are kinds of modules, the same in every architecture.
KINDS: dict[str, tuple[type[nn.Module], ...]] = {
    "all-linear": (nn.Linear,),
    "conv": (nn.Conv2d,),
    "all": (nn.Linear, nn.Conv2d),
    "norms": (nn.GroupNorm, nn.LayerNorm),
    "biases": (nn.Linear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm),
}


def register(architecture: str, patterns: Mapping[str, str], block: str = r"(?!)") -> None:
    """Say what targets mean in an architecture of one's own.

    Args:
        architecture: The name of the component's class.
        patterns: Regular expressions that the paths of modules match in full, by the name of the target.
        block: One whose first group is the block that a path lies in; by default there are none.

    Raises:
        UserError: The architecture is known already, with other patterns.
    """
    known = PATTERNS.setdefault(architecture, dict(patterns)), BLOCKS.setdefault(architecture, block)
    if known != (dict(patterns), block):
        raise UserError(f"targets of {architecture} are known already")


@dataclass(frozen=True)
class Blocks:
    """The blocks of a component: their names, and which one a path lies in."""

    names: tuple[str, ...]
    pattern: str

    def of(self, path: str) -> int:
        """Find the block that a module lies in.

        Args:
            path: The path of the module.

        Returns:
            The index of the block among ``names``.
        """
        match = re.fullmatch(self.pattern, path)
        return self.names.index(match[1] if match else OTHER_BLOCK)


def architecture(component: nn.Module) -> str:
    """Name what the tables know a component by: its class, before it was sharded.

    Args:
        component: The module.

    Returns:
        The name of the class.
    """
    return type(component).__name__.removeprefix("FSDP")  # what torch's fully_shard puts before it


def modules(component: nn.Module) -> dict[str, nn.Module]:
    """List every module of the base, without what adapters brought.

    Args:
        component: The module to look in.

    Returns:
        The modules by path; "" is the component itself.
    """
    ours = {part for module in component.modules() if (slot := slot_of(module)) is not None for part in slot.modules()}
    return {path: module for path, module in component.named_modules() if module not in ours}


def blocks(component: nn.Module) -> Blocks:
    """List the blocks of a component, in the order of its modules; whatever lies in none is in ``other``.

    Args:
        component: The module to look in.

    Returns:
        The blocks.
    """
    pattern = BLOCKS.get(architecture(component), r"(?!)")
    found = (re.fullmatch(pattern, path) for path in modules(component))
    return Blocks((*dict.fromkeys(match[1] for match in found if match), OTHER_BLOCK), pattern)


def resolve(component: nn.Module, target: str) -> list[str]:
    """Find the modules that a target names.

    Args:
        component: The module to look in.
        target: A name of ``PATTERNS`` or ``KINDS`` (the former first), or a regular expression that a path matches in full.

    Returns:
        Their paths, in the order of the component.

    Raises:
        UserError: It matches nothing, or is no valid expression.
    """
    paths = modules(component)
    own = PATTERNS.get(architecture(component), {})
    if target in KINDS and target not in own:
        found = [path for path, module in paths.items() if isinstance(module, KINDS[target]) and path not in HEADS]
    else:
        pattern = own.get(target, target)
        try:
            found = [path for path in paths if path and re.fullmatch(pattern, path)]
        except re.error as error:
            raise UserError(f"target {target!r} is neither a name nor a regular expression: {error}") from None
    if not found:
        raise UserError(f"no module of {architecture(component)} matches the target {target!r}; {_offer(component)}")
    return found


def _offer(component: nn.Module) -> str:
    """What there is to choose from, in a line."""
    names = dict.fromkeys([*PATTERNS.get(architecture(component), {}), *KINDS])
    examples = [path for path, module in modules(component).items() if isinstance(module, KINDS["all"])]
    shapes = dict.fromkeys(re.sub(r"\d+", "N", path) for path in examples)
    shown = ", ".join(list(shapes)[:12])
    return f"names: {', '.join(names)}; modules, N for a number: {shown}{', ...' if len(shapes) > 12 else ''}"
