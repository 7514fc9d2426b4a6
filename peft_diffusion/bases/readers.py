"""What reads prompts in a base, without the rest of it: for whoever only compares texts."""

from typing import TYPE_CHECKING, Any

from ..core.parsing import refusing
from .embedded import embedded

if TYPE_CHECKING:
    from numpy.typing import NDArray


def load_reader(source: str, local: bool) -> tuple[Any, Any]:
    """Load the first text encoder of a Stable Diffusion base.

    Args:
        source: A folder in the layout of diffusers, or a hub id.
        local: Whether to look on this machine alone.

    Returns:
        The model, and its tokenizer.

    Raises:
        OSError: The source lacks one of the two.
    """
    from transformers import AutoTokenizer, CLIPTextModel

    model = CLIPTextModel.from_pretrained(source, subfolder="text_encoder", local_files_only=local)
    return model, AutoTokenizer.from_pretrained(source, subfolder="tokenizer", local_files_only=local)


def embedded_words() -> "tuple[Any, NDArray[Any]]":
    """Read how the embedded base of icons cuts texts into tokens, and the vector of each; needs no torch.

    Returns:
        The tokenizer (of the library tokenizers), and a float32 table of shape (tokens, width).

    Raises:
        UserError: The package is incomplete.
    """
    import numpy as np
    from safetensors import safe_open
    from tokenizers import Tokenizer

    folder = embedded("base")
    with refusing(f"{folder} cannot be read; install peft_diffusion again"):
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
        with safe_open(folder / "text_encoder" / "model.safetensors", "numpy") as file:
            return tokenizer, file.get_tensor("embeddings.token_embedding.weight").astype(np.float32)
