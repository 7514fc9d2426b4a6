"""What the processes of the tests find imported, see `forked`; it is imported once, in the server that forks them."""

import gc
import importlib
import logging
import os
from contextlib import suppress

gc.disable()  # nothing that is imported goes again
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
_QUIET = ("bitsandbytes", "torchao", "torch.utils._pytree")
for library in _QUIET:
    logging.getLogger(library).setLevel(logging.ERROR)

import diffusers.guiders  # noqa: E402
import diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion  # noqa: E402
import matplotlib.backends.backend_agg  # noqa: E402
import matplotlib.figure  # noqa: E402, F401
import rich.progress  # noqa: E402, F401
import transformers.models.clip.modeling_clip  # noqa: E402
from disk import without_waiting  # noqa: E402
from little import LITTLE  # noqa: E402
from PIL import Image  # noqa: E402
from transformers.conversion_mapping import get_checkpoint_conversion_mapping  # noqa: E402

import peft_diffusion.api  # noqa: E402
import peft_diffusion.generation.generate  # noqa: E402
import peft_diffusion.training.record.recorder  # noqa: E402, F401
from peft_diffusion.cli.commands import WrongCommandLineError  # noqa: E402
from peft_diffusion.cli.parser import run  # noqa: E402

Image.init()
get_checkpoint_conversion_mapping("clip")  # of all models, at the first: half the time that reading a small base takes
# What flags are made of is found out at the first command line; of all commands, where one is not found.
for command in ("train", "generate", "blend", "inspect", "none"):
    with suppress(WrongCommandLineError):
        run([command, "--none"])

without_waiting()
for place in LITTLE:  # where processes that are forked for a test will measure little, see `forked.begin`
    importlib.import_module(place.rpartition(".")[0])
gc.collect()
gc.enable()
gc.freeze()  # what all processes share stays shared: a collector that goes through it would copy its pages


def speak() -> None:
    """Let the libraries say in this process what they say in a Python of its own."""
    for library in _QUIET:
        logging.getLogger(library).setLevel(logging.NOTSET)
    transformers.logging.set_verbosity_warning()
    diffusers.logging.set_verbosity_warning()
