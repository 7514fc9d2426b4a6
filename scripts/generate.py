"""The command ``peft-diffusion generate`` from a checkout."""

import sys

from peft_diffusion.cli.app import run_process

if __name__ == "__main__":
    sys.exit(run_process(["generate", *sys.argv[1:]]))
