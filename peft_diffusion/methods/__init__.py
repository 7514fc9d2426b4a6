"""The methods, one file each. Importing this package registers them by name."""

from . import dora, ia3, loha, lokr, lora, oft

__all__ = ["dora", "ia3", "loha", "lokr", "lora", "oft"]
