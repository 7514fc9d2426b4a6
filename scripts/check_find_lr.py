"""Whether the learning rate that ``--find-lr`` suggests is near the best one of a fine grid of whole runs.

    python scripts/check_find_lr.py --output find-lr
    python scripts/check_find_lr.py --output find-lr --styles openmoji --steps 60 --batch-size 4 --span 2

For each sample style: the finder, then a whole run at each rate of a grid whose rates are a factor of the square root of 2
apart, ``--span`` times 2 to either side of what was suggested. Prints the loss on what is kept apart after each run. A best
rate that is more than a factor of two away, or stands at an end of the grid, ends the script with exit code 1. Writes
``figures.json`` and ``table.md``.
"""

import argparse
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts are no part of the package

from peft_diffusion import methods
from peft_diffusion.api import find_rates, train
from peft_diffusion.bases import embedded
from peft_diffusion.cli.console import TrainingConsole
from peft_diffusion.core.errors import UserError
from peft_diffusion.training import TrainConfig
from scripts.measuring import markdown_table, run, write_results

STYLES = ("openmoji", "twemoji", "fluent-flat")
ALLOWED = 2.0


@dataclass(frozen=True)
class Check:
    """The rate suggested, and the loss on what is kept apart after a whole run at each rate (infinite where it ran away)."""

    style: str
    suggested: float
    losses: dict[float, float]

    @property
    def best(self) -> float:
        return min(self.losses, key=lambda rate: self.losses[rate])

    @property
    def times(self) -> float:
        """The factor between the two rates, 1 or more."""
        return max(self.best / self.suggested, self.suggested / self.best)

    @property
    def good(self) -> bool:
        return self.times <= ALLOWED and self.best not in (min(self.losses), max(self.losses))


def config(style: str, arguments: argparse.Namespace, rate: float | None) -> TrainConfig:
    """A run on a style; at the preset's rate where none is given."""
    where = arguments.output / style
    return TrainConfig(
        folder=(embedded(f"styles/{style}"),),
        output=where / f"{style}.safetensors",
        run_dir=where / "run",
        method=arguments.method,
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        unet_lr=rate,
        keep="last",
        save_every=arguments.steps,
        preview_steps=0,
        overwrite=True,
        device=arguments.device,
    )


def loss_at(style: str, arguments: argparse.Namespace, rate: float) -> float:
    """The loss on what is kept apart after a whole run."""
    try:
        after = train(config(style, arguments, rate)).held_out_after
    except UserError as error:
        print(f"{style} at {rate:.2g}: {error}", file=sys.stderr)
        return math.inf
    return math.inf if after is None else after


def check(style: str, arguments: argparse.Namespace) -> Check:
    """Find a rate, and try those around it."""
    suggested = find_rates(config(style, arguments, None), observers=[TrainingConsole(Console(stderr=True))]).rates["unet"]
    places = range(-2 * arguments.span, 2 * arguments.span + 1)
    rates = [suggested * math.sqrt(2) ** place for place in places]
    return Check(style, suggested, {rate: loss_at(style, arguments, rate) for rate in rates})


def main() -> None:
    """Check every style that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--styles", nargs="+", default=STYLES, choices=STYLES)
    parser.add_argument("--method", default=methods.DEFAULT)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--span", type=int, default=3, help="doublings to either side of the suggested rate")
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    checks = [check(style, arguments) for style in arguments.styles]
    for one in checks:
        print(f"\n{one.style}: suggested {one.suggested:.2g}, best {one.best:.2g}, a factor of {one.times:.2f}")
        print(markdown_table(("rate", "loss after"), [[f"{rate:.2g}", f"{loss:.4f}"] for rate, loss in one.losses.items()]))
    rows = [[one.style, f"{one.suggested:.2g}", f"{one.best:.2g}", f"{one.times:.2f}"] for one in checks]
    table = markdown_table(("style", "suggested", "best of the grid", "factor"), rows)
    write_results(arguments.output, [asdict(one) for one in checks], table)
    if not all(one.good for one in checks):
        sys.exit(f"a suggested rate is more than a factor of {ALLOWED:g} from the best, or the grid does not reach it")


if __name__ == "__main__":
    run(main)
