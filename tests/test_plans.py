"""A file is parsed once and hashed once, and what ``inspect`` tells is what ``load`` does."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_pipe
from making import make_adapter
from safetensors.torch import load_file, save_file
from test_methods_own import save_mixture

from peft_diffusion import BlendConfig, GenerateConfig, UserError, blend, formats, generate
from peft_diffusion.formats import container
from peft_diffusion.generation import Adapters
from peft_diffusion.methods.bitfit import BitFit
from peft_diffusion.methods.dora import Dora
from peft_diffusion.methods.ia3 import Ia3
from peft_diffusion.methods.loha import Loha
from peft_diffusion.methods.lokr import Lokr
from peft_diffusion.methods.lora import Lora
from peft_diffusion.methods.oft import Oft


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, str]]:
    """How often each file's header was read, and how often it was hashed."""
    found: Counter[tuple[str, str]] = Counter()

    def counted(name: str) -> Callable[[Path], Any]:
        function = getattr(container, name)

        def run(path: Path) -> Any:
            found[name, path.name] += 1
            return function(path)

        return run

    for name in ("read_header", "sha256"):
        monkeypatch.setattr(container, name, counted(name))
    return found


def once(*names: str) -> dict[tuple[str, str], int]:
    return {(what, name): 1 for name in names for what in ("read_header", "sha256")}


@pytest.fixture(scope="module")
def files(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("files")
    return [make_adapter(folder / f"{name}.safetensors", tiny_base, seed) for seed, name in enumerate(("ink", "flat"))]


def test_generate_parses_and_hashes_each_file_once(
    counts: Counter[tuple[str, str]], files: list[Path], tiny_base: Path, tmp_path: Path
) -> None:
    asked = GenerateConfig(
        ("a cat",), adapter=tuple(map(str, files)), base=str(tiny_base), steps=1, device="cpu", output=tmp_path / "a.png"
    )
    asked.check()  # as the command does before it imports torch
    generate(asked)
    assert counts == once("ink.safetensors", "flat.safetensors")
    counts.clear()
    again = GenerateConfig(recipe=tmp_path / "a.png", base=str(tiny_base), device="cpu", output=tmp_path / "b.png")
    generate(again)
    assert counts == once("ink.safetensors", "flat.safetensors")
    counts.clear()
    moved = tmp_path / "moved.safetensors"
    moved.write_bytes(files[0].read_bytes())
    named = (str(moved), str(files[1]))
    asked = GenerateConfig(recipe=tmp_path / "a.png", adapter=named, base=str(tiny_base), device="cpu")
    generate(replace(asked, output=tmp_path / "c.png"))
    assert counts == once("moved.safetensors", "flat.safetensors")


def test_blend_inspect_and_adapters_do_too(
    counts: Counter[tuple[str, str]], files: list[Path], tiny_base: Path, tmp_path: Path
) -> None:
    names = tuple(map(str, files))
    asked = BlendConfig(
        ("a cat",), adapter=names, base=str(tiny_base), steps=1, device="cpu", columns=2, output=tmp_path / "a.png"
    )
    asked.check()
    blend(asked)
    assert counts == once("ink.safetensors", "flat.safetensors")
    counts.clear()
    plan = formats.plan(files[0])
    assert formats.inspect(plan).sha256 == plan.sha256
    adapters = Adapters(make_pipe())
    adapters.load(plan)
    assert adapters["ink"].sha256 == plan.sha256
    assert counts == once("ink.safetensors")


def test_a_file_that_changed_is_parsed_again_and_never_taken_for_what_it_was(files: list[Path], tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(files[0].read_bytes())
    asked = GenerateConfig(("a cat",), adapter=(str(path),))
    (first,) = asked.choices()
    assert asked.choices()[0].plan is first.plan and first.plan is not None
    save_file(load_file(files[1]), path)
    for use in (lambda plan: formats.load(plan, make_pipe()), lambda plan: plan.sha256):
        with pytest.raises(UserError, match="was changed while it was being used"):
            use(first.plan)
    (second,) = asked.choices()
    assert second.plan is not None and second.plan.sha256 == container.sha256(path)


SITE = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
DOTTED = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k"
PAIR = {"lora_down.weight": torch.ones(2, 32), "lora_up.weight": torch.ones(32, 2)}
SAMPLES: dict[str, dict[str, torch.Tensor]] = {
    "kohya": {f"{SITE}.{end}": one for end, one in PAIR.items()},
    "of ComfyUI's saver": {**{f"{SITE}.{end}": one for end, one in PAIR.items()}, f"{SITE}.diff": torch.ones(32, 32)},
    "of a method that is not known": {
        **{f"{SITE}.{end}": one for end, one in PAIR.items()},
        **{f"{SITE.replace('to_q', 'to_v')}.{end}.weight": torch.ones(2, 2) for end in ("a1", "a2", "b1", "b2")},
    },
    "half a pair beside a whole one": {
        **{f"{SITE}.{end}": one for end, one in PAIR.items()},
        f"{SITE.replace('to_q', 'to_v')}.lora_up.weight": torch.ones(32, 2),
    },
    "two layouts": {
        **{f"{SITE}.{end}": one for end, one in PAIR.items()},
        **{f"{DOTTED}.{end}": one.clone() for end, one in PAIR.items()},
        "bundle_emb.cat.clip_l": torch.ones(2, 32), "unet.conv_in.weight": torch.ones(3),
    },
    "words": {"bundle_emb.cat.clip_l": torch.ones(2, 32), "bundle_emb.dog.clip_l": torch.ones(32)},
    "words that are none": {
        "bundle_emb.cat.clip_l": torch.ones(2, 32), "<toy>": torch.ones(2, 32), "bundle_emb.dog.t5": torch.ones(2, 32),
        "emb_params": torch.ones(2, 3, 4),
    },
    "one layer twice": {
        f"{prefix}_text_model_encoder_layers_0_mlp_fc1.{end}": one
        for prefix in ("lora_te", "lora_te1")
        for end, one in {"lora_down.weight": torch.ones(2, 32), "lora_up.weight": torch.ones(64, 2)}.items()
    },
}  # fmt: skip


def assert_tells_what_it_does(path: Path, base: Any) -> None:
    told, done = formats.inspect(path), formats.load(path, base)
    assert sum(told.components.values()) == len(told.sites) == done.report.sites
    assert set(told.unknown) == set(done.report.unmatched)
    assert done.report.found + len(told.unknown) == sum(told.dtypes.values())
    assert {component: len(built) for component, built in done.components.items()} == dict(told.components)


@pytest.mark.parametrize("case", SAMPLES)
def test_inspect_tells_what_load_does(case: str, tmp_path: Path) -> None:
    save_file({name: one.clone() for name, one in SAMPLES[case].items()}, tmp_path / "a.safetensors")
    assert_tells_what_it_does(tmp_path / "a.safetensors", make_pipe())


@pytest.mark.parametrize("layout", ["kohya", "original", "diffusers"])
@pytest.mark.parametrize(
    "method", [Lora(rank=3), Dora(rank=3), Loha(rank=2), Lokr(rank=2, factor=4), Oft(block_size=4), Ia3(), BitFit()],
    ids=lambda one: one.name,
)  # fmt: skip
def test_inspect_tells_what_load_does_with_files_of_ours(method: Any, layout: str, tmp_path: Path) -> None:
    from peft_diffusion.core import site

    pipe = make_pipe()
    site.attach(pipe.unet, "a", method, "biases" if method.name == "bitfit" else "attention")
    try:
        formats.save(tmp_path / "a.safetensors", {"unet": pipe.unet}, "a", formats.Spec(), layout=layout)
    except UserError:
        assert layout == "diffusers" and method.name not in ("lora", "dora")
        return
    assert_tells_what_it_does(tmp_path / "a.safetensors", make_pipe())


def test_inspect_tells_what_load_does_with_a_mixture(tmp_path: Path) -> None:
    assert_tells_what_it_does(save_mixture(tmp_path / "a.safetensors", make_pipe()), make_pipe())


def test_a_pickle_is_planned_from_its_tensors(tmp_path: Path) -> None:
    torch.save(SAMPLES["kohya"], tmp_path / "a.pt")
    found = formats.inspect(tmp_path / "a.pt")
    assert found.methods == ("lora",) and dict(found.ranks) == {2: 1}
    assert_tells_what_it_does(tmp_path / "a.pt", make_pipe())
