"""What it costs to look around: importing the package and asking commands for help, beside programs that people know.

    python scripts/benchmark_start.py

Each command runs several times in a process of its own. Told are seconds of processor (user and system), the least and the
median of all runs: other work on the machine lengthens them less than it lengthens the time on the clock. Modules are
compiled once before, as an installation does.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts are no part of the package

from peft_diffusion.core.errors import UserError
from scripts.measuring import markdown_table, run

ROOT = Path(__file__).resolve().parent.parent  # where -m finds the package, also where it is not installed
HELP = {
    "Python alone": ["-c", "pass"],
    "import peft_diffusion": ["-c", "import peft_diffusion"],
    "peft-diffusion --help": ["-m", "peft_diffusion", "--help"],
    "peft-diffusion train --help": ["-m", "peft_diffusion", "train", "--help"],
    "peft-diffusion generate --help": ["-m", "peft_diffusion", "generate", "--help"],
    "diffusers-cli --help": ["-m", "diffusers.commands.diffusers_cli", "--help"],
    "accelerate launch --help": ["-m", "accelerate.commands.accelerate_cli", "launch", "--help"],
    "import diffusers, peft": ["-c", "from diffusers import StableDiffusionPipeline; import peft"],
}


def seconds(arguments: list[str], compiled: str) -> float:
    """Seconds of processor that Python takes with these arguments; modules are compiled into a folder of their own."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    before = os.times()
    ran = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True, text=True, cwd=ROOT, env=environment | {"PYTHONPYCACHEPREFIX": compiled},
    )  # fmt: skip
    after = os.times()
    if ran.returncode:
        last = (ran.stderr.strip() or "it says nothing").splitlines()[-1]
        raise UserError(f"python {' '.join(arguments)} cannot be measured: {last}; pip install what it lacks")
    return after.children_user + after.children_system - before.children_user - before.children_system


def main() -> None:
    """The table of all commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7, help="how often each command runs")
    options = parser.parse_args()
    if options.runs < 1:
        raise UserError(f"--runs must be 1 or more, not {options.runs}")
    found: dict[str, list[float]] = {name: [] for name in HELP}
    with tempfile.TemporaryDirectory() as compiled:
        for number in range(options.runs + 1):  # by turns, so that a slow minute of the machine is everyone's
            for name, arguments in HELP.items():
                took = seconds(arguments, compiled)
                if number:  # the first one compiles
                    found[name].append(took)
    rows = [[name, f"{min(each):.2f}", f"{statistics.median(each):.2f}"] for name, each in found.items()]
    print(markdown_table(["command", "least, s", "median, s"], rows))


if __name__ == "__main__":
    run(main)
