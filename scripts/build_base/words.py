"""Words of the subjects: names written together are split, and an emoji's label is found for its tags."""

import functools
import math
import re
from collections import Counter
from pathlib import Path

from .fetch import read_icons, read_keywords
from .sources import CACHE, STYLES

_VOCABULARY_STYLES = ("noto", "noto-v1", "fluent-emoji", "openmoji", "tabler", "ph-fill")
_EXTRA = (
    "fox lightning mood guy bust heavy squared negative circled black white rightwards leftwards upwards downwards "
    "upwards and with of in lower upper ideograph unified cjk regional indicator bites smirk pouting weary tongue out "
    "wink hearts playing cards medium small ballot script bold blank north south east west pointing raised flag "
    "eye eyes aok ok no good americas globe asia europe africa "
    "stamped waitress handheld sideways descend ascend tokyo cancellation toilet busstop"
)

# What icon sets call a thing, and what emoji call the same.
OTHER_NAMES: dict[str, tuple[str, ...]] = {
    "alarm": ("alarm clock",),
    "apple": ("red apple",),
    "ball football": ("soccer ball",),
    "bike": ("bicycle",),
    "book": ("closed book",),
    "bulb": ("light bulb",),
    "car": ("automobile",),
    "cat": ("cat face",),
    "cherry": ("cherries",),
    "christmas tree": ("evergreen tree",),
    "clock": ("mantelpiece clock",),
    "cloud rain": ("cloud with rain",),
    "cloud snow": ("cloud with snow",),
    "confetti": ("confetti ball",),
    "diamond": ("gem stone",),
    "dog": ("dog face",),
    "egg fried": ("cooking",),
    "flame": ("fire",),
    "flower": ("blossom",),
    "gift": ("wrapped gift",),
    "globe": ("globe with meridians",),
    "hand stop": ("raised hand",),
    "hand thumbs up": ("thumbs up",),
    "heart": ("red heart",),
    "home": ("house",),
    "ice cream": ("soft ice cream",),
    "lightbulb": ("light bulb",),
    "lock": ("locked",),
    "mail": ("envelope",),
    "meat": ("meat on bone",),
    "mood cry": ("crying face",),
    "mood happy": ("grinning face",),
    "mood kid": ("boy",),
    "mood sad": ("frowning face",),
    "mood smile": ("smiling face", "slightly smiling face"),
    "mood surprised": ("face with open mouth",),
    "mood wink": ("winking face",),
    "moon": ("crescent moon",),
    "music": ("musical notes",),
    "palette": ("artist palette",),
    "plane": ("airplane",),
    "pumpkin scary": ("jack o lantern",),
    "salad": ("green salad",),
    "shirt": ("t shirt",),
    "smiley": ("grinning face",),
    "smiley sad": ("frowning face",),
    "smiley wink": ("winking face",),
    "sword": ("crossed swords",),
    "thumb up": ("thumbs up",),
    "tree": ("deciduous tree",),
    "trees": ("evergreen tree",),
    "truck": ("delivery truck",),
}


def plain(text: str) -> str:
    """Lower case, with nothing but letters, digits and single spaces."""
    text = text.lower().replace("’", "").replace("'", "")
    return re.sub(r"[^a-z0-9]+", " ", text).strip()


@functools.lru_cache(maxsize=1)
def _word_costs(cache: Path = CACHE) -> dict[str, float]:
    """What each known word costs in a split: the rarer, the dearer."""
    counts: Counter[str] = Counter(_EXTRA.split())
    for style in _VOCABULARY_STYLES:
        for name in read_icons(STYLES[style], cache)["icons"]:
            counts.update(word for word in name.split("-") if len(word) > 2 or word in ("of", "in", "no", "on", "up"))
    for row in read_keywords(cache):
        words = plain(row["label"]).split() + [plain(tag) for tag in row.get("tags") or []]
        counts.update(word for word in words if len(word) > 2 and " " not in word)
    total = sum(counts.values())
    return {word: math.log(total / count) for word, count in counts.items()}


def split(name: str, cache: Path = CACHE) -> str:
    """`waxingcrescentmoon` as `waxing crescent moon`: the cheapest split into known words and single letters."""
    costs = _word_costs(cache)
    best: list[tuple[float, list[str]]] = [(0.0, [])]
    for end in range(1, len(name) + 1):
        options = []
        for start in range(max(0, end - 18), end):
            word = name[start:end]
            cost = costs.get(word, 1.0 if word.isdigit() else 14.0 * len(word))
            options.append((best[start][0] + cost, [*best[start][1], word]))
        best.append(min(options))
    return " ".join(best[-1][1])


@functools.lru_cache(maxsize=1)
def emoji_tags(cache: Path = CACHE) -> dict[str, tuple[str, ...]]:
    """From an emoji's label in plain words to its tags that say more than the label does."""
    found: dict[str, tuple[str, ...]] = {}
    for row in read_keywords(cache):
        label = plain(row["label"])
        tags = (plain(tag) for tag in row.get("tags") or [])
        found[label] = tuple(tag for tag in tags if len(tag) > 2 and tag not in label.split())
    return found
