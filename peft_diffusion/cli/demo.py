"""``peft-diffusion demo``: teach two sample styles, generate with each, blend them, and say where the pictures are."""

import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

from ..bases import embedded
from ..core.errors import UserError
from ..generation.recipe import check_folder
from ..generation.settings import BlendConfig, Choice, DemoConfig, GenerateConfig
from .commands import reads
from .progress import GenerationConsole
from .terminal import say

if TYPE_CHECKING:
    from ..bases.pipelines import Pipeline
    from ..generation import Adapters

# The sample folders, and how their captions begin; the base's own drawings are called by the first.
BASE_WORDS = "noto emoji of"
STYLES = {"openmoji": "openmoji emoji of", "twemoji": "twemoji emoji of"}
BLEND_WORDS = "emoji of"
# None of these is among the drawings that are learned from.
SUBJECTS = ("a red apple", "a cat", "a rocket", "a tulip", "a pizza", "a snowman", "a violin", "a ship")
BLENDED = ("a red apple", "a cat", "a rocket")


@reads(DemoConfig)
def demo(config: DemoConfig) -> None:
    """Teach two sample styles, generate with each and blend them.

    Takes five minutes on two CPU cores.
    """
    check_folder(config.output)
    for style in STYLES:
        _check_own(config.output, style)
    folders = {style: embedded(f"styles/{style}") for style in STYLES}
    files = {style: config.output / f"{style}.safetensors" for style in STYLES}
    say("Loading the base; the first time takes a while ...")
    from ..bases import load_base
    from ..generation import Adapters

    pipe = load_base(config.base, device=config.device)
    _train(pipe, config, folders, files)
    adapters = Adapters(pipe)
    for style, file in files.items():
        adapters.load(file, name=style)
    _draw_styles(adapters, config, config.output / "styles.png")
    _draw_blend(adapters, config, files, config.output / "blend.png")
    _tell(config, files)


def _check_own(output: Path, style: str) -> None:
    """Raise UserError where an adapter or a run is there that no demo has made: a demo replaces its own alone."""
    file, run = output / f"{style}.safetensors", output / "runs" / style
    try:
        told = tomllib.loads((run / "config.toml").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        told = {}
    # What _train says and nobody else does.
    own = told.get("preview_steps") == 0 and told.get("save_every") == told.get("steps")
    own = own and all(Path(str(told.get(key))).name == path.name for key, path in (("output", file), ("run_dir", run)))
    there = file if file.exists() else run
    if not own and (file.exists() or (run / "config.toml").exists()):
        raise UserError(f"{there} is there already, and no demo has made it; name another folder with --output, or move it")


def _train(pipe: "Pipeline", config: DemoConfig, folders: dict[str, Path], files: dict[str, Path]) -> None:
    from ..api import train
    from ..training import TrainConfig
    from .console import TrainingConsole

    for number, (style, folder) in enumerate(folders.items(), 1):
        say(f"\nStyle {number} of {len(folders)}: {style}, {config.steps} steps")
        run = TrainConfig(
            folder=(folder,),
            output=files[style],
            base=config.base,
            steps=config.steps,
            seed=config.seed,
            run_dir=config.output / "runs" / style,
            device=config.device,
            save_every=config.steps,
            preview_steps=0,
            overwrite=True,
        )
        with TrainingConsole() as console:
            train(run, pipe=pipe, observers=[console])


def _draw_styles(adapters: "Adapters", config: DemoConfig, path: Path) -> None:
    """A row without adapters and one for each style; columns are subjects."""
    from ..generation import recipe, sheet
    from ..generation.generate import cell_recipes
    from ..generation.sampler import Cell, paint

    rows = {"without an adapter": (BASE_WORDS, ""), **{style: (words, style) for style, words in STYLES.items()}}
    sampling = GenerateConfig(prompts=SUBJECTS, base=config.base, seed=config.seed, device=config.device)
    cells = [
        Cell(f"{words} {subject}", config.seed, {row: 1.0} if row else {})
        for words, row in rows.values()
        for subject in SUBJECTS
    ]
    with GenerationConsole("drawing the styles") as console:
        images = list(paint(adapters, cells, sampling, tell=console))
    told = cell_recipes(adapters, cells, sampling)
    drawn = sheet.grid(sheet.in_rows(images, len(SUBJECTS)), list(rows), SUBJECTS)
    recipe.write_sheet(path, drawn, sheet.in_rows(told, len(SUBJECTS)))


def _draw_blend(adapters: "Adapters", config: DemoConfig, files: dict[str, Path], path: Path) -> None:
    from ..generation import recipe
    from ..generation.blend import draw

    prompts = tuple(f"{BLEND_WORDS} {subject}" for subject in BLENDED)
    told = tuple(str(file) for file in files.values())
    sampling = BlendConfig(prompts=prompts, adapter=told, base=config.base, seed=config.seed, device=config.device)
    with GenerationConsole("drawing the blend") as console:
        drawn = draw(adapters, {style: Choice(file) for style, file in files.items()}, sampling, tell=console)
    recipe.write_sheet(path, drawn.sheet, drawn.recipes)


def _tell(config: DemoConfig, files: dict[str, Path]) -> None:
    output = config.output
    first, second = files.values()
    base = "" if config.base == DemoConfig.base else f" --base {config.base}"
    style = next(iter(STYLES.values()))
    say(f"""
Look at
  {output / "styles.png"}   the same subjects without an adapter and in each style
  {output / "blend.png"}    from all of one style to all of the other

Try next
  peft-diffusion generate "{style} a dragon" --adapter {first} --output dragon.png{base}
  peft-diffusion blend "{BLEND_WORDS} a dragon" --adapter {first} --adapter {second} --output dragons.png{base}
  peft-diffusion inspect {first} {second}
  peft-diffusion train FOLDER_OF_YOUR_PICTURES --output mine.safetensors{base}""")
