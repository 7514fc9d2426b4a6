"""Teach a language model a text: ``train_text.py TEXT --output FILE``; the same as ``peft-diffusion text train``."""

import sys

from peft_diffusion.cli.app import main

if __name__ == "__main__":
    sys.exit(main(["text", "train", *sys.argv[1:]]))
