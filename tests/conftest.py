"""Small random bases of the true architectures, made in seconds."""

import gc
import logging
import os
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Bytes of pictures differ between numbers of threads, and tests compare those of this process with those of processes that
# have one. Beside other workers more threads would only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
logging.getLogger("transformers").setLevel(logging.ERROR)
# The collector goes through all objects of the libraries again and again: a fifth of the time of many tests.
gc.set_threshold(10_000, 20, 20)

import forked  # noqa: E402
import pytest  # noqa: E402
from _pytest.logging import catching_logs  # noqa: E402
from disk import without_waiting  # noqa: E402
from little import LITTLE  # noqa: E402

if TYPE_CHECKING:
    from copies import Copies
    from diffusers import DiffusionPipeline
    from transformers import CLIPTokenizer


without_waiting()
if "PYTEST_XDIST_WORKER" in os.environ:  # before coverage looks at what runs, which makes these imports take twice as long
    import diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion  # noqa: F401
    import transformers.models.clip.modeling_clip  # noqa: F401


@pytest.hookimpl(optionalhook=True)  # pytest knows it only where xdist is there
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One worker more than there are cores: a test that waits for a process of its own leaves its core to others.

    Those are slow. Without them one more would only import the libraries and collect the tests once more.
    """
    cores = os.cpu_count() or 1
    return cores if config.option.markexpr == "not slow" else cores + 1


def pytest_sessionstart(session: pytest.Session) -> None:
    """Start one server of processes before all workers, and fork these from it: each would import the libraries.

    That is where slow tests run too, and before Python 3.14. Where coverage is told, workers are Pythons of their own, as it
    counts what is run while the package is imported.
    """
    option = session.config.option
    starts_workers = getattr(option, "tx", None) and "PYTEST_XDIST_WORKER" not in os.environ
    if starts_workers and option.markexpr != "not slow" and forked.SHAREABLE:
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # as in the workers
        forked.share()
        if not getattr(option, "cov_source", None):
            option.tx = [forked.WORKER if one == "popen" else one for one in option.tx]


def pytest_collection_finish() -> None:
    """Let the collector of garbage pass over what is imported to stay."""
    gc.collect()
    gc.freeze()


def _catch_at_the_root(catching: Any) -> Any:
    """Enter pytest's catching of logs at the root logger alone.

    pytest also gives its handlers to each logger that passes nothing on, of which torch has 87, six times a test: a
    millisecond for each of thousands of tests. This package's loggers pass on to the root.
    """
    root = logging.getLogger()
    if catching.level is not None:
        catching.handler.setLevel(catching.level)
        catching.orig_level = root.level
        root.setLevel(min(root.level, catching.level))
    root.addHandler(catching.handler)
    catching.attached_loggers = [root]
    return catching.handler


def _let_go_of_the_root(catching: Any, *_: object) -> None:
    """Leave what `_catch_at_the_root` entered."""
    root = logging.getLogger()
    if catching.level is not None:
        root.setLevel(catching.orig_level)
    root.removeHandler(catching.handler)


if "attached_loggers" in getattr(catching_logs, "__slots__", ()):  # since pytest 9.1
    catching_logs.__enter__ = _catch_at_the_root  # type: ignore[method-assign]
    catching_logs.__exit__ = _let_go_of_the_root  # type: ignore[method-assign]


WORDS = ["a", "red", "blue", "apple", "cat", "dog", "house", "ink", "flat", "style", "emoji", "of"]


def tiny_tokenizer() -> "CLIPTokenizer":
    """A real CLIP tokenizer: all letters, and a few whole words."""
    from transformers import CLIPTokenizer

    letters = [chr(c) for c in range(33, 127)]
    vocab = {"<|startoftext|>": 0, "<|endoftext|>": 1}
    merges = []
    for token in [*letters, *(f"{letter}</w>" for letter in letters)]:
        vocab.setdefault(token, len(vocab))
    for word in WORDS:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            merged = parts[0] + parts[1]
            if merged not in vocab:
                vocab[merged] = len(vocab)
                merges.append((parts[0], parts[1]))
            parts = [merged, *parts[2:]]
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)


@cache
def _copies(make: "Callable[..., DiffusionPipeline]", *options: int | str) -> "Copies[DiffusionPipeline]":
    from copies import Copies

    return Copies(partial(make, *options))


def _copied(make: "Callable[..., DiffusionPipeline]", *options: int | str) -> "DiffusionPipeline":
    """A copy with tokenizers of its own, made anew: in a pickle they lose how they make text of tokens."""
    pipe = _copies(make, *options).copy()
    for name in pipe.components:
        if name.startswith("tokenizer"):
            setattr(pipe, name, tiny_tokenizer())
    return pipe


def make_pipe(seed: int = 0, prediction_type: str = "epsilon", width: int = 32, in_channels: int = 4) -> "DiffusionPipeline":
    """A StableDiffusionPipeline (or the inpainting one, of 9 channels) of 64 pixels with random weights."""
    return _copied(_build_pipe, seed, prediction_type, width, in_channels)


def _build_pipe(seed: int, prediction_type: str, width: int, in_channels: int) -> "DiffusionPipeline":
    import torch
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionInpaintPipeline,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel

    state = torch.get_rng_state()
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=77, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=in_channels, block_out_channels=(width, 2 * width), layers_per_block=1,
        cross_attention_dim=32, attention_head_dim=8, norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8), layers_per_block=1, down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4, sample_size=64, norm_num_groups=4,
    )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1, prediction_type=prediction_type,
    )  # fmt: skip
    cls = StableDiffusionPipeline if in_channels == 4 else StableDiffusionInpaintPipeline
    pipe = cls(
        vae=vae, text_encoder=CLIPTextModel(config), tokenizer=tokenizer, unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    torch.set_rng_state(state)
    pipe.set_progress_bar_config(disable=True)
    for part in (pipe.unet, pipe.text_encoder, pipe.vae):
        part.requires_grad_(False).eval()
    return pipe


def make_xl_pipe(seed: int = 0, prediction_type: str = "epsilon", in_channels: int = 4) -> "DiffusionPipeline":
    """A StableDiffusionXLPipeline (or the inpainting one, of 9 channels) of 64 pixels with random weights."""
    return _copied(_build_xl_pipe, seed, prediction_type, in_channels)


def _build_xl_pipe(seed: int, prediction_type: str, in_channels: int) -> "DiffusionPipeline":
    import torch
    from diffusers import (
        EulerDiscreteScheduler,
        StableDiffusionXLInpaintPipeline,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    state, small = torch.get_rng_state(), make_pipe(seed)
    torch.manual_seed(seed + 100)
    config = small.text_encoder.config.to_dict() | {"projection_dim": 16}
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=in_channels, block_out_channels=(32, 64, 64), layers_per_block=1, cross_attention_dim=64,
        attention_head_dim=(2, 4, 4), norm_num_groups=8, use_linear_projection=True, transformer_layers_per_block=(1, 1, 2),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), addition_embed_type="text_time",
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 16,
    )  # fmt: skip
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, prediction_type=prediction_type,
        timestep_spacing="leading",
    )  # fmt: skip
    cls = StableDiffusionXLPipeline if in_channels == 4 else StableDiffusionXLInpaintPipeline
    pipe = cls(
        vae=small.vae, text_encoder=CLIPTextModel(CLIPTextConfig(**config)), tokenizer=tiny_tokenizer(), unet=unet,
        text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**config)), tokenizer_2=tiny_tokenizer(),
        scheduler=scheduler, add_watermarker=False,
    )  # fmt: skip
    torch.set_rng_state(state)
    pipe.set_progress_bar_config(disable=True)
    for part in (pipe.unet, pipe.text_encoder, pipe.text_encoder_2, pipe.vae):
        part.requires_grad_(False).eval()
    return pipe


@pytest.fixture
def tiny_pipe() -> "DiffusionPipeline":
    return make_pipe()


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny pipeline as a diffusers folder."""
    folder = tmp_path_factory.mktemp("bases") / "tiny"
    make_pipe().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def other_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of another width, which adapters of ``tiny_base`` do not fit."""
    folder = tmp_path_factory.mktemp("bases") / "other"
    make_pipe(seed=1, width=48).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def read_bases_once() -> Iterator[None]:
    """What this process draws and trains with is a copy of a base that was read once: reading takes ten times as long.

    It is found by its path, so nothing is to be written over a base meanwhile.
    """
    from copies import Copies

    from peft_diffusion import bases
    from peft_diffusion.generation import memory
    from peft_diffusion.training.tasks import preparation

    read: dict[str, Copies[DiffusionPipeline]] = {}

    def lent(source: "str | DiffusionPipeline", **options: Any) -> "DiffusionPipeline":
        if not isinstance(source, str) or not Path(source).is_dir() or options["quantize"] is not None:
            return bases.load_base(source, **options)
        key = repr((source, sorted(options.items())))
        if key not in read:
            read[key] = Copies(partial(bases.load_base, source, **options))
        pipe = read[key].copy()
        for name, part in pipe.components.items():
            if name.startswith("tokenizer"):  # as in `_copied`
                setattr(pipe, name, type(part).from_pretrained(Path(source, name)))
        return pipe

    with pytest.MonkeyPatch.context() as patched:
        for place in (memory, preparation):
            patched.setattr(place, "load_base", lent)
        yield


def measure_little(patched: pytest.MonkeyPatch) -> None:
    """Let runs of this process measure with few noises."""
    for place, value in LITTLE.items():
        patched.setattr(place, value)


_PLOTS = ("draw", "draw_signals")


def draw_nothing(patched: pytest.MonkeyPatch) -> None:
    """Let runs of this process draw no plots."""
    for name in _PLOTS:
        patched.setattr(f"peft_diffusion.training.record.recorder.{name}", lambda path, metrics: None)


def draw_again(patched: pytest.MonkeyPatch) -> None:
    """Let runs of this process draw plots, where others of the module draw none."""
    from peft_diffusion.training.record import plots, recorder

    for name in _PLOTS:
        patched.setattr(recorder, name, getattr(plots, name))


def draw_copies(patched: pytest.MonkeyPatch, folder: Path) -> None:
    """Let runs of this process write the plots of a run's folder, byte by byte, instead of drawing their own."""
    from peft_diffusion.core.files import write_bytes

    for name in _PLOTS:
        patched.setattr(
            f"peft_diffusion.training.record.recorder.{name}",
            lambda path, metrics: write_bytes(path, (folder / path.name).read_bytes()),
        )


@pytest.fixture(scope="module")
def few_measurements() -> Iterator[None]:
    """Runs of this process measure with few noises: eight times the work of six steps of training, which many tests make."""
    with pytest.MonkeyPatch.context() as patched:
        measure_little(patched)
        yield


def leave_signals(patched: pytest.MonkeyPatch) -> None:
    """Let runs of this process measure what is kept apart alone."""
    from peft_diffusion.training.events import Signals
    from peft_diffusion.training.tasks.diffusion import DiffusionTask
    from peft_diffusion.training.tasks.language import LanguageTask

    patched.setattr(DiffusionTask, "fitting_prediction", lambda task: None)
    for kind in (DiffusionTask, LanguageTask):
        patched.setattr(kind, "signals", lambda task: Signals())


@pytest.fixture(scope="module")
def no_signals() -> Iterator[pytest.MonkeyPatch]:
    """Runs of this process measure no signals and do not try what the base predicts: as much work as their six steps."""
    with pytest.MonkeyPatch.context() as patched:
        leave_signals(patched)
        yield patched


@pytest.fixture
def signals(no_signals: pytest.MonkeyPatch) -> Iterator[None]:
    """Runs of this test measure all signals again, where others of its module measure none."""
    no_signals.undo()
    yield
    leave_signals(no_signals)


@pytest.fixture(scope="module")
def no_plots() -> Iterator[None]:
    """Runs of this process draw no plots, for tests that look at none: two take as long as twenty steps."""
    with pytest.MonkeyPatch.context() as patched:
        draw_nothing(patched)
        yield


@pytest.fixture
def plots(no_plots: None) -> Iterator[None]:
    """Runs of this test draw plots again, where others of its module draw none."""
    with pytest.MonkeyPatch.context() as patched:
        draw_again(patched)
        yield
