"""Compares the unseen loss that a sample style reaches in float32, float16 and bfloat16.

    python scripts/check_precision.py --device cuda

Trains the same adapter with each, on the embedded base, and prints the loss on pictures kept apart beside that of float32,
and how many steps were left out. Both halves are to be within 2%.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import get_args

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts are no part of the package

from peft_diffusion.api import train
from peft_diffusion.core.events import Event
from peft_diffusion.training import TrainConfig
from peft_diffusion.training.events import StepLeftOut
from peft_diffusion.training.settings.choices import Precision
from scripts.measuring import markdown_table, run

STYLES = Path(__file__).resolve().parent.parent / "samples" / "styles"


def main() -> None:
    """Train with each precision."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--style", default="openmoji")
    parser.add_argument("--steps", type=int, default=300)
    arguments = parser.parse_args()
    found: dict[str, tuple[float, int]] = {}
    for precision in [one for one in get_args(Precision) if one != "auto"]:
        left_out: list[Event] = []

        def watch(event: Event, seen: list[Event] = left_out) -> None:
            seen.extend([event] if isinstance(event, StepLeftOut) else [])

        with tempfile.TemporaryDirectory() as folder:
            config = TrainConfig(
                STYLES / arguments.style, output=Path(folder) / "a.safetensors", run_dir=Path(folder) / "run",
                steps=arguments.steps, device=arguments.device, precision=precision, preview_steps=0, held_out=0.2,
            )  # fmt: skip
            loss = train(config, observers=[watch]).held_out_after
        assert loss is not None  # a share is kept apart
        found[precision] = loss, len(left_out)
        print(f"{precision}: {loss:.5f}, {len(left_out)} steps left out", flush=True)
    whole = found["float32"][0]
    rows = [[name, f"{loss:.5f}", f"{loss / whole - 1:+.2%}", str(count)] for name, (loss, count) in found.items()]
    print(markdown_table(["precision", "unseen loss", "beside float32", "steps left out"], rows))
    worst = max(abs(loss / whole - 1) for loss, _ in found.values())
    print(f"within 2%: {'yes' if worst <= 0.02 else 'no'}")


if __name__ == "__main__":
    run(main)
