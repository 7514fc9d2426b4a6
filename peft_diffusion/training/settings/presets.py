"""What suits a base, a method and an optimizer where nothing was said, as data. Imports no torch."""

from typing import Any

from .choices import Keep

HELD_OUT_FROM = 20  # pictures, or windows of text, from which on a tenth is kept apart
FEW_APART, FEW_FROM = 2, 6  # pictures that are kept apart of fewer, and how many it takes for that

SEEN_LEAST = 4  # times that a picture has to be seen for anything of it to be learned

KEPT: dict[str, Keep] = {"style": "last", "subject": "best"}
CLASS_IMAGES = 100

# What suits a base by its size: below this many parameters, and from there on.
SMALL = 50_000_000
# Rates that are another one's where nothing is said of them.
RATE_LIKE = {"text_encoder_2_lr": "text_encoder_lr"}
LONGEST = 1024  # tokens of a window, unless more are asked for
TEXT_DEFAULTS: dict[bool, dict[str, Any]] = {
    True: {"steps": 300, "batch_size": 8},
    False: {"steps": 500, "batch_size": 4},
}
# Usual learning rates; a method may have its own. Those of small bases were found on the embedded one
# (scripts/compare_text.py); those of large ones are usual in papers.
TEXT_RATES: dict[bool, float] = {True: 3e-3, False: 2e-4}
