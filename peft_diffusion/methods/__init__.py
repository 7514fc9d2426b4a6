"""The methods, one file each. Importing this package registers them by name."""

from . import lora

__all__ = ["lora"]
