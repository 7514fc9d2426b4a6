"""What each method learns of the sample styles, measured by ``peft-diffusion evaluate`` on drawings that no sample shows.

    python scripts/evaluate_styles.py --output evaluation
    python scripts/evaluate_styles.py --output methods --styles openmoji --methods lora dora loha lokr oft ia3 bitfit

For each sample style and method: trains an adapter with the defaults of ``peft-diffusion train`` (or takes the one in
``--adapters``), writes a folder of drawings of subjects that are not in the sample folder, evaluates the adapters on it, and
prints a table: the loss without and with the adapter, how often the judge names the style and has the subject, trained
parameters, the size of the file, processor time and the peak of the process's memory in training.

Training and measuring may be done apart, on two machines: ``--only-train`` first, then ``--adapters`` on what it wrote. The
real drawings come from npm (``pip install 'peft_diffusion[base]'``, and Node.js for npm). Writes ``figures.json``,
``table.md``, and for each style what ``evaluate`` writes.
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts are no part of the package

from peft_diffusion import methods
from peft_diffusion.api import train
from peft_diffusion.bases import embedded, load_base
from peft_diffusion.cli.console import TrainingConsole
from peft_diffusion.cli.progress import GenerationConsole
from peft_diffusion.evaluation.evaluate import evaluate
from peft_diffusion.evaluation.measured import Alone, Evaluation
from peft_diffusion.evaluation.settings import EvaluateConfig
from peft_diffusion.training import TrainConfig
from scripts.build_base.captions import with_article
from scripts.build_base.judge import Gallery, packed_galleries
from scripts.build_base.make_samples import HELD_OUT, SUBJECTS
from scripts.build_base.render import pack
from scripts.build_base.sources import CACHE, STYLES
from scripts.measuring import markdown_table, memory_words, peak_memory, run, size_words, write_results


@dataclass(frozen=True)
class Style:
    """A sample folder: its adapter's name, the icon set of its drawings, how its prompts begin, and its own word there."""

    name: str
    drawings: str
    words: str
    word: str


SAMPLES = (
    Style("openmoji", "openmoji", "openmoji emoji of", "openmoji"),
    Style("twemoji", "twemoji", "twemoji emoji of", "twemoji"),
    Style("fluent-flat", "fluent-emoji-flat", "fluent flat emoji of", "fluent"),
)
HEADINGS = (
    "style", "method", "loss, base", "loss, adapter", "falls by", "style named right", "subject told right", "trained",
    "file", "processor time", "peak memory",
)  # fmt: skip


def main() -> None:
    """Train, evaluate, print."""
    options, console = _options(), Console()
    options.output.mkdir(parents=True, exist_ok=True)
    pipe = load_base("icons", device=options.device)
    styles = [style for style in SAMPLES if style.name in options.styles]
    for style in styles if options.adapters is None else ():
        for method in options.methods:
            _train(style, method, pipe, options, console)
    if options.only_train:
        return
    if not options.data.exists():
        console.print("fetching and rendering the icon sets ...")
        pack(options.data, tuple(STYLES))
    galleries = packed_galleries(options.data, tuple({style.drawings for style in SAMPLES}))
    chosen = unseen_subjects(galleries, options.subjects)
    console.print(f"{len(chosen)} subjects that no sample folder shows, such as {', '.join(chosen[:12])}")
    rows: list[tuple[str, ...]] = []
    figures: dict[str, Any] = {}
    for style in styles:
        data = _folder(style, galleries[style.drawings], chosen, options.output)
        for method in options.methods:  # one by one, as some teach the base a word that others have too
            file = _file(style, method, options)
            found = _evaluated(file, style, data, pipe, options)
            console.print("\n".join([file.stem, *found.trust.lines()]))
            figures[file.stem] = found.plain()
            rows.append(_row(style, method, found.alone[0]))
        _report(rows, figures, options.output, console)  # after each, so that a run that is stopped has told something


def _evaluated(file: Path, style: Style, data: Path, pipe: Any, options: argparse.Namespace) -> Evaluation:
    """What an adapter does on drawings that it never saw."""
    config = EvaluateConfig(
        str(file),
        data=str(data),
        trained=str(embedded(f"styles/{style.name}")),
        strengths="0,1",
        seeds=1,
        prompts=options.subjects,
        pictures=max(2, options.subjects),
        steps=options.steps,
        device=options.device,
        output=options.output / "evaluated" / file.stem,
    )
    with GenerationConsole("evaluating") as bar:
        return evaluate(config, pipe=pipe, observers=[bar])


def unseen_subjects(galleries: dict[str, Gallery], count: int) -> list[str]:
    """Subjects that every set draws and no sample folder: the twelve that are looked at, and others at random."""
    shared = set.intersection(*(set(gallery.subjects) for gallery in galleries.values()))
    shared -= {name.replace("-", " ") for name in SUBJECTS}
    first = [name.replace("-", " ") for name in HELD_OUT if name.replace("-", " ") in shared]
    others = sorted(shared - set(first))
    return [*first, *random.Random(0).sample(others, max(0, min(len(others), count - len(first))))][:count]


def _folder(style: Style, gallery: Gallery, subjects: Sequence[str], output: Path) -> Path:
    """Write the drawings of some subjects, with captions."""
    folder = output / "unseen" / style.name
    folder.mkdir(parents=True, exist_ok=True)
    for number, subject in enumerate(subjects):
        picture = gallery.pixels[gallery.subjects.index(subject)].permute(1, 2, 0).numpy()
        Image.fromarray(picture).save(folder / f"{number:03}.png")
        (folder / f"{number:03}.txt").write_text(f"{style.words} {with_article(subject)}\n", encoding="utf-8")
    return folder


def _train(style: Style, method: str, pipe: Any, options: argparse.Namespace, console: Console) -> None:
    """Train an adapter; what it took is written beside it."""
    learned = methods.method(method)
    words: dict[str, Any] = {"components": ("text_encoder",)} if learned.initial_words() else {}
    if learned.new_words():
        words["option"] = (f"placeholders={style.word}", "initial=emoji", "vectors=8")
    elif words:
        words["steps"] = 600  # of a soft prompt: half of them leave half of the drawings in other styles
    file = _file(style, method, options)
    config = TrainConfig(
        (embedded(f"styles/{style.name}"),),
        output=file,
        run_dir=options.output / "runs" / f"{style.name}-{method}",
        method=method,
        device=options.device,
        preview_steps=0,
        overwrite=True,
        **words,
    )
    began = time.process_time()
    with peak_memory() as memory:
        train(config, pipe=pipe, observers=[TrainingConsole(console)])
    cost = {"seconds": time.process_time() - began, "memory": memory.get("peak")}
    file.with_suffix(".json").write_text(json.dumps(cost))


def _file(style: Style, method: str, options: argparse.Namespace) -> Path:
    folder: Path = options.adapters or options.output
    return folder / (f"{style.name}.safetensors" if method == TrainConfig.method else f"{style.name}-{method}.safetensors")


def _row(style: Style, method: str, one: Alone) -> tuple[str, ...]:
    cost_file = one.file.with_suffix(".json")
    cost = json.loads(cost_file.read_text()) if cost_file.exists() else {}
    at = {name: {strength: value.mean for strength, value in values.items()} for name, values in one.values.items()}
    named = at.get("named")
    return (
        style.name,
        method,
        f"{at['loss'][0.0]:.4f}",
        f"{at['loss'][1.0]:.4f}",
        f"{1 - at['loss'][1.0] / at['loss'][0.0]:.0%}",
        "-" if named is None else f"{named[1.0]:.0%} (base {named[0.0]:.0%})",
        f"{at['subject'][1.0]:.0%} (base {at['subject'][0.0]:.0%})",
        f"{one.parameters:,}",
        size_words(one.size),
        f"{cost['seconds']:.0f} s" if "seconds" in cost else "-",
        memory_words(cost.get("memory")),
    )


def _report(rows: Sequence[tuple[str, ...]], figures: dict[str, Any], output: Path, console: Console) -> None:
    table = Table(*HEADINGS)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    write_results(output, figures, markdown_table(HEADINGS, rows))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("evaluation"), help="folder for figures, sheets and adapters")
    parser.add_argument("--only-train", action="store_true", help="measure nothing: another run does, with --adapters")
    parser.add_argument("--adapters", type=Path, help="folder of what an earlier run trained, instead of training")
    parser.add_argument("--data", type=Path, default=CACHE / "drawings.zip", help="the packed drawings; made if missing")
    parser.add_argument("--styles", nargs="+", choices=[s.name for s in SAMPLES], default=[s.name for s in SAMPLES])
    parser.add_argument(
        "--methods", nargs="+", choices=list(methods.known()), default=[methods.DEFAULT], help="what to train with"
    )
    parser.add_argument("--subjects", type=int, default=100, help="how many subjects")
    parser.add_argument("--steps", type=int, default=25, help="denoising steps of a picture")
    parser.add_argument("--device", default="auto")
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
