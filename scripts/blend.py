"""The command ``peft-diffusion blend`` from a checkout."""

import sys

from peft_diffusion.cli.app import run_process

if __name__ == "__main__":
    sys.exit(run_process(["blend", *sys.argv[1:]]))
