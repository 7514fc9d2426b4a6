"""``split`` and ``join``: an adapter file in parts, and parts as one file. No number changes."""

from collections.abc import Sequence
from itertools import islice

from ..bases.base import Skeleton
from ..core.errors import UserError, did_you_mean
from ..core.events import Ended, Observer
from ..core.files import at_home
from ..core.targets import blocks
from ..methods.shared.learned_vectors import LearnedVectors
from .merging import holders, united
from .results import Adapters, Made, joined_spec, kept_metadata, layout_of, write_changed
from .sources import Where, file_dtype, open_sources
from .tool_settings import JoinConfig, SplitConfig
from .watch import watched


def split(config: SplitConfig, *, observers: Sequence[Observer] = ()) -> tuple[Made, ...]:
    """Write the parts of an adapter file, each as a file of its own.

    Args:
        config: Which file, and what its parts are.
        observers: Are told how far it is, and of each part what was made.

    Returns:
        The files, in the order of the parts.

    Raises:
        UserError: The file cannot be read, has no such part, or a part cannot be written.
    """
    with watched(observers) as watch:
        config.check()
        (source,), bones = open_sources([config.plan], config.base, watch.tell)
        parts: dict[str, list[Where]] = {}
        for where in source.sites:
            parts.setdefault(_part(bones, where, config.by), []).append(where)
        for name in config.parts:
            if name not in parts:
                there = ", ".join(parts)
                raise UserError(f"{source.path} has no part {name!r}; it has: {there}{did_you_mean(name, parts)}")
        found = []
        chosen = {name: sites for name, sites in parts.items() if not config.parts or name in config.parts}
        ticked = watch.each("writing sites", [where for sites in chosen.values() for where in sites])
        for name, sites in chosen.items():
            path = at_home(config.output) / f"{source.name}-{name}.safetensors"
            made = Adapters(bones, source.dtype, path)
            for where in islice(ticked, len(sites)):
                made.add(*where, source.adapter(where))
            write_changed(made, source.plan, path, config.to, f"{name} of {source.path.name}")
            found.append(watch.made(path, made.count, last=False))
        next(ticked, None)  # all are done
        watch.tell(Ended("finished"))
        return tuple(found)


def _part(bones: Skeleton, where: Where, by: str) -> str:
    component, path = where
    if by == "component":
        return component
    own = blocks(bones.parts[component])
    return f"{component}.{own.names[own.of(path)]}"


def join(config: JoinConfig, *, observers: Sequence[Observer] = ()) -> Made:
    """Write one file of several that change different sites; learned words of several may sit at one embedding.

    Args:
        config: Which files.
        observers: Are told how far it is, and last of all what was made.

    Returns:
        What was made.

    Raises:
        UserError: A file cannot be read or written, or two change one site.
    """
    with watched(observers) as watch:
        config.check()
        sources, bones = open_sources(config.plans, config.base, watch.tell)
        path, plans = at_home(config.output), [one.plan for one in sources]
        made = Adapters(bones, file_dtype(sources, config.dtype), path)
        for where, own in watch.each("writing sites", holders(sources).items()):
            adapters = [one.adapter(where) for one in own]
            words = [one for one in adapters if isinstance(one, LearnedVectors)]
            if len(adapters) > 1 and len(words) < len(adapters):
                names = " and ".join(str(one.path) for one in own)
                raise UserError(f"{names} both change {'.'.join(where)}; merge them, which adds what they do there")
            made.add(*where, adapters[0] if len(adapters) == 1 else united(where, own, words))
        told = {"ss_training_comment": f"joined from {', '.join(one.path.name for one in sources)}"}
        spec = joined_spec(plans, bones, made, path.stem)
        made.write(
            path,
            config.to or layout_of(max(plans, key=lambda one: len(one.header.tensors))),
            spec,
            {**kept_metadata(plans), **told},
        )
        return watch.made(path, made.count)
