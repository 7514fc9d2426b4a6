"""The command ``peft-diffusion blend`` from a checkout."""

import sys

from peft_diffusion.cli.app import main

if __name__ == "__main__":
    sys.exit(main(["blend", *sys.argv[1:]]))
