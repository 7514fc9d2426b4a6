"""Adapters that a tool makes, and the file that they are written into."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import methods
from ..bases.base import Skeleton
from ..bases.skeleton import PUBLISHED
from ..core.adapter import Adapter, chained, parts_of
from ..core.errors import UserError
from ..core.method import Method, Values
from ..core.parsing import json_value
from ..core.reduction import Reduced
from ..core.spill import Spill
from ..core.weight_change import Change
from ..core.wording import number_of
from ..formats import Plan, Spec, file
from ..formats.container import is_finite
from ..formats.layout import Content
from ..formats.metadata import lasting
from ..formats.spec import KEY
from ..methods.making import PAIRS, made_of, told_of_pairs


@dataclass(frozen=True)
class LayerError:
    """What reducing the rank of a site left out.

    Attributes:
        site: Its component, a dot, and its path.
        rank: The rank that was kept.
        error: The Frobenius norm of what was left out over that of the whole change.
        norm: The Frobenius norm of the whole change.
    """

    site: str
    rank: int
    error: float
    norm: float

    @classmethod
    def of(cls, site: str, found: Reduced) -> "LayerError":
        """Tell what a reduction left out.

        Args:
            site: Its component, a dot, and its path.
            found: What is kept of its change.

        Returns:
            The error.
        """
        return cls(site, len(found.pair.down), found.error, found.norm)


@dataclass(frozen=True)
class OutputError:
    """How far a merged change is from an adapter at one site, by the outputs on a picture that nothing was fitted on.

    Attributes:
        site: Its component, a dot, and its path.
        adapter: The name of the adapter.
        missed: The norm of what the merged change makes of the adapter's inputs otherwise than the adapter.
        added: The same of the sum of all adapters.
        norm: The norm of what the adapter makes of them; 0 where it changes nothing there.
    """

    site: str
    adapter: str
    missed: float
    added: float
    norm: float


@dataclass(frozen=True)
class Made:
    """What a tool made.

    Attributes:
        path: The file, or the folder.
        sites: How many sites it holds.
        errors: Of each site whose rank was reduced.
        peak_memory: The most bytes of memory that the process has held so far; 0 where the system does not tell.
        seconds: How long it took.
        outputs: Of each site and adapter, where outputs were matched.
    """

    path: Path
    sites: int
    errors: tuple[LayerError, ...] = ()
    peak_memory: int = 0
    seconds: float = 0.0
    outputs: tuple[OutputError, ...] = ()

    @property
    def error(self) -> float:
        """The Frobenius norm of all that was left out over that of all changes."""
        whole = math.sqrt(sum(one.norm**2 for one in self.errors))
        return math.sqrt(sum((one.error * one.norm) ** 2 for one in self.errors)) / whole if whole else 0.0

    def lines(self) -> tuple[str, ...]:
        """Tell what was made, in lines of plain text."""
        told = [f"{self.path}: {number_of(self.sites, 'site')} in {self.seconds:.1f} s"]
        if self.peak_memory:
            told[0] += f", {self.peak_memory / 2**30:.2f} GiB of memory at most"
        if self.errors:
            ranks = [one.rank for one in self.errors]
            span = f"{min(ranks)}" if min(ranks) == max(ranks) else f"{min(ranks)} to {max(ranks)}"
            worst = max(self.errors, key=lambda one: one.error)
            told.append(
                f"rank {span}; left out {self.error:.2%} of the change (Frobenius norm), most at {worst.site}:"
                f" {worst.error:.2%}"
            )
        for name in dict.fromkeys(one.adapter for one in self.outputs):
            merged, added = self.output_error(name)
            told.append(
                f"{name}: {merged:.1%} of what it adds to outputs of its own prompts is missed, {added:.1%} by adding"
            )
        return tuple(told)

    def output_error(self, adapter: str) -> tuple[float, float]:
        """Tell how far outputs are from those of an adapter alone, on a picture of its own that nothing was fitted on.

        Args:
            adapter: Its name.

        Returns:
            The norm of what is missed over that of what the adapter adds, over all layers: of what was made, and of the sum
            of all adapters.
        """
        own = [one for one in self.outputs if one.adapter == adapter]
        whole = math.hypot(*(one.norm for one in own)) or 1.0
        return math.hypot(*(one.missed for one in own)) / whole, math.hypot(*(one.added for one in own)) / whole


class Adapters:
    """Adapters that are made one after the other, and wait on the disk, in the dtype of the file, until all are there.

    Attributes:
        bones: The skeleton of the base.
        dtype: Of the file.
        made: By component and path. Their numbers are not to be changed in place.

    Args:
        bones: The skeleton of the base.
        dtype: Of the file.
        output: The file that is to be written, or the folder of it.
    """

    def __init__(self, bones: Skeleton, dtype: torch.dtype, output: Path) -> None:
        self.bones = bones
        self.dtype = dtype
        self.made: dict[str, dict[str, Adapter]] = {}
        self._spill = Spill(output)

    def add(self, component: str, path: str, adapter: Adapter) -> None:
        """Take an adapter.

        Args:
            component: The name of its component.
            path: Its site there.
            adapter: The adapter, whose numbers are rounded to the dtype of the file.

        Raises:
            UserError: A number is too large for that dtype, or the disk is full.
        """
        for tensor in (*adapter.parameters(), *adapter.buffers()):
            if tensor.is_floating_point() and tensor.numel() > 1:
                rounded = tensor.data.to(self.dtype)
                if not is_finite(rounded):
                    raise UserError(
                        f"{component}.{path} has numbers that {self.dtype} cannot hold; take --dtype float32 or bf16"
                    )
                tensor.data = self._spill.put(rounded)
        adapter.bind(self.bones.parts[component].get_submodule(path))  # layouts ask what it sits on
        self.made.setdefault(component, {})[path] = adapter

    def add_change(self, component: str, path: str, change: Change) -> None:
        """Make an adapter of a change: a LoRA of a pair, else a whole change; beside a pair, a change of the bias.

        Args:
            component: The name of its component.
            path: Its site there.
            change: What it changes.

        Raises:
            UserError: A number is too large for the dtype of the file, or the disk is full.
        """
        site = self.bones.parts[component].get_submodule(path)
        parts = made_of(site, change, even=self.dtype == torch.float16)
        if parts:
            self.add(component, path, chained(parts))

    @property
    def count(self) -> int:
        """How many sites there are."""
        return sum(map(len, self.made.values()))

    def spec_methods(self, sources: Sequence[Plan]) -> dict[str, tuple[Mapping[str, Any], ...]]:
        """Say what methods the adapters are of, for the metadata.

        Args:
            sources: The files that they were made of; what these say of a method that is there still is kept.

        Returns:
            By component, what `Spec.methods` holds.
        """
        return {component: tuple(_methods(component, own, sources)) for component, own in self.made.items()}

    def write(self, path: Path, layout: str, spec: Spec, metadata: Mapping[str, str]) -> Path:
        """Write the file.

        Args:
            path: The file to make or replace.
            layout: The name of its layout.
            spec: What it says of itself.
            metadata: Further entries of its header.

        Returns:
            The file that was written.

        Raises:
            UserError: There is nothing to write, the layout cannot say it, or the file cannot be written.
        """
        if not self.count:
            raise UserError(f"{path} would hold nothing")
        parts = {component: self.bones.parts[component] for component in self.made}
        return file.write(path, Content(self.made, parts, spec), layout=layout, more=metadata, let_go=self._spill.release)


def _methods(component: str, own: Mapping[str, Adapter], sources: Sequence[Plan]) -> Iterable[Mapping[str, Any]]:
    """A method's entry for each that is at some site of a component."""
    told = [one for plan in sources if plan.spec for one in plan.spec.methods.get(component, ())]
    states = [part.state() for adapter in own.values() for part in parts_of(adapter)]
    for name, method in methods.known().items():
        held = [state for state in states if method.recognizes(state.keys())]
        if not held:
            continue
        same = [one for one in told if one.get("method") == name]
        targets = {one.get("target") for one in same}
        beside = {"target": targets.pop()} if len(targets) == 1 and None not in targets else {}
        if name == PAIRS:
            yield {**told_of_pairs(held), **beside}
        elif same:
            yield same[0]
        else:
            yield {"method": name, **_largest(method, held), **beside}


def _largest(method: type[Method], held: Sequence[Mapping[str, Tensor]]) -> Mapping[str, Any]:
    """The hyper-parameters that the tensors of a method tell, of the site with the largest rank; its defaults for others."""
    told: list[Values | None] = [
        method.read_hyper_parameters(
            {suffix: tuple(tensor.shape) for suffix, tensor in state.items()},
            {suffix: float(state[suffix]) for suffix in method.constants & state.keys() if state[suffix].numel() == 1},
        )
        for state in held
    ]
    values = max((one for one in told if one is not None), key=lambda one: float(one.get("rank", 0)), default={})
    known = {one.name for one in fields(method)}
    try:
        return method(**{name: value for name, value in values.items() if name in known}).spec()
    except (TypeError, UserError):  # of a plug-in that tells of its files what it does not take
        return values


_SAID_ANEW = (KEY, "modelspec.trigger_phrase")
"""What follows from the spec."""

_OF_NETWORK = "ss_network_"
_TAGS = "ss_tag_frequency"


def kept_metadata(sources: Sequence[Plan], *, network: bool = False) -> dict[str, str]:
    """Choose what of the metadata of files stays true of one that is made of them.

    Args:
        sources: The files.
        network: Whether that which kohya's trainer says of the method stays true.

    Returns:
        The entries that all have with one value, and the frequencies of the tags of all.
    """
    first, *others = (lasting(one.header.metadata) for one in sources)
    kept = {key: value for key, value in first.items() if all(other.get(key) == value for other in others)}
    tags = _joined_tags([one.header.metadata for one in sources])
    if tags:
        kept[_TAGS] = tags
    return {
        key: value for key, value in kept.items() if key not in _SAID_ANEW and (network or not key.startswith(_OF_NETWORK))
    }


def _joined_tags(several: Sequence[Mapping[str, str]]) -> str:
    """The tags of all files by folder, and how often each was seen."""
    joined: dict[str, dict[str, int]] = {}
    for metadata in several:
        try:
            told = json_value(metadata.get(_TAGS, "{}"))
            counts = [(folder, tag, int(count)) for folder, tags in told.items() for tag, count in tags.items()]
        except (ValueError, AttributeError, TypeError):  # of another program: shown, and never relied on
            continue
        for folder, tag, count in counts:
            own = joined.setdefault(folder, {})
            own[tag] = own.get(tag, 0) + count
    return json.dumps(joined, ensure_ascii=False) if joined else ""


def joined_spec(sources: Sequence[Plan], bones: Skeleton, made: Adapters, title: str) -> Spec:
    """Say of a file what those say that it was made of.

    Args:
        sources: The files.
        bones: The skeleton of the base.
        made: The adapters of the file.
        title: Its name.

    Returns:
        The spec: the triggers of all, and of base and training what all agree on.
    """
    specs = [one.spec for one in sources if one.spec is not None]
    bases = [dict(one.base) for one in specs]
    base = bases[0] if bases and all(one == bases[0] for one in bases) else base_told(bones)
    triggers = dict.fromkeys(trigger for one in sources for trigger in trigger_phrases(one))
    alone = specs[0] if len(sources) == 1 and specs else None
    return Spec(
        made.spec_methods(sources),
        base,
        tuple(triggers),
        alone.training if alone else {},
        alone.title if alone and alone.title else title,
        alone.description if alone else "",
    )


def base_told(bones: Skeleton) -> dict[str, Any]:
    """Say what a base is, as `Spec.base` holds it.

    Args:
        bones: Its skeleton.

    Returns:
        What is known of it.
    """
    told = {key: value for key, value in asdict(bones.info).items() if value not in ("", None)}
    return {
        key: value for key, value in told.items() if key != "name" or value not in PUBLISHED
    }  # an architecture is no base


def trigger_phrases(plan: Plan) -> tuple[str, ...]:
    """List the phrases that a file names as what calls its adapter, as a new file is to name them again.

    Words that were learned are in the tensors, and need no naming: `formats.inspection.triggers_of` lists these too.

    Args:
        plan: The file.

    Returns:
        The triggers of its spec, or what stands between the commas of ``modelspec.trigger_phrase``.
    """
    if plan.spec is not None:
        return plan.spec.triggers
    phrase = plan.header.metadata.get("modelspec.trigger_phrase", "")
    return tuple(word.strip() for word in phrase.split(",") if word.strip())


_SELF_NAMED = ("kohya", "original", "diffusers", "embedding")
"""Layouts whose files may have any name."""


def layout_of(plan: Plan) -> str:
    """Name the layout in which what is made of a file is written, unless one is named.

    Args:
        plan: The file.

    Returns:
        Its own; kohya where that needs a name or a configuration beside it.
    """
    return next((name for name in plan.layouts[:1] if name in _SELF_NAMED), _SELF_NAMED[0])


def write_changed(made: Adapters, plan: Plan, path: Path, layout: str | None, comment: str) -> Path:
    """Write what was made of one file, with all that the file says of itself.

    Args:
        made: The adapters.
        plan: The file that they were made of.
        path: The file to make or replace.
        layout: Its layout; None: that of the file.
        comment: What was done, for the metadata.

    Returns:
        The file that was written.

    Raises:
        UserError: The layout cannot say it, or the file cannot be written.
    """
    metadata = kept_metadata([plan])
    told = metadata.get(_COMMENT)
    metadata[_COMMENT] = f"{comment}; {told}" if told else comment
    return made.write(path, layout or layout_of(plan), joined_spec([plan], made.bones, made, path.stem), metadata)


_COMMENT = "ss_training_comment"
