"""``peft-diffusion inspect``: tell what an adapter file holds, from its header alone."""

import itertools
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import UserError
from ..core.files import refuse_overlaps
from ..core.wording import number_of
from ..formats import Inspection, Plan, composition, plan
from ..formats import inspect as read
from ..formats.container import title
from ..formats.origin import NOT_RUN
from ..formats.planning import by_reason, listed, refuse_leftovers
from ..formats.spec import missing_plugins
from ..generation.compatibility import Compatibility, compare
from ..generation.settings import InspectConfig
from .commands import reads
from .composed import show_compositions
from .terminal import say

if TYPE_CHECKING:
    from ..tools.norms import Norm
    from ..tools.verify import Verified

_SHOWN_TAGS = 20

# What of a training is shown, where the file tells it.
_TRAINING = {
    "images": "images",
    "tokens": "tokens",
    "steps_done": "steps",
    "batch_size": "batch size",
    "unet_lr": "learning rate",
    "lr": "learning rate",
    "text_encoder_lr": "text encoder's learning rate",
    "held_out_loss": "held-out loss",
    "seconds": "seconds",
    "created": "created",
    "finished_at": "finished",
}


@reads(InspectConfig)
def inspect(config: InspectConfig) -> None:
    """Tell what an adapter file holds, and whether two fit together.

    Only the headers are read, but for --norms, --plot and --verify: nothing is loaded, and no base is needed.
    """
    told = [(path, composition.told(path)) for path in config.files]
    composed = [one for _, one in told if one is not None]
    if composed and (config.norms or config.plot is not None or config.verify):
        raise UserError(f"{composed[0].path} composes adapters; --norms, --plot and --verify look at these themselves")
    plans = [plan(path) for path, one in told if one is None]
    found = [read(one) for one in plans]
    measured = _measured(config, plans)
    verified = _verified(config, plans)
    fits = {pair: compare(*pair_of) for pair, pair_of in _pairs(found).items()}
    if config.json:
        files = [_plain(one) | _plain_norms(measured.get(one.path)) | _plain_verified(verified, one) for one in found]
        files += [{**asdict(one), "path": str(one.path)} for one in composed]
        say(json.dumps({"files": files, "fits": [_plain_fit(*item) for item in fits.items()]}, indent=2))
    else:
        _show(found, fits)
        show_compositions(composed)
        for path, norms in measured.items() if config.norms else ():
            _show_norms(path, norms)
        for path, several in verified.items():
            say(f"{path} as other programs read it:")
            for program in several:
                say(f"  {program.line()}")
    for one in found if config.strict else ():
        refuse_leftovers(one.path, one.leftovers)


def _verified(config: InspectConfig, plans: list[Plan]) -> dict[Path, "tuple[Verified, ...]"]:
    """What other programs make of the files, where that was asked for."""
    if not config.verify:
        return {}
    from ..tools.verify import verify  # which brings torch

    return {one.path: verify(one, base=config.base) for one in plans}


def _plain_verified(verified: Mapping[Path, "tuple[Verified, ...]"], found: Inspection) -> dict[str, Any]:
    return {"verified": [asdict(one) for one in verified[found.path]]} if found.path in verified else {}


def _measured(config: InspectConfig, plans: list[Plan]) -> dict[Path, "tuple[Norm, ...]"]:
    """The norms that were asked for, by file; the plot of them is drawn."""
    if not config.norms and config.plot is None:
        return {}
    from ..tools.norms import draw, norms

    if config.plot is not None:
        refuse_overlaps([("--plot", config.plot)], [("the adapter file", plans[0].path)])
    found = {one.path: norms(one, config.base) for one in plans}
    if config.plot is not None:
        draw(config.plot, title(plans[0].path), found[plans[0].path])
    return found


def _show_norms(path: Path, norms: "tuple[Norm, ...]") -> None:
    from rich.table import Table
    from rich.text import Text

    from .screen import Screen

    table = Table(title=Text(f"norms of {path}", style="bold"), title_justify="left")
    for column, side in (("site", "left"), ("method", "left"), ("weight", "right"), ("bias", "right")):
        table.add_column(column, justify="right" if side == "right" else "left", overflow="fold")
    for one in norms:
        weight = one.note if one.weight is None else f"{one.weight:.4g}"
        bias = "" if one.bias is None else f"{one.bias:.4g}"
        table.add_row(Text(f"{one.component}.{one.site}"), ", ".join(one.methods), Text(weight), bias)
    Screen().print(table)


def _plain_norms(norms: "tuple[Norm, ...] | None") -> dict[str, Any]:
    return {} if norms is None else {"norms": [asdict(one) for one in norms]}


def _pairs(found: list[Inspection]) -> dict[tuple[str, str], tuple[Inspection, Inspection]]:
    return {(str(a.path), str(b.path)): (a, b) for a, b in itertools.combinations(found, 2)}


def _show(found: list[Inspection], fits: Mapping[tuple[str, str], Compatibility]) -> None:
    from rich.text import Text

    from .screen import Screen

    console = Screen()
    for one in found:
        console.labelled(str(one.path), _rows(one))
    words = {"yes": "fit together", "no": "do not fit together", "unknown": "may fit together; the files do not settle it"}
    styles = {"yes": "green", "no": "red", "unknown": "yellow"}
    for (first, second), result in fits.items():
        console.print(Text(f"{first} and {second} {words[result.verdict]}", style=styles[result.verdict]), soft_wrap=True)
        for reason in result.reasons:
            console.print(Text(f"  {reason}"), soft_wrap=True)


def _rows(found: Inspection) -> list[tuple[str, str]]:
    """Labels and values of what the file tells; what it does not tell is left out, or said to be missing."""
    rows = [
        *_methods(found),
        ("layout", ", ".join(found.layouts)),
        (
            "sites",
            ", ".join(f"{component} {count}{_several(found, component)}" for component, count in found.components.items()),
        ),
        ("target", _targets(found)),
        ("made for", _origin(found)),
        ("base", _base(found)),
        ("triggers", _triggers(found)),
        ("tags", _tags(found)),
        ("training", _training(found)),
        ("size", f"{found.size:,} bytes, {found.parameters:,} parameters in {', '.join(found.dtypes)}"),
        ("sha256", found.sha256),
        ("hashes", _hashes(found)),
    ]
    if found.spec is None:
        rows.append(("written by", f"another program: there is no peft_diffusion metadata{_network(found)}"))
    elif found.spec.title:
        rows.insert(0, ("title", found.spec.title))
    for reason, names in by_reason(found.leftovers).items():
        rows.append(("unknown", listed(reason, names)))
    rows += [("warning", warning) for warning in found.warnings]
    return [(label, value) for label, value in rows if value]


def _methods(found: Inspection) -> list[tuple[str, str]]:
    """A line for each method, with the hyper-parameters that its tensors tell, and those that only the spec does."""
    rows = []
    for method, values in found.hyper_parameters.items():
        told = [f"{name.replace('_', ' ')} {_counts(counts)}" for name, counts in values.items()]
        rows.append(("method", f"{method}: {', '.join(told)}" if told else method))
    for component, several in found.spec.methods.items() if found.spec else ():
        for one in several:
            name, values = str(one.get("method")), found.hyper_parameters.get(str(one.get("method")), {})
            left = [
                key
                for key in one
                if key not in ("method", "target", "ids", *values) and one[key] not in (None, False, 0, "")
            ]
            if found.spec and name in missing_plugins(found.spec):
                rows.append(("method", f"{name}: not known here; it comes with --plugin {one['plugin']}"))
            if left:
                options = ", ".join(f"{key.replace('_', ' ')} {_short(one[key])}" for key in left)
                rows.append(("options", f"{component} {name}: {options}"))
    return list(dict.fromkeys(rows)) or [("method", "none that is known here")]


def _network(found: Inspection) -> str:
    """What another program says of the method."""
    if found.network is None:
        return ""
    args = "".join(f", {name}={value}" for name, value in found.network.args.items())
    return f"; it names {found.network.module}{args}"


def _counts(values: Mapping[float, int]) -> str:
    """A value that all sites have, or each with the number of its sites."""
    if len(values) == 1:
        return _value(next(iter(values)))
    return ", ".join(f"{_value(value)} ({number_of(count, 'site')})" for value, count in sorted(values.items()))


def _value(value: float) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}"


def _targets(found: Inspection) -> str:
    if found.spec is None:
        return ""
    pairs = [(component, method) for component, several in found.spec.methods.items() for method in several]
    return ", ".join(f"{component} {method['target']}" for component, method in pairs if "target" in method)


def _base(found: Inspection) -> str:
    base = found.base
    if not base:
        return "not told"
    details = [base[key] for key in ("family", "architecture", "prediction_type") if key in base]
    details += [f"{base['resolution']} pixels"] if "resolution" in base else []
    details += [f"fingerprint {base['fingerprint']}"] if "fingerprint" in base else []
    return base.get("name", "unnamed") + (f" ({', '.join(details)})" if details else "")


def _several(found: Inspection, component: str) -> str:
    """The methods of a component's sites, where the file has several."""
    own = found.methods_by_component.get(component, {})
    return f" ({', '.join(f'{name} {count}' for name, count in own.items())})" if len(found.methods) > 1 else ""


def _origin(found: Inspection) -> str:
    one = found.origin
    if not one.name:
        return ""
    runs = "; this package does not run that" if one.name in NOT_RUN else ""
    other = f"; its tensors are named as those of {one.other}" if one.other else ""
    return f"{one.name}, told by {one.why}{other}{runs}"


def _triggers(found: Inspection) -> str:
    return ", ".join(found.triggers) or ("none" if found.spec is not None else "")


def _tags(found: Inspection) -> str:
    """The most frequent tags of its captions."""
    shown = [f"{tag} {count}" for tag, count in itertools.islice(found.tags.items(), _SHOWN_TAGS)]
    more = len(found.tags) - len(shown)
    return ", ".join(shown) + (f", and {more} more" if more > 0 else "")


def _hashes(found: Inspection) -> str:
    one = found.hashes
    told = f"; its metadata say {one.told}, so the tensors were changed since" if one.told not in ("", one.data) else ""
    legacy = f", legacy {one.legacy}" if one.legacy else ""
    return f"AutoV2 {one.autov2}, of the tensors (A1111, kohya) {one.data}{told}{legacy}"


def _training(found: Inspection) -> str:
    if found.spec is not None:
        told = found.spec.training
        return ", ".join(f"{label} {_short(told[key])}" for key, label in _TRAINING.items() if told.get(key) is not None)
    told = found.metadata
    keys = {"ss_num_train_images": "images", "ss_steps": "steps", "ss_learning_rate": "learning rate"}
    return ", ".join(f"{label} {told[key]}" for key, label in keys.items() if key in told)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _plain(found: Inspection) -> dict[str, Any]:
    """An inspection as JSON values."""
    spec = json.loads(found.spec.to_json()) if found.spec is not None else None
    return {
        "path": str(found.path),
        "size": found.size,
        "sha256": found.sha256,
        "layouts": list(found.layouts),
        "methods": list(found.methods),
        "components": dict(found.components),
        "methods_by_component": {name: dict(own) for name, own in found.methods_by_component.items()},
        "made_for": asdict(found.origin),
        "triggers": list(found.triggers),
        "tags": dict(found.tags),
        "hashes": asdict(found.hashes),
        "hyper_parameters": {
            method: {name: {_value(value): count for value, count in counts.items()} for name, counts in values.items()}
            for method, values in found.hyper_parameters.items()
        },
        "network": asdict(found.network) if found.network else None,
        "ranks": {str(rank): count for rank, count in found.ranks.items()},
        "alphas": {str(alpha): count for alpha, count in found.alphas.items()},
        "dtypes": dict(found.dtypes),
        "parameters": found.parameters,
        "spec": spec,
        "metadata": {key: value for key, value in found.metadata.items() if key != "peft_diffusion"},
        "sites": {site: {suffix: list(shape) for suffix, shape in tensors.items()} for site, tensors in found.sites.items()},
        "unknown": list(found.unknown),
        "leftovers": dict(found.leftovers),
        "warnings": list(found.warnings),
    }


def _plain_fit(pair: tuple[str, str], result: Compatibility) -> dict[str, Any]:
    return {"files": list(pair), "verdict": result.verdict, "reasons": list(result.reasons)}
