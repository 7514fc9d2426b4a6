"""How names of picture files end. Imports neither torch nor Pillow."""

SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"))
"""Of the formats that are read, AVIF among them, which not every Pillow reads: see `images.SUFFIXES`."""

CONVERTIBLE = frozenset((".heic", ".heif", ".svg", ".psd", ".jxl", ".jp2", ".ico", ".tga", ".raw", ".dng"))
"""Of formats that are not read, which other programs convert."""
