"""What names of targets mean in the architectures of components, by the class of the component. Imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass

from .errors import UserError


@dataclass(frozen=True)
class TargetTable:
    """What the names of targets mean in an architecture, and which of its parts are blocks and layers.

    Attributes:
        targets: Regular expressions that the paths of modules match in full, by the name of the target.
        block: A regular expression for the paths of modules in blocks. Its first group is the name of the block. By default
            there are none.
        layers: Classes of modules that can be computed again in the backward pass, and sharded, one by one. Those of
            transformers that say so themselves are known without.
        part: The same for what takes a strength of its own, where that is finer; its names are paths within the blocks.
    """

    targets: Mapping[str, str]
    block: str = r"(?!)"
    layers: tuple[str, ...] = ()
    part: str = ""


_UNET = TargetTable(
    {
        "attention": r".*\.attn[12]\.(to_q|to_k|to_v|to_out\.0)",
        "attention+ff": r".*\.(attn[12]\.(to_q|to_k|to_v|to_out\.0)|ff\.net\.(0\.proj|2))",
        "outputs": r".*\.(attn[12]\.to_out\.0|ff\.net\.2)",  # of the sublayers, where Houlsby's bottlenecks sit
        "ff-outputs": r".*\.ff\.net\.2",  # where Pfeiffer's do
        "conv-outputs": r".*\.resnets\.\d+\.conv2",
        "sublayers": r".*\.(attn[12]|ff)",  # as a whole, which parallel bottlenecks run beside
        "attentions": r".*\.attn[12]",  # as a whole, which prefixes extend
        "self-attentions": r".*\.attn1",
        "cross-attentions": r".*\.attn2",
    },
    r"(down_blocks\.\d+|mid_block|up_blocks\.\d+)\b.*",
    ("BasicTransformerBlock", "ResnetBlock2D"),
    r"(conv_in|mid_block|(?:down|up)_blocks\.\d+(?:\.\w+\.\d+)?)\b.*",
)
_CLIP = TargetTable(
    {
        "attention": r".*\.self_attn\.(q|k|v|out)_proj",
        "attention+ff": r".*\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])",
        "outputs": r".*\.(self_attn\.out_proj|mlp\.fc2)",
        "ff-outputs": r".*\.mlp\.fc2",
        "sublayers": r".*\.mlp",  # its attention returns more than a tensor
        # Without those of the keys: they add the same to all scores of a query, which the softmax takes out again.
        "biases": r"(.*\.)?(self_attn\.(q|v|out)_proj|mlp\.fc[12]|layer_norm[12]|final_layer_norm)",
        "tokens": r"(.*\.)?token_embedding",
    },
    r"(?:text_model\.)?encoder\.(layers\.\d+)\b.*",
)
_LLAMA = TargetTable(
    {
        "attention": r".*\.self_attn\.[qkvo]_proj",
        "attention+ff": r".*\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)",
        "outputs": r".*\.(self_attn\.o_proj|mlp\.down_proj)",
        "ff-outputs": r".*\.mlp\.down_proj",
        "sublayers": r".*\.mlp",  # its attention returns more than a tensor
        "attentions": r".*\.self_attn",  # as a whole, which prefixes extend
        "tokens": r"(.*\.)?embed_tokens",
    },
    r"model\.(layers\.\d+)\b.*",
)
_GPT2 = TargetTable(
    {
        "attention": r".*\.attn\.(c_attn|c_proj)",
        "attention+ff": r".*\.(attn\.(c_attn|c_proj)|mlp\.(c_fc|c_proj))",
    },
    r"transformer\.(h\.\d+)\b.*",
)
_GPT_NEOX = TargetTable(
    {
        "attention": r".*\.attention\.(query_key_value|dense)",
        "attention+ff": r".*\.(attention\.(query_key_value|dense)|mlp\.(dense_h_to_4h|dense_4h_to_h))",
    },
    r"gpt_neox\.(layers\.\d+)\b.*",
)
_LIKE_LLAMA = ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2", "SmolLM3")

TABLES: dict[str, TargetTable] = {
    "UNet2DConditionModel": _UNET,
    "CLIPTextModel": _CLIP,
    "CLIPTextModelWithProjection": _CLIP,
    **{f"{family}ForCausalLM": _LLAMA for family in _LIKE_LLAMA},
    "GPT2LMHeadModel": _GPT2,
    "GPTNeoXForCausalLM": _GPT_NEOX,
}
"""By the name of the component's class."""

UNKNOWN = TargetTable({})
"""Any other, in which only kinds of modules and regular expressions are targets."""


def register(name: str, table: TargetTable) -> None:
    """Say what targets mean in an architecture.

    Args:
        name: The name of the component's class.
        table: What targets mean in it.

    Raises:
        UserError: It is known already, with other targets.
    """
    if TABLES.setdefault(name, table) != table:
        raise UserError(f"the targets of {name} are known already, and are others; leave them away")
