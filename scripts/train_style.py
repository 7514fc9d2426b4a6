"""Learn a style from a folder of images: ``train_style.py FOLDER --output FILE``; the same as ``peft-diffusion train``."""

import sys

from peft_diffusion.cli.app import run_process

if __name__ == "__main__":
    sys.exit(run_process(["train", *sys.argv[1:]]))
