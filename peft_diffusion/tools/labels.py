"""``rename-trigger`` and ``metadata``: what an adapter file says of itself."""

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ..core.errors import UserError, did_you_mean
from ..core.events import Noted, Observer
from ..core.files import at_home
from ..formats import container
from ..formats.pictures import is_picture
from ..formats.spec import KEY, Spec
from ..methods.shared.learned_vectors import LearnedVectors
from .results import Adapters, Made, joined_spec, kept_metadata, layout_of
from .sources import open_sources
from .tool_settings import RenameTriggerConfig
from .watch import watched


def rename_trigger(config: RenameTriggerConfig, *, observers: Sequence[Observer] = ()) -> Made:
    """Give a word of an adapter another name: a trigger that its file tells, and a learned word itself.

    A learned word is called by its new name afterwards. What a LoRA answers to is in its weights, and stays: there only what
    the file says changes.

    Args:
        config: Which file, and the words.
        observers: Are told what changed, and last of all what was made.

    Returns:
        What was made.

    Raises:
        UserError: The file cannot be read or written, has no such word, or has the new one already.
    """
    with watched(observers) as watch:
        config.check()
        (source,), bones = open_sources([config.plan], config.base, watch.tell)
        path = at_home(config.output)
        made, learned = Adapters(bones, source.dtype, path), 0
        for where in watch.each("reading sites", source.sites):
            adapter = source.adapter(where)
            if isinstance(adapter, LearnedVectors) and config.old in adapter.words:
                adapter, learned = _renamed(adapter, config), learned + 1
            made.add(*where, adapter)
        spec = joined_spec([source.plan], bones, made, source.name)
        _refuse_unknown(spec, learned, _words(made), config)
        if not learned:
            watch.tell(Noted(f"{config.old!r} is no learned word: the adapter still answers to it, whatever the file says"))
        triggers = tuple(config.new if one == config.old else one for one in spec.triggers)
        made.write(path, layout_of(source.plan), _with(spec, triggers, config), kept_metadata([source.plan], network=True))
        return watch.made(path, made.count)


def _words(made: Adapters) -> list[str]:
    """The learned words of a file."""
    every = (one for own in made.made.values() for one in own.values())
    return list(dict.fromkeys(word for one in every if isinstance(one, LearnedVectors) for word in one.words if word))


def _refuse_unknown(spec: Spec, learned: int, words: Sequence[str], config: RenameTriggerConfig) -> None:
    if config.new in spec.triggers:
        raise UserError(f"{config.file} has the word {config.new!r} already")
    if config.old not in spec.triggers and not learned:
        there = list(dict.fromkeys((*spec.triggers, *words)))
        near = did_you_mean(config.old, there)
        raise UserError(f"{config.file} has no word {config.old!r}; it has: {', '.join(there) or 'none'}{near}")


def _renamed(adapter: LearnedVectors, config: RenameTriggerConfig) -> LearnedVectors:
    if config.new in adapter.words:
        raise UserError(f"{config.file} has the word {config.new!r} already")
    words = {config.new if word == config.old else word: ids for word, ids in adapter.words.items()}
    return type(adapter)(adapter.vectors.detach(), words)


def _with(spec: Spec, triggers: tuple[str, ...], config: RenameTriggerConfig) -> Spec:
    """The spec with the word renamed where methods name placeholders too."""

    def entry(one: Mapping[str, object]) -> Mapping[str, object]:
        names = one.get("placeholders")
        if not isinstance(names, str):
            return one
        renamed = [config.new if name.strip() == config.old else name.strip() for name in names.split(",")]
        return {**one, "placeholders": ",".join(renamed)}

    methods = {component: tuple(entry(one) for one in several) for component, several in spec.methods.items()}
    return replace(spec, methods=methods, triggers=triggers)


def metadata(path: str | Path) -> Mapping[str, str]:
    """Read the metadata of a safetensors file.

    Args:
        path: The file, or a folder of peft or diffusers.

    Returns:
        Its entries by key.

    Raises:
        UserError: It cannot be read.
    """
    return _header(path).metadata


def set_metadata(path: str | Path, entries: Mapping[str, str], *, output: str | Path | None = None) -> None:
    """Add or replace entries of the metadata of a safetensors file. No byte of its tensors changes.

    Args:
        path: The file.
        entries: By key.
        output: The file to write; None: the same, written aside and then renamed.

    Raises:
        UserError: It cannot be read or written, or would not be understood any more.
    """
    header = _header(path)
    if KEY in entries:
        Spec.from_metadata(entries, f"the value of {KEY}")
    container.rewrite(header, {**header.metadata, **entries}, _target(header.path, output))


def remove_metadata(path: str | Path, keys: Iterable[str], *, output: str | Path | None = None) -> None:
    """Remove entries of the metadata of a safetensors file. No byte of its tensors changes.

    Args:
        path: The file.
        keys: Which; one that ends in ``*`` is all that begin so.
        output: The file to write; None: the same, written aside and then renamed.

    Raises:
        UserError: There is no such entry, or the file cannot be read or written.
    """
    header = _header(path)
    gone: set[str] = set()
    for key in keys:
        found = {name for name in header.metadata if name == key or (key.endswith("*") and name.startswith(key[:-1]))}
        if not found:
            raise UserError(f"{header.path} has no entry {key!r}{did_you_mean(key, header.metadata)}")
        gone |= found
    container.rewrite(
        header, {key: value for key, value in header.metadata.items() if key not in gone}, _target(header.path, output)
    )


def _header(path: str | Path) -> container.Header:
    """The header of a file. Raises UserError where such files have no metadata, with what to do."""
    file = container.adapter_file(at_home(Path(path)))
    if container.is_pickle(file) or is_picture(file):
        kind = "a picture that keeps an embedding" if is_picture(file) else "a file of torch, of tensors by name,"
        named = shlex.quote(str(container.existing(file)))
        raise UserError(
            f"{file} is {kind} and has no metadata, which safetensors files have. What it holds is told by: peft-diffusion"
            f" inspect {named}; one that has some is made of it by: peft-diffusion convert {named}"
            f" {shlex.quote(str(file.with_suffix('.safetensors')))}"
        )
    return container.read_header(file)


def _target(file: Path, output: str | Path | None) -> Path:
    return file if output is None else at_home(Path(output))
