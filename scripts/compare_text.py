"""What each method makes of a language model, beside full fine-tuning and beside the same method in peft.

    python scripts/compare_text.py --output comparison

Every method learns the same text (Psalms and Proverbs of the King James Bible) in the same steps, from the same windows in
the same order, with the defaults of ``peft-diffusion text train``, and two of them with the output layer among theirs; full
fine-tuning, which trains every weight of the base, has as many steps at each of a few learning rates, of which the best
counts. peft's methods have the hyper-parameters, layers and learning rates of ours, and begin as peft begins them.
Perplexity is that on text that nothing learns from (Ecclesiastes and the Song of Solomon). Prints a table, and writes
``figures.json``, ``table.md`` and the adapters.
"""

import argparse
import math
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from peft_diffusion.api import train_text
from peft_diffusion.bases import LanguageModel, embedded, load_lm
from peft_diffusion.core import quantized
from peft_diffusion.core.arena import Arena
from peft_diffusion.core.errors import UserError
from peft_diffusion.data.text_files import read_texts
from peft_diffusion.fast.low_rank import Working
from peft_diffusion.formats import inspect
from peft_diffusion.methods.loha import Loha
from peft_diffusion.methods.lokr import Lokr
from peft_diffusion.methods.lora import Lora
from peft_diffusion.methods.oft import Oft
from peft_diffusion.methods.prefix import Prefix
from peft_diffusion.methods.prompt import SoftPrompt
from peft_diffusion.training.loop.trainer import Trainer, TrainerSettings
from peft_diffusion.training.settings.derive import resolve_language
from peft_diffusion.training.settings.text import ResolvedTextConfig, TextTrainConfig
from peft_diffusion.training.tasks.language import LanguageSettings, LanguageTask, tokens

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts are no part of the package

from scripts.measuring import markdown_table, memory_words, peak_memory, run, size_words, write_results

HEAD = "+head"
METHODS = ("lora", "dora", "loha", "lokr", "oft", "ia3", "bottleneck", "prefix", "prompt", f"lora{HEAD}", f"dora{HEAD}")
"""Those that have something to train in a Llama as it is: it has no biases, and its text no new words."""
OURS_ALONE = ("bottleneck", f"lora{HEAD}", f"dora{HEAD}")  # what peft has not, or not so
# A text of other words than the base's asks most of the layer that says them, which no named target takes in: a small rank
# there and everywhere, quickly learned and held back by dropout.
WITH_HEAD: dict[str, Any] = {
    "target": r"(.*\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)|lm_head)",
    "rank": 6,
    "option": ("dropout=0.2",),
    "lr": 0.02,
}
FULL_RATES = (3e-4, 1e-3, 3e-3)
FULL, IN_PEFT = "full fine-tuning", " in peft"
SMALL_SHARE, NEAR = 0.05, 1.10  # a method with less of the base's parameters, and a perplexity that is near


@dataclass(frozen=True)
class Figures:
    """What one run came to: parameters trained, bytes of what it wrote, wall seconds, peak memory in bytes if known."""

    name: str
    rate: float
    parameters: int
    size: int
    seconds: float
    memory: int | None
    perplexity: float


@dataclass(frozen=True)
class Comparison:
    """All runs, and what they are measured against."""

    base_parameters: int
    base_perplexity: float
    steps: int
    runs: tuple[Figures, ...]

    def of(self, name: str) -> Figures | None:
        """The run of that name; the best by perplexity where there are several."""
        return min((run for run in self.runs if run.name == name), key=lambda run: run.perplexity, default=None)

    def near_full(self) -> list[Figures]:
        """Methods with few parameters whose perplexity is at most a tenth above that of full fine-tuning."""
        full = self.of(FULL)
        if full is None:
            return []
        few = [run for run in self.own() if run.parameters < SMALL_SHARE * self.base_parameters]
        return [run for run in few if run.perplexity <= NEAR * full.perplexity]

    def own(self) -> list[Figures]:
        """The runs of our methods, from the best to the worst."""
        others = [run for run in self.runs if run.name != FULL and not run.name.endswith(IN_PEFT)]
        return sorted(others, key=lambda run: run.perplexity)


@dataclass(frozen=True)
class Setting:
    """What every run has in common: the configuration with all values, the text as tokens, and how to load the base."""

    config: ResolvedTextConfig
    load: Callable[[], LanguageModel]
    line: Tensor
    apart: Tensor
    output: Path

    def task(self, base: LanguageModel) -> LanguageTask:
        """The loss of a model on the common windows."""
        config = self.config
        settings = LanguageSettings(config.seed, config.batch_size, config.accumulation, config.context)
        return LanguageTask(base, settings, self.line, self.apart)


def prepare(config: TextTrainConfig, load: Callable[[], LanguageModel], output: Path) -> Setting:
    """Read the text of a configuration, and fill its defaults. Raises UserError as training does."""
    base = load()
    resolved = resolve_language(config, parameters=quantized.count(base.lm), context=base.context)
    line, apart = (
        tokens(base, [document.text for document in read_texts(places).documents])
        for places in (config.texts, config.held_out_text)
    )
    return Setting(resolved, load, line, apart, output)


def with_method(setting: Setting, name: str, asked: TextTrainConfig) -> Figures:
    """Train one of our methods, as the command does."""
    output = setting.output / f"{name}.safetensors"
    steps = setting.config.steps
    config = replace(
        asked,
        method=name.removesuffix(HEAD),
        output=output,
        run_dir=setting.output / "runs" / name,
        overwrite=True,
        steps=steps,
        save_every=steps,
        **(WITH_HEAD if name.endswith(HEAD) else {}),
    )
    with peak_memory() as memory:
        result = train_text(config, base=setting.load())
    if result.perplexities is None:
        raise UserError("there is no text kept apart")
    parameters, size = inspect(output).parameters, output.stat().st_size
    return Figures(name, result.config.lr, parameters, size, result.seconds, memory.get("peak"), result.perplexities[1])


def full_fine_tuning(setting: Setting, rate: float) -> Figures:
    """Train every weight of the base."""
    base = setting.load()
    base.lm.requires_grad_(True)
    size = sum(parameter.numel() * parameter.element_size() for parameter in base.lm.parameters())
    return _trained(setting, base, FULL, rate, size)


def in_peft(setting: Setting, name: str, rate: float) -> Figures:
    """Train the method of that name, with the defaults that it has here, in peft, as it begins there."""
    import peft

    base, config = setting.load(), _peft_config(name)
    torch.manual_seed(setting.config.seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on what its own defaults do
        model = peft.get_peft_model(base.lm, config)
    # What it puts before a text takes room from the window, as ours does.
    room = setting.config.context - (config.num_virtual_tokens if name == "prompt" else 0)
    shorter = replace(setting, config=replace(setting.config, context=room))
    folder = setting.output / "peft" / name
    figures = _trained(shorter, replace(base, lm=_AfterPrompt(model)), name + IN_PEFT, rate, 0)
    model.save_pretrained(folder)
    return replace(figures, size=(folder / "adapter_model.safetensors").stat().st_size)


def _peft_config(name: str) -> Any:
    """The configuration of peft that says what a method is by default."""
    import peft

    layers, causal = r".*\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)", "CAUSAL_LM"
    lora, loha, lokr, oft = Lora(), Loha(), Lokr(), Oft()
    configs = {
        "lora": lambda: peft.LoraConfig(r=lora.rank, lora_alpha=lora.rank, target_modules=layers),
        "dora": lambda: peft.LoraConfig(r=lora.rank, lora_alpha=lora.rank, use_dora=True, target_modules=layers),
        "loha": lambda: peft.LoHaConfig(r=loha.rank, alpha=loha.rank, target_modules=layers),
        "lokr": lambda: peft.LoKrConfig(r=lokr.rank, alpha=lokr.rank, decompose_factor=lokr.factor, target_modules=layers),
        "oft": lambda: peft.OFTConfig(oft_block_size=oft.block_size, target_modules=layers),
        "ia3": lambda: peft.IA3Config(target_modules=layers, feedforward_modules=[]),
        "prefix": lambda: peft.PrefixTuningConfig(task_type=causal, num_virtual_tokens=Prefix().length),
        "prompt": lambda: peft.PromptTuningConfig(task_type=causal, num_virtual_tokens=SoftPrompt().vectors),
    }
    return configs[name]()


class _AfterPrompt(nn.Module):
    """A model of peft whose answer has the length of its input: what a soft prompt adds in front is cut off."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(self.model.parameters()).device

    def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
        # Not use_cache: peft's prefix is a cache that is given.
        answer = self.model(input_ids=input_ids)
        answer.logits = answer.logits[:, -input_ids.shape[1] :]
        return answer


def compare(
    setting: Setting, asked: TextTrainConfig, methods: Sequence[str], rates: Sequence[float], say: Console
) -> Comparison:
    """Run all of them, one after the other, and tell each as it ends."""
    base = setting.load()
    before = setting.task(base).held_out()
    if before is None:
        raise UserError("there is no text kept apart")
    found: list[Figures] = []
    say.print(f"base: perplexity {math.exp(before):.2f}")

    def add(run: Figures) -> None:
        found.append(run)
        say.print(f"{run.name} at {run.rate:g}: perplexity {run.perplexity:.2f}, {run.seconds:.0f} s")

    for name in methods:
        add(with_method(setting, name, asked))
        if name not in OURS_ALONE:
            add(in_peft(setting, name, found[-1].rate))
    for rate in rates:
        add(full_fine_tuning(setting, rate))
    return Comparison(quantized.count(base.lm), math.exp(before), setting.config.steps, tuple(found))


def _trained(setting: Setting, base: LanguageModel, name: str, rate: float, size: int) -> Figures:
    """Train those parameters of a model that take gradients, with the trainer and settings that the methods have."""
    config = setting.config
    own: list[nn.Parameter] = [parameter for parameter in base.lm.parameters() if parameter.requires_grad]
    began = time.monotonic()
    with peak_memory() as memory:
        arena = Arena({"lm": own})
        settings = TrainerSettings(
            steps=config.steps,
            rates={"lm": rate},
            accumulation=config.accumulation,
            scheduler=config.scheduler,
            warmup=config.warmup,
            weight_decay=config.weight_decay,
            clip=config.clip,
            save_every=config.steps,
        )
        task = setting.task(base)
        Trainer(task, arena, settings, passes=Working(arena.flat, arena.grad)).run()
        loss = task.held_out()
    if loss is None:
        raise UserError("there is no text kept apart")
    return Figures(name, rate, arena.count, size, time.monotonic() - began, memory.get("peak"), math.exp(loss))


HEADINGS = (
    "method", "learning rate", "trained", "of the base", "file", "time", "peak memory", "perplexity", "in peft",
)  # fmt: skip


def rows(found: Comparison) -> list[tuple[str, ...]]:
    """The table, as text: the base, the methods from the best to the worst, and at last full fine-tuning."""
    full = found.of(FULL)
    base = ("base", *["-"] * 6, f"{found.base_perplexity:.2f}", "-")
    return [base, *(_row(run, found) for run in (*found.own(), *([] if full is None else [full])))]


def _row(run: Figures, found: Comparison) -> tuple[str, ...]:
    size, memory = size_words(run.size), memory_words(run.memory)
    share, theirs = f"{run.parameters / found.base_parameters:.2%}", found.of(run.name + IN_PEFT)
    told = (f"{run.rate:g}", f"{run.parameters:,}", share, size, f"{run.seconds:.0f} s", memory, f"{run.perplexity:.2f}")
    return run.name, *told, "-" if theirs is None else f"{theirs.perplexity:.2f}"


def verdict(found: Comparison) -> list[str]:
    """What the figures come to, in lines."""
    lines = []
    full = found.of(FULL)
    if full is not None:
        near = ", ".join(f"{run.name} ({run.perplexity / full.perplexity - 1:+.1%})" for run in found.near_full())
        lines.append(
            f"within {NEAR - 1:.0%} of full fine-tuning's perplexity with under {SMALL_SHARE:.0%} of the parameters:"
            f" {near or 'none'}"
        )
    pairs = [(run, found.of(run.name + IN_PEFT)) for run in found.own()]
    against = [f"{run.name} {run.perplexity / other.perplexity - 1:+.1%}" for run, other in pairs if other is not None]
    if against:
        lines.append(f"perplexity against the same method in peft: {', '.join(against)}")
    return lines


def markdown(found: Comparison) -> str:
    """The table in Markdown, with what it comes to."""
    said = "".join(f"- {line}\n" for line in verdict(found))
    return f"{markdown_table(HEADINGS, rows(found))}\n{found.steps} steps each.\n{said}"


def main() -> None:
    """Train, measure, print."""
    options = _options()
    console = Console()
    options.output.mkdir(parents=True, exist_ok=True)
    asked = TextTrainConfig(
        (options.train,), held_out_text=(options.held_out,), base=options.base, device=options.device, seed=options.seed,
        steps=options.steps, precision="float32",
    )  # fmt: skip
    setting = prepare(asked, lambda: load_lm(options.base, device=options.device, dtype="float32"), options.output)
    found = compare(setting, asked, options.methods, options.full_rates, console)
    table = Table(*HEADINGS)
    for row in rows(found):
        table.add_row(*row)
    console.print(table)
    for line in verdict(found):
        console.print(line)
    write_results(options.output, asdict(found), markdown(found))


def _options() -> argparse.Namespace:
    sample = embedded("text/king-james")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("comparison"), help="folder for figures, tables and adapters")
    parser.add_argument("--train", type=Path, default=sample / "train", help="text to learn from")
    parser.add_argument("--held-out", type=Path, default=sample / "held-out", help="text to measure on")
    parser.add_argument("--base", default="tiny-lm", help="as for peft-diffusion text train")
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=METHODS)
    parser.add_argument(
        "--full-rates", nargs="*", type=float, default=FULL_RATES, help="of full fine-tuning; the best counts"
    )
    parser.add_argument("--steps", type=int, help="of every run; by default those of peft-diffusion text train")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
