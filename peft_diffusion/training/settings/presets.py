"""What suits a base, a method and an optimizer where nothing was said, as data. Imports no torch."""

from typing import Any

from .choices import Keep

HELD_OUT_FROM = 20  # pictures, or windows of text; with fewer, each one is worth more in training than in measuring

KEPT: dict[str, Keep] = {"style": "last", "subject": "best"}
CLASS_IMAGES = 100

# How many times the rate of a LoRA suits a method by default: the fewer numbers it trains, and the further they are from the
# weights, the faster they must move. Of three rates for each, a factor of about 3 apart, these had the lowest loss on unseen
# drawings of a style that the embedded base had learned in 150 steps (scripts/evaluate_styles.py's measure).
RATE_FACTORS: dict[str, float] = {
    "loha": 0.5, "oft": 3.0, "lokr": 3.0, "bottleneck": 3.0, "bitfit": 10.0, "ia3": 30.0, "prefix": 30.0,
}  # fmt: skip
# Learned words have rates of their own, whatever the component's: embeddings are large numbers. This is what A1111's textual
# inversion starts with. Of six rates from 4e-4 to 4e-2 on the embedded base, whose embeddings are five times as large as
# CLIP's, the prompt looked most like a style at the same rate, and words that kept the subjects at twice that.
WORD_RATES: dict[str, float] = {"tokens": 5e-3, "prompt": 5e-3}
SMALL_WORD_RATES: dict[str, float] = {**WORD_RATES, "tokens": 1e-2}

# What suits a base by its size: below this many parameters, and from there on.
SMALL = 50_000_000
LONGEST = 1024  # tokens of a window, unless more are asked for
TEXT_DEFAULTS: dict[bool, dict[str, Any]] = {
    True: {"steps": 300, "batch_size": 8},
    False: {"steps": 500, "batch_size": 4},
}
# Learning rates: the fewer numbers a method trains, and the further they are from the weights, the faster they must move.
# Those of small bases were found on the embedded one (scripts/compare_text.py); those of large ones are usual in papers.
TEXT_RATES: dict[bool, dict[str, float]] = {
    True: {"lora": 3e-3, "prompt": 3e-2, "prefix": 3e-2},
    False: {"lora": 2e-4, "ia3": 3e-3, "prefix": 1e-2, "prompt": 1e-2, "tokens": 2e-3},
}
