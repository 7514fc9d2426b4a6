"""The methods, one file each. Importing this package registers them by name."""

from . import bitfit, bottleneck, dora, ia3, loha, lokr, lora, oft, prefix, tokens

__all__ = ["bitfit", "bottleneck", "dora", "ia3", "loha", "lokr", "lora", "oft", "prefix", "tokens"]
