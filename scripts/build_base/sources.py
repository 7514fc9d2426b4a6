"""The icon sets the base is built from and measured on: one row a set."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Role = Literal["base", "vae", "unseen"]

CACHE: Path = Path(os.environ.get("PEFT_DIFFUSION_CACHE", Path.home() / ".cache" / "peft_diffusion")) / "icons"
KEYWORDS_PACKAGE: str = "emojibase-data"
KEYWORDS_VERSION: str = "17.0.0"


@dataclass(frozen=True)
class IconSet:
    """A package of drawings, and what it may be used for.

    `role` is "base" when the set trains the whole base, "vae" when it trains the autoencoder only, and "unseen" when
    nothing is ever trained on it. `suffix` keeps the icons whose name ends so, and is cut from the subject.
    """

    style: str
    package: str
    version: str
    role: Role
    template: str
    licence: str
    author: str
    url: str
    suffix: str = ""

    @property
    def archive(self) -> str:
        """File name of the package in the cache."""
        return f"{self.package.split('/')[-1]}-{self.version}.tgz"

    @property
    def is_emoji(self) -> bool:
        """Whether the names of the set are those of emoji."""
        return "emoji" in self.template


def _iconify(style: str, version: str, role: Role, template: str, licence: str, credit: tuple[str, str]) -> IconSet:
    return IconSet(style, f"@iconify-json/{style}", version, role, template, licence, *credit)


_NOTO = ("Google", "https://github.com/googlefonts/noto-emoji")
_FLUENT = ("Microsoft", "https://github.com/microsoft/fluentui-emoji")
_PHOSPHOR = ("Phosphor Icons", "https://github.com/phosphor-icons/core")
_TABLER = ("Paweł Kuna", "https://github.com/tabler/tabler-icons")
_FXEMOJI = ("Mozilla", "https://github.com/mozilla/fxemoji")
_FLAT = ("Icons8", "https://github.com/icons8/flat-Color-icons")
_OPENMOJI = ("OpenMoji", "https://github.com/hfg-gmuend/openmoji")
_TWEMOJI = ("Twitter and contributors", "https://github.com/jdecked/twemoji")

ICON_SETS: tuple[IconSet, ...] = (
    _iconify("noto", "1.2.9", "base", "noto emoji of {}", "Apache-2.0", _NOTO),
    _iconify("noto-v1", "1.2.5", "base", "android blob emoji of {}", "Apache-2.0", _NOTO),
    _iconify("fxemoji", "1.2.2", "base", "firefox emoji of {}", "Apache-2.0", _FXEMOJI),
    _iconify("fluent-emoji", "1.2.7", "base", "3d emoji of {}", "MIT", _FLUENT),
    _iconify("tabler", "1.2.41", "base", "line icon of {}", "MIT", _TABLER),
    IconSet("ph-fill", "@iconify-json/ph", "1.2.2", "base", "solid icon of {}", "MIT", *_PHOSPHOR, "-fill"),
    IconSet("ph-duotone", "@iconify-json/ph", "1.2.2", "base", "duotone icon of {}", "MIT", *_PHOSPHOR, "-duotone"),
    _iconify("flat-color-icons", "1.2.3", "base", "flat color icon of {}", "MIT", _FLAT),
    _iconify("fluent-emoji-flat", "1.2.6", "vae", "fluent flat emoji of {}", "MIT", _FLUENT),
    _iconify("openmoji", "1.2.29", "unseen", "openmoji emoji of {}", "CC-BY-SA-4.0", _OPENMOJI),
    _iconify("twemoji", "1.2.5", "unseen", "twemoji emoji of {}", "CC-BY-4.0", _TWEMOJI),
)
_ICONPARK = ("ByteDance", "https://github.com/bytedance/IconPark")
_STREAMLINE = ("Streamline", "https://github.com/webalys-hq/streamline-vectors")
_EMOJIONE = ("Emoji One", "https://github.com/EmojiTwo/emojitwo")

# Sets that no base and no judge was ever trained with: blends are measured on them too.
UNSEEN_SETS: tuple[IconSet, ...] = (
    _iconify("icon-park-twotone", "1.2.4", "unseen", "twotone icon of {}", "Apache-2.0", _ICONPARK),
    _iconify("streamline-emojis", "1.2.4", "unseen", "streamline emoji of {}", "CC-BY-4.0", _STREAMLINE),
    _iconify("emojione", "1.2.3", "unseen", "emojione emoji of {}", "CC-BY-4.0", _EMOJIONE),
)
STYLES: dict[str, IconSet] = {icon_set.style: icon_set for icon_set in ICON_SETS}
BASE_STYLES: tuple[str, ...] = tuple(icon_set.style for icon_set in ICON_SETS if icon_set.role == "base")


def icon_set(style: str) -> IconSet:
    """The set drawn in `style`, or an error that lists the styles there are."""
    known = STYLES | {one.style: one for one in UNSEEN_SETS}
    if style not in known:
        raise ValueError(f"there is no icon set {style!r}; choose one of {', '.join(known)}")
    return known[style]
