"""The layouts of diffusers, peft and ComfyUI, whose names keep the dots of the paths.

- ``diffusers``: ``unet.<path>.lora_A.weight``; of older scripts ``.lora.down.weight``, ``.lora_linear_layer.down.weight`` or
  ``<attention>.processor.to_q_lora.down.weight``; alpha in the metadata, or else it is the rank;
- ``peft``: ``base_model.model.<path>.lora_A.weight``, DoRA, LoHa and LoKr; alpha in ``adapter_config.json`` beside the file;
- of ComfyUI and others, which is read as the former: ``diffusion_model.<path of the original>.lora_down.weight``, with or
  without alpha, and ``text_encoders.<encoder>.transformer.<path>.lora_up.weight``.

What a method's tensors are called there, and what peft's configuration says of it, the method declares: see
``Method.aliases`` and ``Method.in_peft``.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, cached_property, lru_cache
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ... import methods
from ...bases import family as families
from ...core.errors import UserError
from ...core.method import PeftForm
from ...core.parsing import Patterns, json_value, number, refusing
from .. import metadata
from ..aliases import aliases
from ..container import Header
from ..layout import Content, Layout, Place, Reading, Whole, Written, register
from ..names import (
    LYCORIS,
    TEXT_MODEL,
    Rows,
    claimants,
    dotted_starts,
    known_rows,
    length_of,
    prefixes,
    rows,
    with_text_model,
)

if TYPE_CHECKING:
    from torch import Tensor

    from ...core.adapter import Adapter

_METADATA = "lora_adapter_metadata"
_PEFT = "base_model.model."
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # the only names that peft looks for
_ALPHA = "alpha"
_LOADED = "lora_"  # pipelines of diffusers load no file in which a name is without it
_ADALORA = "ADALORA"
_LARGEST = 16_000_000  # bytes
# The layers of CLIP's attention by the names that the oldest scripts of diffusers gave those of every attention.
_OF_CLIP = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out.0": "out_proj"}
# What peft saves as it is: a module or a bias that it trained, the base's own beside it, and rows of an embedding.
_OF_LAYER = re.compile(r"(.+?)(?:\.base_layer)?\.(weight|bias)")
_SAVED = re.compile(r"\.modules_to_save(?:\.(?!(?:weight|bias)$)[^.]+)?(?=\.)")  # with the adapter's name behind it
_ROWS = re.compile(r"(.+?)(?:\.token_adapter)?\.trainable_tokens_delta(?:\.[^.]+)?")
_ORIGINAL = ".original_module."
_NOT_TOLD = "are of no method of peft that is known"
# What else a configuration may say of a pair, which nothing here computes.
_NOT_COMPUTED = ("alora_invocation_tokens", "use_qalora", "layer_replication")
# Beginnings of peft that change the base's weights, which a file then needs and does not hold.
_CHANGED = ("pissa", "olora", "corda", "loftq", "lora_ga")


@cache
def _claimed(known: Rows) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What names with dots begin with that name a component, the longest first, and what flat names begin with."""
    return tuple(sorted(dotted_starts(), key=len, reverse=True)), (LYCORIS, "lora_", *prefixes())


class Diffusers(Layout):
    """Files of diffusers: the component's name before the path, and the configuration in the metadata."""

    name: ClassVar[str] = "diffusers"
    told_by: ClassVar[frozenset[str] | None] = frozenset({_METADATA})

    def claims(self, name: str) -> int | None:
        """Names that begin with a component, or with a path alone, and end as a method's do there."""
        starts, flat = _claimed(known_rows())
        start = length_of(name, starts) if name.startswith(starts) else 0
        is_flat = not start and name.startswith(flat)
        return None if is_flat or aliases().parts(name) is None else start

    def read(self, header: Header, names: Sequence[str]) -> Reading:
        """By the names and the metadata."""
        return read(header, names)

    def write(self, content: Content) -> Written:
        """Pairs of each component with their configuration."""
        tensors: dict[str, Tensor] = {}
        told: dict[str, Any] = {}
        for component, built in content.adapters.items():
            start = next((one.dotted[0] for one in rows() if one.name == component and one.dotted), None)
            if start is None:
                raise UserError(f"diffusers knows no component {component}; take the layout {Peft.name!r}")
            form = _form(self.name, component, built)
            for path, site in form.sites.items():
                name = start + with_text_model(component, path)
                tensors.update({f"{name}.{end}": tensor for end, tensor in site.tensors.items()})
            told |= {f"{component}.{key}": value for key, value in _config(component, form).items()}
        other = next((name for name in tensors if _LOADED not in name), None)
        if other is not None:
            raise UserError(f"diffusers reads no tensor such as {other} into a pipeline; take the layout 'kohya'")
        config = {_METADATA: json.dumps(told, sort_keys=True)}
        return Written(tensors, metadata.of_any(content.spec) | config, needed=frozenset(config))


class Peft(Layout):
    """Files of peft: ``adapter_model.safetensors`` with ``adapter_config.json`` beside it."""

    name: ClassVar[str] = "peft"

    def claims(self, name: str) -> int | None:
        """Names that begin with what peft wraps a model in."""
        return len(_PEFT) if name.startswith(_PEFT) else None

    def read(self, header: Header, names: Sequence[str]) -> Reading:
        """By the names and ``adapter_config.json`` beside the file."""
        known = [name for name in names if aliases().parts(name) is not None]
        found = read(header, known)
        if len(known) == len(names):
            return found
        stems = [stem for place in found.places.values() if (stem := place.stem)]
        places, leftovers = _read_whole(header, [name for name in names if name not in known], stems)
        return replace(found, places={**found.places, **places}, leftovers={**found.leftovers, **leftovers})

    def write(self, content: Content) -> Written:
        """One method of one component."""
        if len(content.adapters) > 1:
            raise UserError(
                f"peft keeps one model in a file, and this adapter has {', '.join(content.adapters)}: take the layout"
                f" {Diffusers.name!r}, or save each by itself, as convert --component {next(iter(content.adapters))} does"
            )
        ((component, built),) = content.adapters.items()
        form = _form(self.name, component, built)
        names = {path: f"{_PEFT}{path}" for path in form.sites}
        tensors = {f"{names[path]}.{end}": one for path, site in form.sites.items() for end, one in site.tensors.items()}
        config = {"peft_type": form.kind, "inference_mode": True, **_config(component, form)}
        beside = {_CONFIG: json.dumps(config, indent=2, sort_keys=True) + "\n"}
        return Written(tensors, metadata.of_any(content.spec), beside, _WEIGHTS)


def read(header: Header, names: Sequence[str]) -> Reading:
    """Find the places of names that keep the dots of paths.

    Args:
        header: Of the file.
        names: Of tensors.

    Returns:
        Their places, and the alphas that the configuration tells.

    Raises:
        UserError: The configuration cannot be read.
    """
    if not names:
        return Reading({})
    found = [_Tensor(name) for name in names]
    _refuse_several(header.path, found)
    config = _Configuration.of(header, any(one.of_peft for one in found))
    by_site: dict[tuple[str, str], list[_Tensor]] = {}
    for one in found:
        by_site.setdefault((one.start, one.path), []).append(one)
    places: dict[str, Place] = {}
    constants: dict[Place, float] = {}
    for own in by_site.values():
        scaled = _scaled(own, config)
        for one in own:
            places[one.name] = scaled.get(one.name, one.place)
        alpha = None if any(one.suffix == _ALPHA for one in own) else _alpha(header, own, config)
        if alpha is not None:
            constants[replace(own[0].place, suffix=_ALPHA, change=None)] = alpha
        if own[0].of_peft:
            shapes = {one.suffix: header.tensors[one.name].shape for one in own}
            for suffix, value in _told(config.config, own[0].path, shapes).items():
                constants[replace(own[0].place, suffix=suffix, change=None)] = value
    return Reading(places, {}, constants, config.warnings(header.path))


class _Tensor:
    """A tensor by its name: what the name begins with, the path, and what it is there."""

    def __init__(self, name: str) -> None:
        self.name = name
        parts = aliases().parts(name)
        if parts is None:
            raise ValueError(f"{name} is of another layout")
        self.stem, self.adapter = parts.where, parts.adapter
        self.start, self.path, self.component = _located(self.stem)
        self.of_peft = self.start.startswith(_PEFT)
        told = aliases().meaning(parts.end)
        self.suffix, self.change, self.whole = told.suffix, told.change, told.whole

    @cached_property
    def place(self) -> Place:
        """Its place; of a path alone, in any component that claims such a path."""
        return _place(self.stem, self.suffix, self.change, self.whole)


def _located(stem: str) -> tuple[str, str, str]:
    """What the name of a site begins with, its path, and the component that the beginning names; "" where it names none."""
    return _located_in(known_rows(), stem)


@lru_cache(maxsize=4096)
def _located_in(known: Rows, stem: str) -> tuple[str, str, str]:
    starts = _starts(known)
    start, component = next((start, one) for start, one in starts.items() if stem.startswith(start))
    return start, _today(stem.removeprefix(start)), component


@cache
def _starts(known: Rows) -> Mapping[str, str]:
    """What names may begin with, the longest first, and the component that each names."""
    # peft wraps a model, or the pipeline around it.
    starts = {**dotted_starts(), _PEFT: "", "": "", **{_PEFT + start: one for start, one in dotted_starts().items()}}
    return {start: starts[start] for start in sorted(starts, key=len, reverse=True)}


def _place(stem: str, suffix: str, change: "Callable[[Tensor], Tensor] | None" = None, whole: Whole | None = None) -> Place:
    _, path, component = _located(stem)
    if component:
        return Place(component, path, suffix, change=change, stem=stem, whole=whole)
    found = claimants(path)
    return Place(found[0], path, suffix, "", found[1:], False, change, stem, whole=whole)


def _read_whole(header: Header, names: Sequence[str], stems: Sequence[str]) -> tuple[dict[str, Place], dict[str, str]]:
    """The places of what peft saves as it is and not as a change: ``modules_to_save``, trained biases and rows of tokens."""
    config = configuration(header) or {}
    kind = str(config.get("peft_type", ""))
    places: dict[str, Place] = {}
    leftovers: dict[str, str] = {}
    seen: set[Place] = set()
    for name in sorted(names, key=lambda name: _SAVED.search(name) is not None):  # what peft wrapped comes after
        if _ORIGINAL in name:
            continue  # the base's own
        place = _whole(config, _SAVED.sub("", name))
        if place is None or any(place.stem.startswith(f"{stem}.") for stem in stems):
            leftovers[name] = f"are of peft's {kind}, and no method here knows them so" if kind else _NOT_TOLD
        elif place not in seen:  # or it is the same again
            places[name] = place
            seen.add(place)
    return places, leftovers


def _whole(config: Mapping[str, Any], name: str) -> Place | None:
    """The place of a tensor that peft saves as it is; None where the configuration does not say that it was trained."""
    every = methods.known().values()
    if match := _ROWS.fullmatch(name):
        suffixes, indices = next((one.rows for one in every if one.rows), None), _indices(config, _located(match[1])[1])
        if suffixes is None or not indices:
            return None
        return replace(_place(match[1], suffixes[0]), whole=Whole("weight", indices, suffixes[1], tied=True))
    match, own = _OF_LAYER.fullmatch(name), next((one.whole for one in every if one.whole), None)
    if match is None or own is None:
        return None
    path, parameter = _located(match[1])[1], match[2]
    saved = config.get("modules_to_save")
    around = [*accumulate(path.split("."), lambda one, part: f"{one}.{part}")]
    trained = isinstance(saved, list) and any(one.endswith(str(end)) for end in saved for one in around)  # as peft has it
    if not trained and (parameter != "bias" or config.get("bias", "none") == "none"):
        return None
    whole = Whole(parameter, tied=trained and bool(config.get("ensure_weight_tying")))
    return replace(_place(match[1], own[parameter == "bias"]), whole=whole)


def _indices(config: Mapping[str, Any], path: str) -> tuple[int, ...]:
    """The tokens whose rows peft trained at a path; nothing where the configuration does not tell them."""
    told = config.get("token_indices") or config.get("trainable_token_indices")
    if isinstance(told, dict):
        told = next((one for key, one in told.items() if path == key or path.endswith(f".{key}")), None)
    valid = isinstance(told, list) and all(type(one) is int and one >= 0 for one in told)
    return tuple(told) if valid and isinstance(told, list) else ()


def _today(path: str) -> str:
    """The path of a module that older scripts of diffusers, and ComfyUI, call by the processor of its attention."""
    path = path.replace(".processor.", ".")
    if path.endswith(".to_out"):
        path += ".0"
    attention, _, layer = path.rpartition("self_attn.")
    return f"{attention}self_attn.{_OF_CLIP[layer]}" if attention and layer in _OF_CLIP else path


class _Configuration:
    """What a configuration of peft says of sites: that beside a file of peft, or those in the metadata of diffusers."""

    def __init__(self, config: Mapping[str, Any], where: str, problems: Sequence[str]) -> None:
        self.config = config
        self.where = where  # what errors call it
        self.problems = [*problems]
        self._patterns: dict[tuple[str, str], Patterns] = {}
        self._settings: dict[str, Mapping[str, Any]] = {}

    @classmethod
    def of(cls, header: Header, of_peft: bool) -> "_Configuration":
        """Read it. Raises UserError where a configuration is there and cannot be read."""
        own = configuration(header) if of_peft else None
        told, problems = (own, []) if own is not None else _in_metadata(header)
        if of_peft and not told:
            problems.append(f"{header.path}: no {_CONFIG} is beside it to tell alpha, so it is taken to be the rank")
        where = f"{header.path}: {_METADATA}" if own is None else str(header.path.parent / _CONFIG)
        return cls(told, where, problems)

    def alpha(self, start: str, path: str, rank: int) -> float | None:
        """The alpha of a site with which its scale is alpha / rank, as kohya's layout has it; None where none is told."""
        settings = self._of(start)
        if settings.get("peft_type") == _ADALORA:
            return _of_adalora(number(settings.get("lora_alpha")), number(settings.get("init_r")), rank)
        told = self._by_pattern(start, "alpha_pattern", path, settings.get("lora_alpha", settings.get("alpha")))
        alpha = number(told)
        if alpha is None:
            if told is not None:
                self._complain(f"alpha {told!r:.40} is no number, so it is taken to be the rank")
            return None
        return alpha * math.sqrt(rank) if settings.get("use_rslora") else alpha

    def scale(self, start: str, path: str) -> float:
        """What peft multiplies a site's change with where no tensor has the rank."""
        rank = number(self._by_pattern(start, "rank_pattern", path, self._of(start).get("r")))
        alpha = self.alpha(start, path, 1)
        if alpha is None or rank is None or rank <= 0:
            return 1.0
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def _of(self, start: str) -> Mapping[str, Any]:
        """The settings for names that begin so: diffusers puts the component before each key, unless there is but one."""
        if start not in self._settings:
            own = {key.removeprefix(start): value for key, value in self.config.items() if start and key.startswith(start)}
            self._settings[start] = own or self.config
        return self._settings[start]

    def _by_pattern(self, start: str, key: str, path: str, otherwise: Any) -> Any:
        """The value of the first pattern that means a module, as peft reads them: whole, or after a dot."""
        if (start, key) not in self._patterns:
            found = self._of(start).get(key)
            self._patterns[start, key] = Patterns(found if isinstance(found, dict) else {}, r"(.*\.)?", self.where)
            if found is not None and not isinstance(found, dict):
                self._complain(f"{key} is no table of patterns, so it is left out")
        return self._patterns[start, key].value(path, otherwise)

    def _complain(self, problem: str) -> None:
        told = f"{self.where}: {problem}"
        if told not in self.problems:
            self.problems.append(told)

    def warnings(self, path: Path) -> tuple[str, ...]:
        """What had to be assumed, and what a file of peft lacks."""
        found = [*self.problems]
        found += [
            f"{path}: its configuration has {name}, which is not computed here: it may do something else than in peft"
            for name in _NOT_COMPUTED
            if self.config.get(name)
        ]
        began = self.config.get("init_lora_weights")
        if isinstance(began, str) and began.startswith(_CHANGED):
            found.append(
                f"{path} began with {began}, which changed the weights of its base, and holds nothing of that; with peft's"
                " save_pretrained(..., path_initial_model_for_weight_conversion=...) it is right without"
            )
        return tuple(found)


def _of_adalora(alpha: float | None, initial: float | None, rank: int) -> float:
    """The alpha of a site of AdaLoRA: peft scales by the rank that sites had at first, without patterns or a root of it."""
    first = initial if initial is not None and initial > 0 else rank
    return (alpha if alpha is not None and alpha > 0 else rank) * rank / (first + 1e-5)


def _scaled(own: Sequence[_Tensor], config: _Configuration) -> dict[str, Place]:
    """The places of those tensors of a site of peft that take in its scale."""
    if not own[0].of_peft:
        return {}
    suffixes = {one.suffix for one in own}
    chosen = {suffix for method in methods.known().values() if (suffix := method.scaled_tensor(suffixes)) is not None}
    scale = config.scale(own[0].start, own[0].path)
    return {one.name: replace(one.place, change=_times(scale, one.change)) for one in own if one.suffix in chosen}


def _refuse_several(path: Path, found: Sequence[_Tensor]) -> None:
    """Raise UserError for a file with the tensors of several adapters, of which nothing says which one is meant."""
    adapters = sorted({one.adapter for one in found if one.adapter})
    if len(adapters) > 1:
        raise UserError(
            f"{path} holds {len(adapters)} adapters of peft, {', '.join(adapters)}: save one by itself, with peft's"
            " save_pretrained(folder, selected_adapters=[name])"
        )


def _told(config: Mapping[str, Any], path: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, float]:
    """What the methods read of a site in the configuration of peft."""
    found: dict[str, float] = {}
    for method in methods.known().values():
        found |= method.from_peft(config, path, shapes)
    return found


def _times(scale: float, change: "Callable[[Tensor], Tensor] | None") -> "Callable[[Tensor], Tensor]":
    def scaled(tensor: "Tensor") -> "Tensor":
        return (tensor if change is None else change(tensor)).float() * scale  # in halves the product would be rounded

    return scaled


def _alpha(header: Header, own: Sequence[_Tensor], config: _Configuration) -> float | None:
    """The alpha of a site with a rank, where the configuration tells it."""
    ranked = aliases().ranked
    ranks = [header.tensors[one.name].shape for one in own if one.suffix in ranked]
    rank = next((shape[0] for shape in ranks if shape), None)
    return None if rank is None else config.alpha(own[0].start, own[0].path, rank)


def configuration(header: Header) -> dict[str, Any] | None:
    """Read the configuration of peft beside a file.

    Args:
        header: Of the file.

    Returns:
        It; None where there is none.

    Raises:
        UserError: It is there and cannot be read.
    """
    beside = header.path.parent / _CONFIG
    return _json(beside) if beside.is_file() else None


def _in_metadata(header: Header) -> tuple[dict[str, Any], list[str]]:
    """The configurations that diffusers keeps in the metadata, by ``<component>.<name>``, and what is wrong with them."""
    try:
        found = json_value(header.metadata.get(_METADATA, "{}"))
    except ValueError:
        found = None
    if isinstance(found, dict):
        return found, []
    return {}, [f"{header.path}: its {_METADATA} cannot be read, so alpha is taken to be the rank"]


def _json(path: Path) -> dict[str, Any]:
    with refusing(f"{path} cannot be read"):
        found = json_value(_text(path))
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no configuration of peft")
    return found


def _text(path: Path) -> str:
    if path.stat().st_size > _LARGEST:
        raise UserError(f"{path} is larger than any configuration of peft ({_LARGEST:,} bytes)")
    return path.read_text("utf-8-sig")


def _form(layout: str, component: str, built: "Mapping[str, Adapter]") -> PeftForm:
    """The adapters of a component as peft keeps them. Raises UserError for what it cannot keep."""
    from ...core.adapter import Chain

    advice = f"the layout {layout!r} cannot say it; take the layout 'kohya'"
    several = next((path for path, adapter in built.items() if isinstance(adapter, Chain)), None)
    if several is not None:
        raise UserError(f"{component}.{several} carries several methods in one adapter, and {advice}")
    states = {path: adapter.state().keys() for path, adapter in built.items()}
    kinds = {one for keys in states.values() for one in methods.known().values() if one.recognizes(keys)}
    if len(kinds) != 1:
        named = ", ".join(sorted(kind.name for kind in kinds)) or "a method that is not known"
        raise UserError(f"{component} carries {named}, peft has one method in a file, and {advice}")
    kind = kinds.pop()
    form = kind.in_peft(built)
    if form is None:
        raise UserError(f"{component} carries {kind.name}, peft does not have it so, and {advice}")
    return form


def _config(component: str, form: PeftForm) -> dict[str, Any]:
    """The configuration of peft: what most sites have, and patterns for the others."""
    start = r"^(text_model\.)?" if families.role_of(component) == "text encoder" else "^"
    bare = {path: path.removeprefix(TEXT_MODEL) for path in form.sites}
    if not form.alpha:
        return {"target_modules": sorted(bare.values()), **form.options}
    ranks = {path: site.rank for path, site in form.sites.items()}
    alphas = {path: _plain(site.alpha) for path, site in form.sites.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    patterns = [
        {start + re.escape(bare[path]): value for path, value in values.items() if value != most}
        for values, most in ((ranks, rank), (alphas, alpha))
    ]
    return {
        "r": rank,
        form.alpha: alpha,
        "rank_pattern": patterns[0],
        "alpha_pattern": patterns[1],
        "target_modules": sorted(bare.values()),
        **form.options,
    }


def _plain(value: float) -> float | int:
    """A whole number as one, which configurations of peft usually have."""
    return int(value) if value.is_integer() else value


register(Diffusers())
register(Peft())
