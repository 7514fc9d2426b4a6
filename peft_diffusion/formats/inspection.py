"""What an adapter file holds, told from its header alone: nothing is loaded, torch is not needed."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..core.errors import UserError
from . import container
from .container import Header
from .layout import component_of, split
from .spec import Spec

# The tensor names by which files of each method are known; what a Method reads is declared in its own file.
_MARKS = {
    "lora_down.weight": "lora",
    "lora_up.weight": "lora",
    "hada_w1_a": "loha",
    "lokr_w1": "lokr",
    "lokr_w1_a": "lokr",
    "oft_blocks": "oft",
    "on_input": "ia3",
    "dora_scale": "dora",
    "diff_b": "bitfit",
    "b_norm": "bitfit",
    "bottleneck_down": "bottleneck",
    "prefix_keys": "prefix",
    "prompt_vectors": "prompt",
    "tokens_vectors": "tokens",
    "vectors": "tokens",
}
# What stands beside the parameters. Our own norms carry a weight's change of zero, for programs that look for one.
_NO_PARAMETERS = {"alpha", "bottleneck_kind", "prompt_words", "tokens_words"}
_NONE_OF_OURS = _NO_PARAMETERS | {"w_norm"}


@dataclass(frozen=True)
class Inspection:
    """A file's header, read. ``sites`` maps each site's name in the file to its tensors' shapes by suffix."""

    path: Path
    size: int
    sha256: str
    spec: Spec | None
    metadata: Mapping[str, str]
    methods: tuple[str, ...]
    components: Mapping[str, int]  # sites per component
    ranks: Mapping[int, int]  # sites per rank
    alphas: Mapping[float, int]  # sites per alpha
    dtypes: Mapping[str, int]  # tensors per dtype
    parameters: int
    sites: Mapping[str, Mapping[str, tuple[int, ...]]]
    unknown: tuple[str, ...]  # tensors that belong to no known method


def inspect(path: str | Path) -> Inspection:
    """Tell what a safetensors adapter file holds. Raises UserError for one that is no such file or is damaged."""
    where = Path(path)
    header = container.read_header(where)
    sites: dict[str, dict[str, tuple[int, ...]]] = {}
    unknown = []
    for name, entry in header.tensors.items():
        site, suffix = split(name)
        if component_of(site) is None:
            unknown.append(name)
        else:
            sites.setdefault(site, {})[suffix] = entry.shape
    spec = Spec.from_metadata(header.metadata, str(where))
    if not sites and spec is None:
        shown = ", ".join(unknown[:3]) or "no tensor"
        raise UserError(f"{where} is no adapter in the kohya layout: it holds {shown}{', ...' if len(unknown) > 3 else ''}")
    marks = {_MARKS[suffix] for suffixes in sites.values() for suffix in suffixes if suffix in _MARKS}
    beside = _NO_PARAMETERS if spec is None else _NONE_OF_OURS
    return Inspection(
        path=where,
        size=header.size,
        sha256=container.sha256(where),
        spec=spec,
        metadata=header.metadata,
        methods=tuple(sorted(marks)),
        components=Counter(component_of(site) or "" for site in sites),
        ranks=Counter(shapes["lora_down.weight"][0] for shapes in sites.values() if shapes.get("lora_down.weight")),
        alphas=_alphas(header),
        dtypes=Counter(entry.dtype for entry in header.tensors.values()),
        parameters=sum(_numel(shape) for s in sites.values() for suffix, shape in s.items() if suffix not in beside),
        sites=sites,
        unknown=tuple(unknown),
    )


def _alphas(header: Header) -> Counter[float]:
    """How many sites have which alpha."""
    entries = (entry for name, entry in header.tensors.items() if name.endswith(".alpha"))
    values = (container.read_scalar(header.path, entry) for entry in entries)
    return Counter(value for value in values if value is not None)


def _numel(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
