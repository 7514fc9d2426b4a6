"""The command ``peft-diffusion generate`` from a checkout."""

import sys

from peft_diffusion.cli.app import main

if __name__ == "__main__":
    sys.exit(main(["generate", *sys.argv[1:]]))
