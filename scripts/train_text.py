"""Teach a language model a text: ``train_text.py TEXT --output FILE``; the same as ``peft-diffusion text train``."""

import sys

from peft_diffusion.cli.app import run_process

if __name__ == "__main__":
    sys.exit(run_process(["text", "train", *sys.argv[1:]]))
