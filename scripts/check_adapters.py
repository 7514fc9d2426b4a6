"""Load, set, swap, remove, merge and draw in any order, against a plain model that knows nothing of adapters.

    python scripts/check_adapters.py --operations 10000

Hypothesis chooses the operations (a state machine), and shortens what fails. After every drawing the answer of the UNet is
compared with that of a copy of the base whose weights were changed by the files' own numbers; after every row of operations
the base has to have its bytes again. Adapters may move in memory only where one comes and has no room. Prints how many
operations ran, and the peak of memory after the first few hundred and after all.
"""

import argparse
import copy
import resource
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts are no part of the package

from peft_diffusion.bases import checksum, components, load_base
from peft_diffusion.core.errors import UserError
from peft_diffusion.core.slot import state_of
from peft_diffusion.generation import Adapters
from scripts.measuring import run

RANKS = (2, 4, 8, 16)
KINDS = ("all", "some", "halves")
AMOUNTS = st.sampled_from([-0.5, 0.0, 0.25, 0.7, 1.0])
NAMES = st.sampled_from(["a", "b", "c", "d"])


class World:
    """A base, a copy of it that stays as it is, and files of adapters.

    Args:
        pipe: The base.
        folder: Where the files are made.
    """

    def __init__(self, pipe: Any, folder: Path) -> None:
        self.pipe = pipe
        self.unet = copy.deepcopy(pipe.unet)
        self.plain = {name: own.detach() for name, own in self.unet.named_parameters()}
        self.before = checksum(components(pipe))
        self.files = {(kind, rank): self._made(folder, kind, rank) for kind in KINDS for rank in RANKS}
        self.counts: Counter[str] = Counter()

    def _made(self, folder: Path, kind: str, rank: int) -> Path:
        generator = torch.Generator().manual_seed(100 * KINDS.index(kind) + rank)
        tensors: dict[str, Tensor] = {}
        for path, module in self.pipe.unet.named_modules():
            if isinstance(module, nn.Linear) and "attentions" in path and (kind != "some" or "to_q" in path):
                stem, dtype = f"lora_unet_{path.replace('.', '_')}", torch.float16 if kind == "halves" else torch.float32
                down = torch.randn(rank, module.in_features, generator=generator) / module.in_features**0.5
                up = torch.randn(module.out_features, rank, generator=generator) / 4
                alpha = torch.tensor(float(rank if kind == "all" else 3))
                tensors |= {f"{stem}.lora_down.weight": down.to(dtype), f"{stem}.lora_up.weight": up.to(dtype)}
                tensors[f"{stem}.alpha"] = alpha.to(dtype)
        file = folder / f"{kind}{rank}.safetensors"
        save_file(tensors, file)
        return file

    @torch.no_grad()
    def expected(self, carried: dict[str, tuple[Path, float]]) -> Tensor:
        """What the base answers with its weights changed by the numbers of files."""
        flat = {f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}": name for name in self.plain}
        weights = dict(self.plain)
        for file, strength in carried.values():
            tensors = load_file(file)
            for stem in dict.fromkeys(name.partition(".")[0] for name in tensors):
                down, up, alpha = (
                    tensors[f"{stem}.{end}"].float() for end in ("lora_down.weight", "lora_up.weight", "alpha")
                )
                weights[flat[stem]] = weights[flat[stem]] + strength * float(alpha) / len(down) * up @ down
        found: Tensor = functional_call(self.unet, weights, self.call())[0]
        return found

    def call(self) -> tuple[Any, ...]:
        """What the UNet is asked."""
        generator = torch.Generator().manual_seed(5)
        x = torch.randn(1, self.pipe.unet.config.in_channels, 8, 8, generator=generator)
        text = torch.randn(1, 7, self.pipe.unet.config.cross_attention_dim, generator=generator)
        return x, 500, text, None, None, None, None, None, None, None, None, None, False


class Machine(RuleBasedStateMachine):
    """Operations on the adapters of a base."""

    world: ClassVar[World]

    def __init__(self) -> None:
        super().__init__()
        self.adapters = Adapters(self.world.pipe)
        self.carried: dict[str, tuple[Path, float]] = {}
        self.merged = False

    @rule(name=NAMES, kind=st.sampled_from(KINDS), rank=st.sampled_from(RANKS), strength=AMOUNTS)
    def load(self, name: str, kind: str, rank: int, strength: float) -> None:
        """Load a file, where the name is free."""
        file = self.world.files[kind, rank]
        if self._refused(lambda: self.adapters.load(file, name, strength), name in self.carried or self.merged):
            self.carried[name] = file, strength
        self._count("load")

    @rule(name=NAMES, kind=st.sampled_from(KINDS), rank=st.sampled_from(RANKS))
    def swap(self, name: str, kind: str, rank: int) -> None:
        """Put another file in an adapter's place."""
        file = self.world.files[kind, rank]
        if self._refused(lambda: self.adapters.swap(name, file), name not in self.carried or self.merged):
            self.carried[name] = file, self.carried[name][1]
        self._count("swap")

    @rule(name=NAMES, strength=AMOUNTS)
    def set(self, name: str, strength: float) -> None:
        """Set a strength."""
        with self._staying():
            if self._refused(lambda: self.adapters.set({name: strength}), name not in self.carried or self.merged):
                self.carried[name] = self.carried[name][0], strength
        self._count("set")

    @rule(name=NAMES)
    def remove(self, name: str) -> None:
        """Take an adapter away."""
        with self._staying():
            if self._refused(lambda: self.adapters.remove(name), name not in self.carried or self.merged):
                del self.carried[name]
        self._count("remove")

    @rule()
    def merge(self) -> None:
        """Fold all into the weights, or restore them."""
        with self._staying():
            if self.merged:
                self.adapters.unmerge()
                self.merged = False
            elif self._refused(self.adapters.merge, not self.carried):
                self.merged = True
        self._count("merge")

    @precondition(lambda self: self.carried)
    @rule()
    def draw(self) -> None:
        """Compare with the plain model."""
        with self._staying(), torch.no_grad():
            found = self.world.pipe.unet(*self.world.call())[0]
        expected = self.world.expected(self.carried)
        apart = float((found - expected).abs().max() / expected.abs().max())
        if not apart < 1e-3:
            raise AssertionError(f"{self.carried}, merged {self.merged}: {apart:.2g} apart")
        self._count("draw")

    def teardown(self) -> None:
        """Take everything off: the base is the one that it was."""
        if self.merged:
            self.adapters.unmerge()
        for name in self.adapters.names:
            self.adapters.remove(name)
        if checksum(components(self.world.pipe)) != self.world.before or state_of(self.world.pipe.unet) is not None:
            raise AssertionError("the base is another one")

    def _refused(self, operation: Callable[[], object], wanted: bool) -> bool:
        """Whether the operation was done; it has to be refused where that is wanted, and nowhere else."""
        try:
            operation()
        except UserError:
            if wanted:
                return False
            raise
        if wanted:
            raise AssertionError("that was to be refused")
        return True

    def _staying(self) -> "_Staying":
        return _Staying(self.world)

    def _count(self, what: str) -> None:
        self.world.counts[what] += 1
        if tuple(self.adapters.names) != tuple(dict.fromkeys(self.adapters.names)) or {*self.adapters.names} != {
            *self.carried
        }:
            raise AssertionError(f"{self.adapters.names} are carried, and not {list(self.carried)}")


class _Staying:
    """Sees that what adapters take in memory stays where it is."""

    def __init__(self, world: World) -> None:
        self._world = world

    def __enter__(self) -> None:
        self._before = self._now()

    def __exit__(self, *_: object) -> None:
        if self._before is not None and self._now() not in (self._before, None):
            raise AssertionError("adapters moved in memory")

    def _now(self) -> tuple[int, int] | None:
        state = state_of(self._world.pipe.unet)
        return None if state is None else (state.slab.moves, state.strengths.values.data_ptr())


def check(world: World, examples: int, steps: int) -> None:
    """Run the machine.

    Args:
        world: What it runs in.
        examples: How many rows of operations.
        steps: How many operations a row has at most.
    """
    machine = type("AdaptersInAnyOrder", (Machine,), {"world": world})
    chosen = settings(
        max_examples=examples, stateful_step_count=steps, deadline=None, database=None, derandomize=True,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    run_state_machine_as_test(machine, settings=chosen)


def main() -> None:
    """Run until there were so many operations."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operations", type=int, default=10_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        world = World(load_base("icons", device="cpu"), Path(folder))
        check(world, 5, 50)
        first = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        world.counts.clear()
        check(world, max(1, options.operations // 100), 100)
        while world.counts.total() < options.operations:
            check(world, max(1, (options.operations - world.counts.total()) // 50), 100)
        last = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"{world.counts.total()} operations: {dict(world.counts)}; peak memory {first / 1024:.0f}, {last / 1024:.0f} MiB")


if __name__ == "__main__":
    run(main)
