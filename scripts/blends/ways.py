"""The ways of composing that are compared: what is loaded for a pair, and which strengths a point has."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from peft_diffusion.generation.compositions import COMPOSITIONS, LEARNED
from peft_diffusion.tools.tool_settings import MATCHING, How, MergeConfig
from peft_diffusion.training.settings.composing import Kind

if TYPE_CHECKING:
    from peft_diffusion.generation import Adapters

SHARES = (0.2, 0.35, 0.5, 0.65, 0.8)
SCALES = (1.0, 1.5, 2.0)
ENDS = ((1.0, 1.0), (0.0, 1.0))
MERGED_RANK = 32
"""Of files that change weights in no fewer directions: as many as both adapters have together."""

Point = tuple[float, float]
"""The share of the first, and the sum of both strengths."""
Strengths = Callable[[float, float], Mapping[str, float]]


@dataclass(frozen=True)
class Pair:
    """Two adapters: the second is of a style or of a character."""

    first: str
    second: str
    prompts: tuple[str, ...]
    wanted: tuple[str, ...]
    character: bool = False

    def strengths(self, share: float, scale: float) -> dict[str, float]:
        """Plain strengths, a character before a style, as K-LoRA takes them."""
        found = {self.first: share * scale, self.second: (1 - share) * scale}
        return dict(reversed(found.items())) if self.character else found

    @property
    def name(self) -> str:
        """Both."""
        return f"{self.first} x {self.second}"

    @property
    def stem(self) -> str:
        """Both, as part of a file's name."""
        return f"{self.first}+{self.second}"


@dataclass(frozen=True)
class Way:
    """A way of composing: what ``--compose`` is, which files are loaded, and how strengths follow from a point.

    ``folder`` holds the adapters. `load` puts what is needed on the base. ``kind`` is that of a
    composition that was learned. ``draws_ends`` tells whether pictures of one adapter alone are the
    way's own, and not those of plain strengths.
    """

    name: str
    compose: str = "add"
    kind: str | None = None
    draws_ends: bool = False
    points: tuple[Point, ...] = field(default=tuple((share, scale) for scale in SCALES for share in SHARES))

    def load(self, adapters: "Adapters", pair: Pair, folder: Path) -> Strengths | None:
        """Load both; None where a file that is needed is not there."""
        for name in (pair.first, pair.second):
            adapters.load(folder / f"{name}.safetensors", name=name)
        return pair.strengths

    def file(self, folder: Path, pair: Pair) -> Path | None:
        """The file of a composition that was learned for a pair; None for a way that needs none."""
        return None if self.kind is None else folder / "composed" / f"{pair.stem}-{self.kind}.safetensors"


class Calibrated(Way):
    """Strengths by what adapters do."""

    def load(self, adapters: "Adapters", pair: Pair, folder: Path) -> Strengths | None:
        """Load both, and measure them."""
        super().load(adapters, pair, folder)
        found = adapters.calibrate(pair.prompts, rows=True)

        def strengths(share: float, scale: float) -> Mapping[str, float]:
            even = found.evenly(pair.strengths(share, 1.0))
            return {name: scale * amount for name, amount in even.items()}

        return strengths


class Beside(Way):
    """The second was trained beside the first."""

    def load(self, adapters: "Adapters", pair: Pair, folder: Path) -> Strengths | None:
        """Load the first, and what was trained beside it."""
        file = folder / f"{beside_name(pair)}.safetensors"
        if not file.exists():
            return None
        adapters.load(folder / f"{pair.first}.safetensors", name=pair.first)
        adapters.load(file, name=pair.second)
        return pair.strengths


@dataclass(frozen=True)
class Merged(Way):
    """One file of both for each share, which ``merge --how`` makes."""

    how: str = ""

    def load(self, adapters: "Adapters", pair: Pair, folder: Path) -> Strengths | None:
        """Load the files that `merge` made."""
        files = {share: merged_file(folder, pair, self.how, share) for share in SHARES}
        if not all(file.exists() for file in files.values()):
            return None
        names = {share: adapters.load(file, name=f"merged{number}") for number, (share, file) in enumerate(files.items())}
        return lambda share, scale: {names[share]: scale}


def beside_name(pair: Pair) -> str:
    """What the second is called where it was trained beside the first."""
    return f"{pair.second}-beside-{pair.first}"


def merged_file(folder: Path, pair: Pair, how: str, share: float) -> Path:
    """The file of a merge."""
    return folder / "merged" / f"{pair.stem}-{how}-{share:g}.safetensors"


def merge_one(job: tuple[Path, Pair, str, float]) -> None:
    """Merge two files at a share."""
    import torch

    from peft_diffusion.tools.merging import merge

    torch.set_num_threads(1)
    folder, pair, how, share = job
    base = "icons" if how in MATCHING else None  # what these merges draw with
    output = merged_file(folder, pair, how, share)
    output.parent.mkdir(parents=True, exist_ok=True)
    files = [f"{folder / pair.first}.safetensors={share:g}", f"{folder / pair.second}.safetensors={1 - share:g}"]
    rank = None if how == "svd" else MERGED_RANK
    merge(MergeConfig(tuple(files), output=output, how=how, rank=rank, base=base))  # type: ignore[arg-type]


def every() -> dict[str, Way]:
    """All ways there are, by name: those of ``--compose`` and of ``merge --how`` as their tables have them."""
    found: list[Way] = [Way("plain", draws_ends=True), Calibrated("calibrated"), Beside("beside", draws_ends=True)]
    for name, one in COMPOSITIONS.items():
        if name == LEARNED:
            found += [Way(f"learned {kind}", kind=kind) for kind in get_args(Kind)]
        elif name != "add" and one.fewest <= 2 and (one.most is None or one.most >= 2):
            # A mean of predictions is weighed by shares alone, so it has more of them.
            shares = tuple((n / 16, 1.0) for n in range(1, 16))
            found.append(Way(name, name, points=shares) if name == "composite" else Way(name, name))
    found += [Merged(f"merge {how}", how=how) for how in get_args(How) if how != "linear"]
    return {way.name: way for way in found}


def merges(ways: Sequence[Way], pairs: Sequence[Pair], folder: Path) -> list[tuple[Path, Pair, str, float]]:
    """What is to be merged and is not yet there."""
    jobs = [(folder, pair, way.how, share)
            for pair in pairs for way in ways if isinstance(way, Merged) for share in SHARES]  # fmt: skip
    return [job for job in jobs if not merged_file(*job).exists()]
