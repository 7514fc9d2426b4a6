"""Feeds damaged and hostile files to everything that reads files of others.

    python scripts/fuzz.py --cases 50000

Each case ends in a right load or in one line, a `UserError`, within 10 seconds and 1 GiB; anything else is shown in its
smallest form, and fails. What is right is computed here, from the formulas of kohya and peft, and not by the package.

The cases are drawn by hypothesis: headers of safetensors, metadata, ``adapter_config.json``, pickles, captions, lines of
JSON, settings in TOML, learned compositions, recipes in pictures, prompts and configurations of bases.
``tests/test_fuzz.py`` draws a few of each.
"""

import argparse
import io
import json
import math
import os
import pickle
import re
import resource
import shutil
import struct
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save, save_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts are no part of the package

from peft_diffusion import formats, methods
from peft_diffusion.bases import components, denoiser_of, describe, load_base, prompt_syntax
from peft_diffusion.bases.embedded import embedded
from peft_diffusion.bases.prompts import Reading
from peft_diffusion.cli.composed import show_compositions
from peft_diffusion.core import settings_file
from peft_diffusion.core.errors import Interrupted, UserError
from peft_diffusion.core.learned_strengths import KINDS as LEARNED
from peft_diffusion.core.method import Method
from peft_diffusion.data.caption_files import read_captions
from peft_diffusion.data.captions import CaptionRules
from peft_diffusion.data.images import check_picture
from peft_diffusion.data.picture_formats import Carried, PictureFormat
from peft_diffusion.data.prompt_lines import parse_line, read_prompts
from peft_diffusion.data.wildcards import Wildcards
from peft_diffusion.formats import composition
from peft_diffusion.formats.container import COMPOSITION
from peft_diffusion.generation import recipe
from peft_diffusion.generation.asked import read_prompt
from peft_diffusion.generation.compatibility import compare
from peft_diffusion.generation.generate import generate
from peft_diffusion.generation.settings import GenerateConfig
from peft_diffusion.generation.tags import Shelf
from peft_diffusion.library import Library
from peft_diffusion.methods.lora.adapter import LoraAdapter
from peft_diffusion.training import TrainConfig
from peft_diffusion.training.record.run_record import Record
from peft_diffusion.training.settings.imported import ImportConfig, Imported, import_config

SECONDS, BYTES = 10.0, 2**30
"""What a case may take: of the processor, and of memory beyond what the process had."""

_RANK = 2
_DEEP = "[" * 3000
_HUGE = 10**400
_NUMBERS = [0, 1, -1, 4, 0.5, 1e300, -1e300, 1e-300, 2**31, 2**63, 2**64, _HUGE, -_HUGE, math.nan, math.inf, -math.inf]
_WORDS = [
    "", "a", "unet.lora_alpha", "lora_alpha", "r", "lora", "4", "NaN", "é", "\ud800", "\x00", "\x1b[31m", "..", "/",
    "a" * 500, "*", "(a+)+", "[" * 300, "(" * 300, "a{99999999999}", "(?=a)", "to_q", r".*\.to_q",
    "attn1.to_k", "(.*.*)*x", "^$", "<cat>",
    "epsilon", "v_prediction", "true", "float32", "DDIMScheduler",
]  # fmt: skip

# Those of UTF-8, by their category: where hypothesis is told the codec, it tries to encode each of a million letters.
_LETTERS = st.characters(exclude_categories=["Cs"])
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.sampled_from(_NUMBERS),
    st.sampled_from(_WORDS),
    st.text(_LETTERS, max_size=8),
)
words = st.one_of(st.sampled_from(_WORDS), st.text(_LETTERS, max_size=12))
values = st.recursive(
    scalars, lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(words, inner, max_size=4)), max_leaves=8
)
"""Whatever JSON can say, and what Python's reader takes for JSON."""

edits = st.lists(st.tuples(st.floats(0, 1), st.sampled_from("fcdi"), st.integers(0, 255)), min_size=1, max_size=6)
"""Changes of bytes: where, as a share; flip, cut off, delete or insert; and with what."""


def edited(content: bytes, changes: list[tuple[float, str, int]]) -> bytes:
    """Damage bytes.

    Args:
        content: The bytes.
        changes: As ``edits`` draws them.

    Returns:
        Others.
    """
    data = bytearray(content)
    for share, kind, value in changes:
        place = min(int(share * len(data)), max(len(data) - 1, 0))
        if kind == "f" and data:
            data[place] ^= value or 1
        elif kind == "c":
            del data[place:]
        elif kind == "d":
            del data[place : place + value]
        else:
            data[place:place] = bytes([value]) * (1 + value % 5)
    return bytes(data)


def dumped(value: Any) -> str:
    """Write JSON as a hostile program may: halves of characters as escapes, numbers that are none by their names.

    Args:
        value: The value.

    Returns:
        The text.
    """
    return json.dumps(value)


@dataclass
class World:
    """What files are read for, and into.

    Attributes:
        pipe: A base.
        base: The folder of a base, whose configurations are damaged.
        folder: Where files are put.
        ended: How cases ended, by kind of case.
    """

    pipe: Any
    base: Path
    folder: Path
    ended: dict[str, Counter[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        found = ((path, part) for path, part in self.pipe.unet.named_modules() if isinstance(part, nn.Linear))
        self.linears = [(path, part) for path, part in found if ".attn1.to_" in path or ".ff." in path][:6]
        self.fingerprint = describe(self.pipe).fingerprint

    def case(self, kind: str, run: Callable[[], object]) -> None:
        """Run a case, and see how it ends.

        Args:
            kind: What is damaged.
            run: What reads it.

        Raises:
            AssertionError: An error is no single line, or the case took too long or too much.
        """
        began, before, ended = time.process_time(), _peak(), "loaded"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                run()
            except UserError as error:
                ended, message = "refused", str(error)
                message.encode()
                if not message or "\n" in message:
                    raise AssertionError(f"no single line: {message!r}") from error
        took, memory = time.process_time() - began, _peak() - before
        if took > SECONDS or memory > BYTES:
            raise AssertionError(f"a case of {kind} took {took:.1f} seconds and {memory / 2**30:.1f} GiB")
        self.ended.setdefault(kind, Counter())[ended] += 1

    def loaded(self, path: Path) -> formats.Loaded:
        """Look at a file and load it, and see that all agrees.

        Args:
            path: The file.

        Returns:
            What was loaded.

        Raises:
            AssertionError: What is told is not what was done, or a number is none.
        """
        told = formats.inspect(path)
        compare(told, told)
        done = formats.load(path, self.pipe)
        assert done.report.found + len(done.report.unmatched) == sum(told.dtypes.values())
        assert done.report.sites == sum(map(len, done.components.values())) > 0
        for message in done.warnings:
            assert "\n" not in message
        for built in done.components.values():
            for adapter in built.values():
                for tensor in adapter.state().values():
                    assert not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())
        return done

    def assert_scales(self, done: formats.Loaded, expected: dict[str, float]) -> None:
        """See that pairs are scaled as the other program scales them.

        Args:
            done: What was loaded.
            expected: Alpha over rank, by path in the UNet.

        Raises:
            AssertionError: One is not.
        """
        found = done.components.get("unet", {})
        for path, scale in expected.items():
            adapter = found[path]
            assert isinstance(adapter, LoraAdapter)
            assert math.isclose(adapter.scale, scale, rel_tol=1e-5, abs_tol=1e-12), (path, adapter.scale, scale)


def _peak() -> int:
    """The most memory that this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def pairs(world: World, name: Callable[[str], str], down: str, up: str, count: int = 3) -> dict[str, Tensor]:
    """Make pairs for some sites of a UNet.

    Args:
        world: The base.
        name: What the file calls a path.
        down: What it calls the first half.
        up: The second.
        count: For how many sites.

    Returns:
        The tensors.
    """
    found: dict[str, Tensor] = {}
    for path, part in world.linears[:count]:
        found[f"{name(path)}.{down}"] = torch.full((_RANK, part.in_features), 0.5)
        found[f"{name(path)}.{up}"] = torch.full((part.out_features, _RANK), 0.25)
    return found


def kohya_name(path: str) -> str:
    """Name a site as kohya does."""
    return "lora_unet_" + path.replace(".", "_")


def with_header(header: Any, data: bytes) -> bytes:
    """Write a safetensors file.

    Args:
        header: As JSON.
        data: What follows.

    Returns:
        The bytes.
    """
    text = header if isinstance(header, bytes) else dumped(header).encode()
    return struct.pack("<Q", len(text)) + text + data


# Headers.

entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.one_of(st.sampled_from(["F32", "F16", "BF16", "I64", "BOOL", "F8_E4M3", "F8_E5M2", "U16"]), scalars),
        "shape": st.one_of(st.lists(st.integers(0, 64), max_size=70), values),
        "data_offsets": st.one_of(st.lists(st.integers(0, 5000), max_size=3), values),
    },
)
header_cases = st.one_of(
    edits,
    st.dictionaries(st.one_of(words, st.just("__metadata__")), st.one_of(entries, values), max_size=4),
    st.tuples(st.integers(0, 5), entries),
    st.sampled_from([b"[" * 5000, b'{"a":' * 3000, b"{}", b"\xff\xfe", b'{"a":' + b"9" * 5000 + b"}"]),
    values,
)


def headers(world: World, case: Any) -> None:
    """A header that lies, or is none."""
    content = save(pairs(world, kohya_name, "lora_down.weight", "lora_up.weight"))
    length = struct.unpack("<Q", content[:8])[0]
    if isinstance(case, list) and case and isinstance(case[0], tuple):
        content = edited(content, case)
    elif isinstance(case, tuple):
        header = json.loads(content[8 : 8 + length])
        name = list(header)[case[0] % len(header)]
        content = with_header({**header, name: {**header[name], **case[1]}}, content[8 + length :])
    else:
        content = with_header(case, content[8 + length :])
    path = world.folder / "a.safetensors"
    path.write_bytes(content)
    world.case("header", lambda: world.loaded(path))


# Numbers and patterns in metadata and in configurations.

simple = st.sampled_from(
    ["to_q", "to_k", r".*\.to_q", r".*attn1\.to_[kv]", "attn1.to_v", r"^down_blocks\..*to_k", "(to_q|to_v)"]
)
configurations = st.fixed_dictionaries(
    {},
    optional={
        "lora_alpha": st.one_of(st.integers(1, 64), st.floats(0.1, 64), values),
        "r": st.one_of(st.just(_RANK), values),
        "use_rslora": st.one_of(st.booleans(), values),
        "alpha_pattern": st.one_of(
            st.dictionaries(st.one_of(simple, words), st.one_of(st.integers(1, 64), values), max_size=4), values
        ),
        "rank_pattern": st.one_of(st.dictionaries(st.one_of(simple, words), values, max_size=3), values),
        "peft_type": st.one_of(st.just("LORA"), st.just("ADALORA"), values),
        "init_r": values,
        "init_lora_weights": values,
        "layer_replication": values,
    },
)


def scale_of_peft(told: dict[str, Any], path: str) -> float | None:
    """The scale that peft gives a pair; None where the configuration is none that it takes.

    Args:
        told: The configuration.
        path: Of the site.

    Returns:
        Alpha over rank, or over its root.
    """
    patterns = told.get("alpha_pattern") or {}
    alpha = told.get("lora_alpha")
    if told.get("peft_type", "LORA") != "LORA" or not isinstance(told.get("use_rslora", False), bool):
        return None
    if not isinstance(patterns, dict) or any(
        len(one) > 40 or "{" in one or "+)+" in one or "*)*" in one for one in patterns
    ):
        return None
    for pattern, value in patterns.items():
        try:
            found = re.match(rf"(.*\.)?({pattern})$", path)
        except re.error:
            return None
        if found:
            alpha = value
            break
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 1e-30 < abs(alpha) < 1e30:
        return None
    return alpha / (math.sqrt(_RANK) if told.get("use_rslora") else _RANK)


def _told_by_peft(world: World, path: Path, told: Any) -> None:
    done = world.loaded(path)
    if any("cannot be read, so alpha is taken to be the rank" in warning for warning in done.warnings):
        told = None
    scales = {where: scale_of_peft(told, where) for where in done.components["unet"]} if isinstance(told, dict) else {}
    world.assert_scales(done, {where: scale for where, scale in scales.items() if scale is not None})


config_cases = st.one_of(configurations, values, st.just(_DEEP), edits)


def adapter_configs(world: World, case: Any) -> None:
    """An ``adapter_config.json`` beside a file of peft."""
    folder = world.folder / "peft"
    folder.mkdir(exist_ok=True)
    path = folder / "adapter_model.safetensors"
    path.write_bytes(save(pairs(world, "base_model.model.{}".format, "lora_A.weight", "lora_B.weight")))
    text = case if isinstance(case, str) else dumped({"lora_alpha": 8, "r": 2}) if isinstance(case, list) else dumped(case)
    damaged = isinstance(case, list) and bool(case) and isinstance(case[0], tuple)
    (folder / "adapter_config.json").write_bytes(edited(text.encode(), case) if damaged else text.encode())
    world.case("adapter_config", lambda: _told_by_peft(world, path, None if damaged else case))


metadata_cases = st.one_of(
    st.tuples(st.just("lora_adapter_metadata"), st.one_of(configurations, values, st.just(_DEEP))),
    st.tuples(st.just("peft_diffusion"), values),
    st.tuples(
        st.just("peft_diffusion"),
        st.fixed_dictionaries(
            {"version": st.one_of(st.just(1), values)},
            optional=dict.fromkeys(("methods", "base", "triggers", "training", "title", "description"), values),
        ),
    ),
    st.tuples(
        st.just("peft_diffusion.words"),
        st.one_of(values, st.dictionaries(words, st.dictionaries(words, values, max_size=2), max_size=2)),
    ),
    st.tuples(st.sampled_from(["ss_network_args", "ss_network_dim", "ss_network_alpha", "ss_base_model_version"]), values),
    st.tuples(st.just("modelspec.trigger_phrase"), values),
)


def metadata(world: World, case: tuple[str, Any]) -> None:
    """Metadata of our own and of others."""
    key, value = case
    tensors = pairs(world, "unet.{}".format, "lora_A.weight", "lora_B.weight")
    if key == "peft_diffusion.words":
        tensors["bundle_emb.cat.clip_l"] = torch.ones(1, 2)
    if key == "lora_adapter_metadata" and isinstance(value, dict):
        text = dumped({f"unet.{name}": one for name, one in value.items()})
    else:
        text = value if isinstance(value, str) else dumped(value)
    header = {"__metadata__": {key: text, "ss_network_module": "networks.lora"}}
    content = save(tensors)
    length = struct.unpack("<Q", content[:8])[0]
    path = world.folder / "a.safetensors"
    path.write_bytes(with_header({**header, **json.loads(content[8 : 8 + length])}, content[8 + length :]))
    told = value if key == "lora_adapter_metadata" else None
    world.case("metadata", lambda: _told_by_peft(world, path, told))


# Tensors of kohya's layout: alphas of every kind, prefixes of every wrapper.

kohya_cases = st.tuples(
    st.lists(st.one_of(st.none(), st.floats(width=32), st.sampled_from(_NUMBERS)), min_size=3, max_size=3),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64]),
    st.sampled_from(["lora_unet_", "lycoris_", "lora_unet__orig_mod_"]),
    st.lists(
        st.sampled_from(["lora_what", "lora_mid.weight", "dora_scale", "diff", "alpha.default", "lora_up.bias"]), max_size=1
    ),
)


def kohya_files(world: World, case: tuple[list[float | None], torch.dtype, str, list[str]]) -> None:
    """A file of kohya's layout, whole or not."""
    alphas, dtype, prefix, extra = case
    tensors = pairs(world, lambda path: prefix + path.replace(".", "_"), "lora_down.weight", "lora_up.weight")
    expected: dict[str, float] = {}
    for (path, _), alpha in zip(world.linears, alphas, strict=False):
        stem = prefix + path.replace(".", "_")
        if alpha is None:
            expected[path] = 1.0
            continue
        try:
            stored = torch.tensor(alpha, dtype=torch.float64).to(dtype)
        except (OverflowError, RuntimeError):
            continue
        tensors[f"{stem}.alpha"] = stored
        expected[path] = (float(stored) or _RANK) / _RANK
    broken = prefix + world.linears[0][0].replace(".", "_")
    for end in extra:
        tensors[f"{broken}.{end}"] = torch.ones(2)
    if extra:
        expected.pop(world.linears[0][0], None)
    path = world.folder / "a.safetensors"
    path.write_bytes(save(tensors))
    world.case("kohya", lambda: world.assert_scales(world.loaded(path), expected))


# Sites of every method, with some tensors left out, of another shape, or of another method.

_BUILT = [one for one in methods.known().values() if not {"ids", "length", "hidden"} & {part.name for part in fields(one)}]
_some = st.tuples(
    st.lists(st.one_of(st.integers(0, 4), st.sampled_from([16, 32])), max_size=5),
    st.sampled_from([torch.float32, torch.float16, torch.int64, torch.bool, torch.uint8]),
)
kinds_cases = st.tuples(
    st.sampled_from(_BUILT),
    st.sampled_from(["conv_in", "conv_norm_out", *(f"down_blocks.0.attentions.0.{end}" for end in ("proj_in", "norm"))]),
    st.dictionaries(
        st.sampled_from(sorted(set().union(*(one.suffixes for one in _BUILT)))), st.one_of(st.none(), _some), max_size=2
    ),
)


def kinds(world: World, case: tuple[type[Method], str, dict[str, tuple[list[int], torch.dtype] | None]]) -> None:
    """One site of a method, whole or not."""
    kind, where, changes = case
    part, method = world.pipe.unet.get_submodule(where), kind()
    tensors = (
        {end: one.detach().contiguous() for end, one in method.build(part).state().items()} if method.serves(part) else {}
    )
    for end, some in changes.items():
        tensors.pop(end, None)
        if some is not None:
            tensors[end] = torch.ones(some[0], dtype=some[1])
    path, stem = world.folder / "a.safetensors", f"lora_unet_{where.replace('.', '_')}"
    path.write_bytes(save({f"{stem}.{end}": one for end, one in tensors.items()}))
    world.case("kinds", lambda: world.loaded(path))


# Pickles.


def _strange(world: World) -> dict[str, Callable[[], Any]]:
    part = world.linears[0][1]
    return {
        "plain": lambda: torch.ones(_RANK, part.in_features),
        "half": lambda: torch.ones(_RANK, part.in_features, dtype=torch.float16),
        "sparse": lambda: torch.ones(_RANK, part.in_features).to_sparse(),
        "compressed": lambda: torch.ones(_RANK, part.in_features).to_sparse_csr(),
        "meta": lambda: torch.ones(_RANK, part.in_features, device="meta"),
        "nested": lambda: torch.nested.nested_tensor([torch.ones(1, 2), torch.ones(2, 2)]),
        "expanded": lambda: torch.ones(1, 1).expand(2**20, 2**20),
        "complex": lambda: torch.ones(_RANK, part.in_features, dtype=torch.complex64),
        "quantized": lambda: torch.quantize_per_tensor(torch.ones(2, 2), 0.1, 0, torch.qint8),
        "parameter": lambda: nn.Parameter(torch.ones(_RANK, part.in_features)),
        "empty": lambda: torch.ones(4, 0),
        "number": lambda: 4.0,
        "huge": lambda: 10**400,
        "nan": lambda: torch.tensor(math.nan),
        "bool": lambda: torch.ones(2, dtype=torch.bool),
        "text": lambda: "what",
        "many": lambda: torch.ones([1] * 40),
    }


KINDS = (
    "plain", "half", "sparse", "compressed", "meta", "nested", "expanded", "complex", "quantized", "parameter", "empty",
    "number", "huge", "nan", "bool", "text", "many",
)  # fmt: skip
names = st.one_of(
    st.sampled_from(
        ["down", "up", "alpha", "emb_params", "string_to_param", "<cat>", "clip_l", "state_dict", "a.b", "step"]
    ),
    scalars,
)
pickle_cases = st.one_of(
    st.dictionaries(names, st.sampled_from(KINDS), max_size=4),
    st.tuples(st.just("nest"), st.dictionaries(names, st.sampled_from(KINDS), max_size=2), st.integers(1, 3)),
    edits,
    values,
)


def pickles(world: World, case: Any) -> None:
    """A ``.pt``: tensors of every kind under every name, or damaged bytes."""
    strange, path = _strange(world), world.folder / "a.pt"
    stem = kohya_name(world.linears[0][0])
    calls = {"down": f"{stem}.lora_down.weight", "up": f"{stem}.lora_up.weight", "alpha": f"{stem}.alpha"}
    if isinstance(case, list) and case and isinstance(case[0], tuple):
        file = io.BytesIO()
        torch.save(pairs(world, kohya_name, "lora_down.weight", "lora_up.weight", 1), file)
        path.write_bytes(edited(file.getvalue(), case))
    else:
        depth, held = (case[2], case[1]) if isinstance(case, tuple) else (0, case)
        made: Any = held
        if isinstance(held, dict) and all(isinstance(one, str) and one in strange for one in held.values()):
            made = {calls.get(name, name) if isinstance(name, str) else name: strange[one]() for name, one in held.items()}
        for _ in range(depth):
            made = {"string_to_param" if depth == 1 else "state_dict": made}
        try:
            torch.save(made, path)
        except (pickle.PicklingError, RuntimeError, UnicodeError, NotImplementedError):
            return
    world.case("pickle", lambda: world.loaded(path))


# Embeddings.

embedding_cases = st.dictionaries(
    st.sampled_from(["emb_params", "emp_params", "clip_l", "clip_g", "<cat>", "bundle_emb.a.clip_l", "bundle_emb.b.clip_l"]),
    st.one_of(st.lists(st.integers(0, 4), max_size=4), st.integers(1, 4)),
    min_size=1,
    max_size=3,
)


def embeddings(world: World, case: dict[str, Any]) -> None:
    """New words: of a fitting width, where a number says how many vectors, or of any shape."""
    width = world.pipe.text_encoder.config.hidden_size
    tensors = {name: torch.ones((shape, width) if isinstance(shape, int) else shape) for name, shape in case.items()}
    path = world.folder / "word.safetensors"
    path.write_bytes(save(tensors))
    world.case("embedding", lambda: _learned(world, path, case))


def _learned(world: World, path: Path, case: dict[str, Any]) -> None:
    (adapter,) = world.loaded(path).components["text_encoder"].values()
    told = {name: count for name, count in case.items() if name != "clip_g" and (len(case) == 1 or not name.startswith("<"))}
    fitting = [count for count in told.values() if isinstance(count, int)]
    assert sum(map(len, adapter.learned_words().values())) >= max(fitting, default=0)


# Learned compositions.

_MEMBERS = st.fixed_dictionaries(
    {"file": st.one_of(st.just("a.safetensors"), values), "sha256": st.one_of(st.just("0" * 64), values)},
    optional={"size": st.one_of(st.just(9), values), "triggers": st.one_of(st.just(["a"]), values)},
)
_SIDES = st.lists(st.integers(0, 5), max_size=4)
composition_cases = st.tuples(
    st.sampled_from(sorted(LEARNED)),
    st.fixed_dictionaries(
        {},
        optional={
            "version": values,
            "kind": values,
            "adapters": st.one_of(st.lists(_MEMBERS, max_size=3), values),
            "blocks": st.one_of(st.lists(st.just("mid_block"), max_size=3), values),
            "base": values,
            "training": st.one_of(st.dictionaries(st.sampled_from(["mean_strengths", "loss"]), values), values),
        },
    ),
    st.dictionaries(st.sampled_from(["values", "shape", "mean", "scale", "out.bias", "other"]), _SIDES, max_size=2),
)


def compositions(world: World, case: tuple[str, dict[str, Any], dict[str, list[int]]]) -> None:
    """What `compose train` writes, with other metadata and tensors."""
    kind, changes, shapes = case
    tensors = LEARNED[kind].fresh(2, 3, torch.ones(1, 4)).tensors()
    tensors |= {name: torch.ones(shape) for name, shape in shapes.items()}
    members = [{"file": f"{name}.safetensors", "sha256": name * 64, "size": 9} for name in "ab"]
    told = {
        "version": 1,
        "kind": kind,
        "adapters": members,
        "blocks": ["x", "y", "z"],
        "base": {},
        "training": {},
        **changes,
    }
    path = world.folder / "composition.safetensors"
    path.write_bytes(save(tensors, {COMPOSITION: dumped(told)}))
    world.case("composition", lambda: _composed(path))


def _composed(path: Path) -> None:
    read = composition.read(path)
    found = read.learned()(torch.ones(2, 4), torch.tensor([0.0, 1.0]))
    assert found.shape == (2, len(read.adapters), len(read.blocks)) and bool(found.isfinite().all())
    show_compositions([read])


# Captions and lines of JSON.

texts = st.one_of(st.text(_LETTERS, max_size=30), words, st.just("{a|b} (red:1.4)"), st.just("a, " * 200))
caption_cases = st.tuples(
    st.one_of(st.binary(max_size=40), texts.map(lambda text: text.encode("utf-8", "surrogatepass"))),
    st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32", "cp1252"]),
    st.one_of(st.none(), texts),
)


def captions(world: World, case: tuple[bytes, str, str | None]) -> None:
    """A caption beside a picture, in any encoding."""
    raw, encoding, text = case
    folder = world.folder / "pictures"
    folder.mkdir(exist_ok=True)
    (folder / "a.png").write_bytes(b"")
    (folder / "a.txt").write_bytes(raw if text is None else text.encode(encoding, "ignore"))
    plain = text if text is not None and text.isprintable() and encoding == "utf-8" else None
    world.case("captions", lambda: _captioned(folder, ["a.png", "a.txt"], plain))


def _captioned(folder: Path, files: list[str], expected: str | None = None) -> None:
    found = read_captions(folder, files, ["a.png"])
    caption, _ = found.of("a.png")
    assert expected is None or caption.split() == expected.split()
    rules = CaptionRules(wildcards=True, shuffle=True)
    rules.plain(caption).encode()
    for problem in found.problems:
        str(problem).encode("utf-8", "backslashreplace")


lines = st.one_of(
    st.fixed_dictionaries(
        {"file_name": st.one_of(st.just("a.png"), values)}, optional={"text": values, "caption": values}
    ).map(dumped),
    values.map(dumped),
    st.just(_DEEP),
    st.text(_LETTERS, max_size=20),
)
jsonl_cases = st.tuples(
    st.lists(lines, max_size=3),
    st.lists(
        st.one_of(
            st.fixed_dictionaries(
                {"step": st.one_of(st.integers(0, 50), values)},
                optional=dict.fromkeys(
                    ("loss", "held_out_loss", "seen_loss", "seconds", "changes", "preview_nearest"), values
                ),
            ).map(dumped),
            lines,
        ),
        max_size=3,
    ),
    st.one_of(
        st.fixed_dictionaries(
            {},
            optional=dict.fromkeys(
                ("state", "process", "command", "plugins", "figures", "settings", "derived", "defaults"), values
            ),
        ).map(dumped),
        lines,
    ),
)


def json_lines(world: World, case: tuple[list[str], list[str], str]) -> None:
    """A ``metadata.jsonl`` of captions, and the record of a run."""
    told, metrics, facts = case
    folder = world.folder / "lines"
    folder.mkdir(exist_ok=True)
    _write(folder / "metadata.jsonl", "\n".join(told))
    _write(folder / "metrics.jsonl", "\n".join(metrics))
    _write(folder / "run.json", facts)
    _write(folder / "data.json", "\n".join(told))
    _write(folder / "config.toml", 'method = "lora"\n')
    world.case("jsonl", lambda: _captioned(folder, ["a.png", "metadata.jsonl"]))
    world.case("jsonl", lambda: _recorded(folder))


def _recorded(folder: Path) -> None:
    record = Record(folder)
    for name in (
        "facts", "config", "metrics", "data", "state", "other_process", "command", "plugins", "step", "seconds", "before",
        "after", "memorised", "nearest", "changes", "figures", "method",
    ):  # fmt: skip
        getattr(record, name)
    record.changed()


def _write(path: Path, text: str) -> None:
    path.write_bytes(text.encode("utf-8", "surrogatepass"))


# Settings.


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_toml(str(name))} = {_toml(one)}" for name, one in value.items()) + "}"
    return json.dumps(str(value))


keys = st.sampled_from(
    (
        "steps", "adapter", "rank", "alpha", "seed", "method", "block", "unet_lr", "plugin", "guidance", "target", "preset",
        "negative", "base", "width", "resolution", "count", "batch_size", "trigger", "a",
    )
)  # fmt: skip
toml_values = st.one_of(st.integers(1, 99), st.sampled_from(["lora", "style", "attention", 0.5, True]), values)
toml_cases = st.one_of(
    st.dictionaries(keys, toml_values, max_size=2),
    st.text(_LETTERS, max_size=40),
    st.sampled_from(
        [f"steps = {_DEEP}", "steps = " + "9" * 5000, "a = " + "{a = " * 500, "[" * 2000, 'base = "C:\\Users\\new"']
    ),
)


def toml(world: World, case: Any) -> None:
    """A file of settings, for training and for generating."""
    path = world.folder / "run.toml"
    needed: dict[Any, str] = {GenerateConfig: 'prompts = ["a"]', TrainConfig: 'folder = ["a"]\noutput = "a.safetensors"'}
    for kind, needs in needed.items():
        told = "\n".join(f"{key} = {_toml(value)}" for key, value in case.items()) if isinstance(case, dict) else case
        _write(path, f"{needs}\n{told}\n")
        world.case("toml", partial(_settled, kind, path, case))


def _settled(kind: Any, path: Path, case: Any) -> None:
    found = settings_file.load(kind, path)
    for name in ("steps", "seed", "negative") if isinstance(case, dict) else ():
        assert name not in case or getattr(found, name) == (case[name] if case[name] is not None else "None")


# Trainings and dataset files of other programs.

_KOHYA = {
    "pretrained_model_name_or_path": "base", "train_data_dir": "a", "resolution": "512,512", "network_dim": 8,
    "network_module": "lycoris.kohya", "network_args": ["algo=lokr", "conv_dim=4"], "max_train_epochs": 3,
    "lr_warmup_steps": 0.1, "text_encoder_lr": [1e-5, 1e-6], "optimizer_args": "weight_decay=0.1", "LoRA_type": "Standard",
    "min_bucket_reso": 256, "max_bucket_reso": 1024, "enable_bucket": True, "base_weights": ["b"], "sample_prompts": "c",
    "stop_text_encoder_training_pct": 50, "min_timestep": 5, "multires_noise_iterations": 6, "save_every_n_steps": 5,
}  # fmt: skip
_SUBSET = {
    "image_dir": "a", "num_repeats": 2, "class_tokens": "cat", "keep_tokens": 1, "flip_aug": True, "is_reg": False,
    "resolution": 512, "caption_dropout_rate": 0.1, "batch_size": 2, "caption_separator": ",", "bucket_no_upscale": True,
}  # fmt: skip
_CONCEPT = {
    "path": "a", "name": "a", "balancing": 2.0, "balancing_strategy": "SAMPLES", "loss_weight": 1.0, "type": "STANDARD",
    "image": {"enable_resolution_override": True, "resolution_override": "512,768"}, "enabled": True,
    "text": {"prompt_source": "sample", "tag_dropout_enable": True, "tag_dropout_probability": 0.5, "keep_tags_count": 0},
}  # fmt: skip
_ONETRAINER = {
    "training_method": "LORA", "model_type": "STABLE_DIFFUSION_15", "concepts": [_CONCEPT], "resolution": "512",
    "epochs": 3, "optimizer": {"optimizer": "ADAMW", "weight_decay": 0.1}, "unet": {"train": True, "learning_rate": 1e-4},
    "text_encoder": {"train": True, "stop_training_after": 2, "stop_training_after_unit": "EPOCH"}, "peft_type": "LOKR",
    "min_noising_strength": 0.1, "save_every": 5, "save_every_unit": "STEP", "learning_rate_warmup_steps": 0.5,
}  # fmt: skip
_OTHERS = {"kohya": _KOHYA, "subset": _SUBSET, "concept": _CONCEPT, "onetrainer": _ONETRAINER}
imported_cases = st.sampled_from(sorted(_OTHERS)).flatmap(
    lambda kind: st.tuples(st.just(kind), st.dictionaries(st.sampled_from(sorted(_OTHERS[kind])), values, max_size=3))
)


def imported(world: World, case: Any) -> None:
    """A training of sd-scripts or OneTrainer, or folders of either, some of whose options are something else."""
    kind, changed = case
    told: Any = _OTHERS[kind] | changed
    told = {"subset": {"datasets": [{"subsets": [told]}]}, "concept": [told]}.get(kind, told)
    path = world.folder / "other.json"
    _write(path, json.dumps(told))
    config = ImportConfig(path, output=world.folder / "ours.toml", overwrite=True)
    world.case("imported", lambda: _same_settings(import_config(config)))


def _same_settings(made: Imported) -> None:
    assert settings_file.load(TrainConfig, made.output) == made.config


# Recipes.

recipe_fields = {
    "prompt": "a cat", "negative": "", "seed": 1, "width": 64, "height": 64, "steps": 2, "guidance": 5.0, "scheduler": None,
    "sampler": "DDIMScheduler", "base": "icons", "base_name": "icons", "base_family": "other", "fingerprint": "0" * 16,
    "device": "cpu", "dtype": "float32", "adapters": [],
    "versions": {"peft_diffusion": "0"}, "quantize": None, "image": None, "mask": None, "strength": None,
    "guidance_stop": 1.0,
}  # fmt: skip
fitting = {
    "prompt": st.text(_LETTERS, max_size=9), "seed": st.integers(0, 2**63), "width": st.integers(1, 4096),
    "guidance": st.floats(0, 30),
    "strength": st.one_of(st.none(), st.floats(0, 1)), "quantize": st.sampled_from([None, "nf4"]), "versions": st.just({}),
}  # fmt: skip
recipe_cases = st.one_of(
    st.fixed_dictionaries({}, optional=fitting),
    st.dictionaries(st.sampled_from(sorted(recipe_fields)), values, max_size=3),
    st.tuples(st.just("all"), st.one_of(values, st.just(_DEEP))),
    edits,
)


def recipes(world: World, case: Any) -> None:
    """The recipe in a picture."""
    if isinstance(case, tuple):
        text = case[1] if isinstance(case[1], str) else dumped(case[1])
    else:
        told = {**recipe_fields, "fingerprint": world.fingerprint, **(case if isinstance(case, dict) else {})}
        text = dumped({"version": 1, "recipe": told})
    file, path = io.BytesIO(), world.folder / "a.png"  # read by what is in it
    kind: PictureFormat = ("png", "jpeg", "webp")[len(text) % 3]
    Image.new("RGB", (2, 2)).save(file, **Carried(text.encode("ascii", "ignore").decode()).options(kind))
    damaged = isinstance(case, list) and bool(case) and isinstance(case[0], tuple)
    path.write_bytes(edited(file.getvalue(), case) if damaged else file.getvalue())

    world.case("recipe", lambda: _drawn_again(world, path, case))
    world.case("recipe", lambda: _learned_from(path))


def _learned_from(path: Path) -> None:
    """A caption that training could have of it: a line that can be written."""
    prompt = check_picture(path).told.prompt
    prompt.encode()
    assert "\n" not in prompt


def _drawn_again(world: World, path: Path, case: Any) -> None:
    found = recipe.read(path)
    found.parameters().encode()
    for name, value in case.items() if isinstance(case, dict) else ():
        assert name == "adapters" or getattr(found, name) == value or value != value
    stop = threading.Event()
    stop.set()  # before the first step
    try:
        generate(GenerateConfig(recipe=path, output=world.folder / "again.png"), pipe=world.pipe, stop=stop)
    except Interrupted:
        return


# Configurations of bases.

base_files = ("model_index.json", "unet/config.json", "scheduler/scheduler_config.json", "vae/config.json",
              "text_encoder/config.json", "tokenizer/tokenizer_config.json")  # fmt: skip
_COUNTS = ("num_train_timesteps", "layers_per_block", "num_hidden_layers", "sample_size", "block_out_channels")
base_cases = st.tuples(
    st.sampled_from(base_files),
    st.one_of(
        edits, st.tuples(st.integers(0, 40), values), st.tuples(st.sampled_from(_COUNTS), values), values, st.just(_DEEP)
    ),
)


def bases(world: World, case: tuple[str, Any]) -> None:
    """A folder of a base with one damaged configuration."""
    name, change = case
    folder = world.folder / "base"
    if not folder.exists():
        shutil.copytree(world.base, folder, copy_function=os.link)
    path = folder / name
    if not path.is_file():
        return
    kept = path.read_bytes()
    told = json.loads(kept)
    if isinstance(change, list) and change and isinstance(change[0], tuple):
        made = edited(kept, change)
    elif isinstance(change, tuple):
        key = change[0] if isinstance(change[0], str) else list(told)[change[0] % len(told)]
        made = dumped({**told, key: change[1]}).encode()
    else:
        made = (change if isinstance(change, str) else dumped(change)).encode("utf-8", "surrogatepass")
    path.unlink()  # it is another name of the base's own file
    path.write_bytes(made)
    try:
        world.case("base", lambda: _based(folder))
    finally:
        path.write_bytes(kept)


def _based(folder: Path) -> None:
    pipe = load_base(str(folder), device="cpu")
    told = describe(pipe)
    assert told.resolution > 0 and told.step > 0 and components(pipe)


# Prompts, with files of lists and lines.

_MARKS = [
    "(", ")", "[", "]", "\\", ":1.3)", ":", ":-1e9)", "BREAK", " BREAK ", "{", "}", "|", "$$", "2$$", "3::", "__a__",
    "__b*__", "__", "<lora:", "<lora:a:0.5>", "<lyco:b:1:2>", ">", " --n ", " --w 64", " --s x", "#", "\n", "\r\n", ", ",
    "red", "apple",
    "(" * 3000, "{" * 3000, "(" * 500 + ")" * 500, "{a|" * 300, "__a__" * 50, "\u2028", "<a>", "é", "a " * 200,
]  # fmt: skip
marks = st.lists(st.one_of(st.sampled_from(_MARKS), st.text(_LETTERS, max_size=6)), max_size=12)
prompt_cases = st.tuples(marks.map("".join), marks.map("".join), st.integers(0, 2**63 - 1))


def prompts(world: World, case: tuple[str, str, int]) -> None:
    """A prompt with whatever syntax, a list that it may draw from, and both as lines of a file."""
    prompt, entries, number = case
    folder = world.folder / "lists"
    folder.mkdir(exist_ok=True)
    (folder / "a.txt").write_text(entries, "utf-8")
    (folder / "b2.txt").write_text("red\n(blue:1.2)\n", "utf-8")
    world.case("prompts", lambda: _read_prompts(world, folder, prompt, number))


def _read_prompts(world: World, folder: Path, prompt: str, number: int) -> None:
    assert prompt_syntax.words(prompt_syntax.escaped(prompt), "a1111").split() == _letters(prompt).split()
    for weights in get_args(prompt_syntax.Weights):
        text = denoiser_of(world.pipe).text.read_as(Reading(weights, 3))
        assert text.tokenized([prompt[:600]])["ids_0"].shape[1] in (77, 154, 231)
    read = read_prompt(parse_line(prompt).prompt, number, Wildcards(folder))
    assert read == read_prompt(parse_line(prompt).prompt, number, Wildcards(folder))
    Shelf((), folder).all_of(read.tags)
    (folder / "lines.md").write_text(prompt, "utf-8")
    for line in read_prompts(folder / "lines.md"):
        parse_line(line)


def _letters(prompt: str) -> str:
    return re.sub(r"\bBREAK\b", "Break", prompt)


# What stands beside an adapter, and what a library makes of it and of its metadata.

_SIDECARS = {
    "trainedWords": texts, "baseModel": texts, "tags": texts, "description": texts, "images": texts, "model": texts,
    "activation text": texts, "preferred weight": values, "sd version": st.sampled_from(["SD1", "SDXL", "Pony", 3]),
}  # fmt: skip
sidecars = st.one_of(
    values.map(dumped),
    st.just(_DEEP),
    st.fixed_dictionaries({}, optional={name: st.one_of(one, values, st.lists(one)) for name, one in _SIDECARS.items()}).map(
        dumped
    ),
)
_PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\x01\0\0\0\x01\x08\x02\0\0\0"
beside_cases = st.tuples(
    sidecars,
    sidecars,
    st.one_of(st.binary(max_size=60), st.binary(max_size=40).map(lambda data: _PNG + data)),
    st.dictionaries(
        st.sampled_from(["ss_tag_frequency", "modelspec.tags", "modelspec.thumbnail", "ss_output_name"]), sidecars
    ),
)


def beside(world: World, case: tuple[str, str, bytes, dict[str, str]]) -> None:
    """An adapter with JSON of two programs and a picture beside it, added to a library and looked for."""
    own, other, picture, told = case
    folder = world.folder / "beside"
    folder.mkdir(exist_ok=True)
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    pair = {f"{name}.lora_down.weight": torch.zeros(1, 768), f"{name}.lora_up.weight": torch.zeros(320, 1)}
    metadata = {key: value.encode("utf-8", "ignore").decode() for key, value in told.items()}
    save_file(pair, folder / "a.safetensors", metadata)
    (folder / "a.json").write_bytes(own.encode("utf-8", "ignore"))
    (folder / "a.civitai.info").write_bytes(other.encode("utf-8", "ignore"))
    (folder / "a.png").write_bytes(picture)
    world.case("beside", lambda: _in_library(folder))


def _in_library(folder: Path) -> None:
    with Library(folder / "library.sqlite3") as library:
        made = library.add([folder])
        "\n".join(made.lines()).encode("utf-8", "backslashreplace")
        assert len(library) == 1
        for found in library.search("a red apple", words_only=True):
            assert 0 <= found.score <= 1 and found.strength > 0
        library.choose("apple", 1).message.encode("utf-8", "backslashreplace")


TARGETS: dict[str, tuple[st.SearchStrategy[Any], Callable[[World, Any], None], float]] = {
    "header": (header_cases, headers, 0.12),
    "metadata": (metadata_cases, metadata, 0.13),
    "adapter_config": (config_cases, adapter_configs, 0.13),
    "kohya": (kohya_cases, kohya_files, 0.07),
    "kinds": (kinds_cases, kinds, 0.06),
    "pickle": (pickle_cases, pickles, 0.1),
    "embedding": (embedding_cases, embeddings, 0.03),
    "composition": (composition_cases, compositions, 0.03),
    "captions": (caption_cases, captions, 0.04),
    "jsonl": (jsonl_cases, json_lines, 0.05),
    "prompts": (prompt_cases, prompts, 0.05),
    "toml": (toml_cases, toml, 0.06),
    "imported": (imported_cases, imported, 0.03),
    "recipe": (recipe_cases, recipes, 0.06),
    "base": (base_cases, bases, 0.02),
    "beside": (beside_cases, beside, 0.02),
}
"""By name: how cases are drawn, what is done with one, and the share of all cases."""


def run(world: World, name: str, cases: int, chance: int | None = None) -> None:
    """Draw cases of a kind, and run each.

    Args:
        world: What they are read for.
        name: One of ``TARGETS``.
        cases: How many.
        chance: The seed; None for the same cases every time.

    Raises:
        AssertionError: A case took too long or too much, or did not end as it should.
    """
    strategy, target, _ = TARGETS[name]

    def one(case: Any) -> None:
        target(world, case)

    drawn: Callable[[], None] = given(strategy)(one)
    if chance is not None:
        drawn = seed(chance)(drawn)
    once = chance is None
    chosen = settings(
        max_examples=cases, database=None, deadline=None, derandomize=once, suppress_health_check=[*HealthCheck]
    )
    bounded: Callable[[], None] = chosen(drawn)
    bounded()


def main() -> None:
    """Run all kinds, and say how their cases ended."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--cases", type=int, default=50_000, help="of all kinds together")
    parser.add_argument("--only", choices=sorted(TARGETS), nargs="*", help="these kinds alone")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="decides which cases are drawn")
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        world = World(load_base("icons", device="cpu"), embedded("base"), Path(folder))
        for name in options.only or TARGETS:
            began = time.monotonic()
            run(world, name, max(1, round(options.cases * TARGETS[name][2])), options.seed)
            ended = ", ".join(f"{count} {how}" for how, count in sorted(world.ended[name].items()))
            print(f"{name}: {ended}, {time.monotonic() - began:.0f} seconds", flush=True)


if __name__ == "__main__":
    main()
