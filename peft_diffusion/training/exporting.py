"""``runs export``: the adapter in a checkpoint of a run, as an adapter file."""

import shlex
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import formats
from ..bases import describe, load_base, load_lm
from ..bases.base import Base
from ..bases.words import teach
from ..core import site
from ..core.arena import Arena
from ..core.errors import UserError
from ..core.settings import Settings, pick, portable, settings_of
from ..formats.file import DTYPES
from .attachment import NAME, attach, selected_components, spec_of, trained, triggers, with_words
from .loop.optimizers import OPTIMIZERS
from .record import checkpoint as checkpoints
from .record import run_record
from .record.checkpoint import Checkpoint
from .record.run_folder import RunFolder, check_output
from .settings.export import ExportConfig, layout_of_step, of_step
from .settings.pictures import ResolvedConfig, block_rates
from .settings.placements import blocks
from .settings.resumption import FILES, WEIGHED
from .settings.text import ResolvedTextConfig


def export(config: ExportConfig) -> Path:
    """Write the adapter of a checkpoint as an adapter file: that which the run would have given at that step.

    The base is loaded, as the shapes of an adapter are those of its layers; pictures and captions are not needed.

    Args:
        config: Which checkpoint, and where to.

    Returns:
        The file.

    Raises:
        UserError: There is no such checkpoint, the base is another one, or the file cannot be written.
    """
    found = _checkpoint(config)
    run = _settings_of(found, config.run)
    output = config.output or Path(of_step(run.output, found.state.step))
    check_output(output, overwrite=config.overwrite)
    base = _base(run, config.base)
    info = describe(base)
    if info.fingerprint != found.origin.base:
        raise UserError(
            f"{config.run} had another base ({found.origin.base}) than {info.name} ({info.fingerprint}); name it with --base"
        )
    placed = with_words(base, blocks(run))
    parts = selected_components(base, run.components)
    rates = {} if isinstance(run, ResolvedTextConfig) else block_rates(run.block_lr)
    arena = Arena(attach(parts, placed, run.seed, lambda _: 1.0, rates).groups)
    try:
        teach(base)
        arena.load(_given(run, arena, found.state.tensors))
        step, measured = found.state.step, found.measured or {}
        losses = trained(step, found.seconds, measured.get(0), found.held_out)
        words = triggers(getattr(run, "trigger", ""), placed)
        spec = spec_of(parts, placed, asdict(info), words, portable(run) | dict(found.training) | losses, output.stem)
        own = layout_of_step(run.output, run.save_as) if config.output is None else run.save_as
        layout = config.save_as or own
        dtype = config.save_dtype or run.save_dtype
        formats.save(output, parts, NAME, spec, layout=layout, dtype=DTYPES[dtype])
    finally:
        for part in parts.values():
            site.detach(part, NAME)
    return output


def _checkpoint(config: ExportConfig) -> Checkpoint:
    """The checkpoint that is meant. Raises UserError where there is none, or it cannot be read."""
    if config.run.is_file():
        found = checkpoints.read(config.run)
        if found is None:
            raise UserError(f"{config.run} is no checkpoint of a run, or is damaged")
        if config.step not in (None, found.state.step):
            raise UserError(f"{config.run} is of step {found.state.step}, not {config.step}; name the run folder")
        return found
    folder = RunFolder(config.run)
    if not folder.holds_a_run():
        raise UserError(f"{config.run} is no run folder; name one, such as runs/NAME, or a checkpoint file")
    there = folder.steps()
    step = config.step if config.step is not None else max(there, default=None)
    if step not in there:
        kept = f"those kept are of the steps {', '.join(map(str, there))}" if there else "none is kept"
        raise UserError(f"{config.run} has no checkpoint{'' if step is None else f' of step {step}'}; {kept}")
    found = folder.at(step)
    if found is None:
        raise UserError(f"the checkpoint of step {step} in {config.run} is damaged, or of another version")
    return found


def _settings_of(found: Checkpoint, where: Path) -> ResolvedConfig | ResolvedTextConfig:
    """The settings of the run. Raises UserError where this version does not know them."""
    told: Mapping[str, Any] = found.origin.config
    if told.get(FILES, {}).get(WEIGHED):
        raise UserError(f"{where} is of a run that weighs adapters, and has none to export{_ended_at(found, where)}")
    known = {**told, "resume": False, "overwrite": False, "asked": {}, "derived": {}}
    try:
        if "folder" in told:
            return pick(ResolvedConfig, _defaults(ResolvedConfig), known)
        return pick(ResolvedTextConfig, _defaults(ResolvedTextConfig), known)
    except (TypeError, UserError) as error:
        raise UserError(f"{where} holds settings that this version does not know: {error}") from None


def _ended_at(found: Checkpoint, where: Path) -> str:
    """How a run that weighs adapters gives its file at a step, where the run folder can be told."""
    run = RunFolder(where.parent.parent if where.is_file() else where)
    step = f"--resume --steps {found.state.step}"
    if not run.holds_a_run():  # the checkpoint lies elsewhere now
        return f"; its run gives its file at that step with {step}"
    settings = shlex.quote(str(run.path / run_record.CONFIG))
    newest = max(run.steps(), default=found.state.step)
    if newest > found.state.step:
        step = f"--resume --steps {newest}"  # one that it has passed has no file any more
    return f"; to have its file of step {newest}: peft-diffusion compose train --config {settings} {step}"


def _defaults(kind: type[Settings]) -> dict[str, Any]:
    """What a run of an older version went by where it was told nothing."""
    return {one.name: one.default for one in settings_of(kind)}


def _base(run: ResolvedConfig | ResolvedTextConfig, named: str | None) -> Base:
    source = named or run.base
    if isinstance(run, ResolvedTextConfig):
        return load_lm(source, device="cpu", dtype=run.precision)
    pipe: Base = load_base(source, device="cpu", dtype=run.precision, prediction=run.prediction)
    return pipe


def _given(run: ResolvedConfig | ResolvedTextConfig, arena: Arena, tensors: Mapping[str, Tensor]) -> Tensor:
    """The weights that the run gives in a state: the average, the optimizer's own, or the parameters."""
    if "average" in tensors:
        return tensors["average"]
    ones = dict.fromkeys(arena.groups, 1.0)
    own = OPTIMIZERS[run.optimizer](arena, ones, ones, False).final(tensors["parameters"], tensors)
    return tensors["parameters"] if own is None else own
