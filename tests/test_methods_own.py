"""BitFit, bottlenecks, prefixes and learned tokens: against plain formulas, and all of them together with LoRA."""

import itertools
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from conftest import make_pipe
from diffusers import DiffusionPipeline
from laws import randomize, strengths_of
from safetensors.torch import load_file, save_file
from test_formats import picture
from torch import nn
from torch.nn import functional as F

from peft_diffusion import formats
from peft_diffusion.bases import checksum, components, describe
from peft_diffusion.bases.taught import learned
from peft_diffusion.bases.words import teach, with_initial_tokens
from peft_diffusion.core import merge, site
from peft_diffusion.core.adapter import Adapter
from peft_diffusion.core.errors import FoldError, UserError
from peft_diffusion.core.method import Method
from peft_diffusion.core.slot import SLOT, slot_of
from peft_diffusion.generation import Adapters
from peft_diffusion.methods.bitfit import BitFit
from peft_diffusion.methods.bitfit.adapter import BitFitAdapter
from peft_diffusion.methods.bottleneck import Bottleneck
from peft_diffusion.methods.bottleneck.adapter import BottleneckAdapter
from peft_diffusion.methods.dora import Dora
from peft_diffusion.methods.ia3 import Ia3
from peft_diffusion.methods.loha import Loha
from peft_diffusion.methods.lokr import Lokr
from peft_diffusion.methods.lora import Lora
from peft_diffusion.methods.oft import Oft
from peft_diffusion.methods.prefix import Prefix
from peft_diffusion.methods.prefix.adapter import PrefixAdapter
from peft_diffusion.methods.prompt import SoftPrompt
from peft_diffusion.methods.tokens import Tokens

ATTENTION = "mid_block.attentions.0.transformer_blocks.0.attn1"
MIXTURE = {
    "unet": [
        (Lora(rank=4), "attention"),
        (Bottleneck(hidden=4), "outputs"),
        (BitFit(), "norms"),
        (Prefix(length=3), "attentions"),
    ],
    "text_encoder": [(Lora(rank=2), "attention"), (Tokens("<cat>", 3, "cat"), "tokens"), (SoftPrompt(2, "flat"), "tokens")],
}


def alone(module: nn.Module, method: Method) -> nn.Module:
    """A module by itself that carries a method with parameters that matter."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"part": module}).requires_grad_(False)
    site.attach(model, "a", method, "part")
    randomize(model, "a")
    return module


Kind = TypeVar("Kind", bound=Adapter)


def adapter_of(module: nn.Module, kind: type[Kind]) -> Kind:
    """The adapter of a module, which is of that class."""
    slot = slot_of(module)
    assert slot is not None
    adapter = slot.adapters["a"]
    assert isinstance(adapter, kind)
    return adapter


def parameters(model: nn.Module, name: str = "a") -> int:
    return sum(p.numel() for a in site.adapters(model, name).values() for p in a.parameters())


def attach_words(pipe: DiffusionPipeline, method: Method, name: str = "a") -> None:
    site.attach(pipe.text_encoder, name, with_initial_tokens(pipe, "text_encoder", method), "tokens")
    teach(pipe)


def save_mixture(path: Path, pipe: DiffusionPipeline, name: str = "mix", seed: int = 3) -> Path:
    """One file with every method, their parameters as if trained."""
    methods = {}
    for component, rows in MIXTURE.items():
        part = components(pipe)[component]
        chosen = [(with_initial_tokens(pipe, component, method), target) for method, target in rows]
        site.attach_all(part, name, chosen)
        randomize(part, name, seed)
        methods[component] = [{**method.spec(), "target": target} for method, target in chosen]
    teach(pipe)
    parts = {component: components(pipe)[component] for component in MIXTURE}
    formats.save(path, parts, name, formats.Spec(methods, asdict(describe(pipe))))
    return path


# BitFit


@torch.no_grad()
@pytest.mark.parametrize(
    "module, shape",
    [
        (nn.Linear(6, 8), (2, 5, 6)),
        (nn.Conv2d(6, 8, 3), (2, 6, 5, 5)),
        (nn.GroupNorm(2, 6), (2, 6, 4)),
        (nn.LayerNorm(6), (2, 6)),
    ],
)
def test_bitfit_is_another_bias(module: nn.Module, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    weight, bias = module.get_parameter("weight").clone(), module.get_parameter("bias").clone()
    alone(module, BitFit())
    changed = bias + adapter_of(module, BitFitAdapter).bias
    expected = {
        nn.Linear: lambda: F.linear(x, weight, changed),
        nn.Conv2d: lambda: F.conv2d(x, weight, changed),
        nn.GroupNorm: lambda: F.group_norm(x, 2, weight, changed),
        nn.LayerNorm: lambda: F.layer_norm(x, (6,), weight, changed),
    }[site.base_class(module)]()
    assert torch.allclose(module(x), expected, atol=1e-6)


@torch.no_grad()
def test_bitfit_keeps_a_norm_weight_that_another_program_trained() -> None:
    norm = nn.LayerNorm(6)
    x, tensors = torch.randn(2, 6), {"w_norm": torch.randn(6), "b_norm": torch.randn(6)}
    assert BitFit.recognizes(tensors.keys()) and not BitFit.recognizes({"diff", "diff_b"})
    expected = F.layer_norm(x, (6,), norm.weight + tensors["w_norm"], norm.bias + tensors["b_norm"])
    model = nn.ModuleDict({"norm": norm})
    site.attach_built(model, "a", {"norm": BitFit.read(norm, tensors)})
    assert torch.allclose(norm(x), expected, atol=1e-6)
    assert torch.equal(adapter_of(norm, BitFitAdapter).state()["w_norm"], tensors["w_norm"])
    merge.merge(model)
    assert torch.allclose(norm(x), expected, atol=1e-6)


def test_bitfit_has_as_many_parameters_as_there_are_biases(tiny_pipe: DiffusionPipeline) -> None:
    unet, encoder = tiny_pipe.unet, tiny_pipe.text_encoder
    biases = sum(p.numel() for name, p in unet.named_parameters() if name.endswith("bias"))
    site.attach(unet, "a", BitFit(), "biases")
    assert parameters(unet) == biases
    biases = sum(p.numel() for name, p in encoder.named_parameters() if name.endswith("bias") and "k_proj" not in name)
    site.attach(encoder, "a", BitFit(), "biases")
    assert parameters(encoder) == biases


# Bottlenecks


@torch.no_grad()
@pytest.mark.parametrize("activation", ["gelu", "relu", "silu"])
@pytest.mark.parametrize("form", ["sequential", "parallel"])
def test_a_bottleneck_is_a_small_network_after_or_beside(form: str, activation: str) -> None:
    layer = nn.Linear(6, 8)
    alone(layer, Bottleneck(hidden=3, activation=activation, form=form, scale=2.0))
    x = torch.randn(2, 5, 6)
    y = F.linear(x, layer.weight, layer.bias)
    part = adapter_of(layer, BottleneckAdapter)
    inner = getattr(F, activation)((y if form == "sequential" else x) @ part.down.T + part.down_bias)
    assert torch.allclose(layer(x), y + 2.0 * (inner @ part.up.T + part.up_bias), atol=1e-5)
    inside = 8 if form == "sequential" else 6
    assert sum(p.numel() for p in part.parameters()) == 3 * (inside + 8 + 1) + 8


@torch.no_grad()
def test_a_bottleneck_at_a_convolution_treats_every_pixel_alike() -> None:
    conv = nn.Conv2d(4, 6, 3, padding=1)
    alone(conv, Bottleneck(reduction=2))
    x = torch.randn(2, 4, 5, 5)
    y = F.conv2d(x, conv.weight, conv.bias, padding=1)
    part = adapter_of(conv, BottleneckAdapter)
    pixels = y.permute(0, 2, 3, 1)
    change = F.gelu(pixels @ part.down.T + part.down_bias) @ part.up.T + part.up_bias
    assert part.down.shape == (3, 6) and torch.allclose(conv(x), y + change.permute(0, 3, 1, 2), atol=1e-5)


def test_named_targets_are_where_the_papers_put_bottlenecks(tiny_pipe: DiffusionPipeline) -> None:
    unet = tiny_pipe.unet
    houlsby = site.attach(unet, "houlsby", Bottleneck(), "outputs")
    pfeiffer = site.attach(unet, "pfeiffer", Bottleneck(), "ff-outputs")
    he = site.attach(unet, "he", Bottleneck(form="parallel"), "sublayers")
    blocks = [path.removesuffix(".ff.net.2") for path in pfeiffer]
    assert len(blocks) == 4 and all(path.endswith("transformer_blocks.0") for path in blocks)
    assert set(houlsby) == {f"{b}.{end}" for b in blocks for end in ("attn1.to_out.0", "attn2.to_out.0", "ff.net.2")}
    assert set(he) == {f"{b}.{end}" for b in blocks for end in ("attn1", "attn2", "ff")}


def test_methods_refuse_sites_and_values_that_they_cannot_serve(tiny_pipe: DiffusionPipeline) -> None:
    unet, encoder = tiny_pipe.unet, tiny_pipe.text_encoder
    for method, part, target, words in [
        (Bottleneck(), unet, "norms", "bottleneck cannot serve .*GroupNorm"),
        (Bottleneck(form="parallel"), unet, r".*downsamplers\.0\.conv", "bottleneck cannot serve .*Conv2d"),
        (Prefix(), unet, "attention", "prefix cannot serve .*Linear"),
        (Prefix(), encoder, r".*\.self_attn", "prefix cannot serve .*CLIPAttention"),
        (Tokens(), encoder, "attention", "tokens cannot serve"),
        (BitFit(), unet, r".*\.to_q", "bitfit cannot serve .*Linear"),
    ]:
        with pytest.raises(UserError, match=words):
            site.attach(part, "a", method, target)
        assert not site.sites(part)
    for wrong in (
        lambda: Bottleneck(hidden=0),
        lambda: Bottleneck(reduction=0.5),
        lambda: Bottleneck(activation="tanh"),
        lambda: Bottleneck(form="across"),
        lambda: Bottleneck(scale=0.0),
        lambda: Prefix(length=0),
        lambda: Tokens("two words"),
        lambda: Tokens("<a>,<A>"),
        lambda: Tokens("<a>", 0),
        lambda: Tokens("<a>,<b>", initial="cat"),
        lambda: Tokens("<a>", ids="12"),  # type: ignore[arg-type]
        lambda: SoftPrompt(0),
    ):
        with pytest.raises(UserError):
            wrong()


# Prefixes


@torch.no_grad()
def test_a_prefix_adds_what_the_queries_find_in_it(tiny_pipe: DiffusionPipeline) -> None:
    attention = tiny_pipe.unet.get_submodule(ATTENTION)
    width = attention.to_q.out_features
    x = torch.randn(2, 9, width)
    plain = attention(x)
    site.attach(tiny_pipe.unet, "a", Prefix(length=5), ATTENTION.replace(".", r"\."))
    assert torch.equal(attention(x), plain)
    randomize(tiny_pipe.unet, "a")
    part, heads = adapter_of(attention, PrefixAdapter), attention.heads
    found = []
    for head in range(heads):
        here = slice(head * width // heads, (head + 1) * width // heads)
        scores = attention.to_q(x)[..., here] @ part.keys[:, here].T / (width // heads) ** 0.5
        found.append(scores.softmax(-1) @ part.values[:, here])
    expected = plain + torch.cat(found, -1) @ attention.to_out[0].weight.T
    assert torch.allclose(attention(x), expected, atol=1e-5)
    assert parameters(tiny_pipe.unet) == 2 * 5 * width


@torch.no_grad()
def test_a_prefix_is_the_second_term_of_prefix_tuning() -> None:
    """Li and Liang's attention over [P; K] is a mean of both terms, weighed by their shares of the softmax."""
    q, k, v, pk, pv = (torch.randn(n, 8, dtype=torch.float64) for n in (6, 7, 7, 3, 3))
    both = F.scaled_dot_product_attention(q, torch.cat([pk, k]), torch.cat([pv, v]))
    share = torch.sigmoid((q @ pk.T / 8**0.5).logsumexp(-1) - (q @ k.T / 8**0.5).logsumexp(-1))[:, None]
    ours = F.scaled_dot_product_attention(q, pk, pv)
    assert torch.allclose(both, (1 - share) * F.scaled_dot_product_attention(q, k, v) + share * ours)


# Tokens


def test_placeholders_are_whole_words_of_one_token_a_vector(tiny_pipe: DiffusionPipeline) -> None:
    tokenizer = tiny_pipe.tokenizer
    kind, backend = type(tokenizer), tokenizer._tokenizer
    plain = {text: tokenizer(text).input_ids for text in ("a <cattle>", "asks", "a cat")}
    attach_words(tiny_pipe, Tokens("<cat>,sks", 3, "red,dog"))
    new = list(learned(tokenizer).values())
    assert len(new) == 6 and min(new) >= len(tokenizer)
    assert {text: tokenizer(text).input_ids for text in plain} == plain
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    a = plain["a cat"][1]
    assert tokenizer("a <cat>").input_ids == [start, a, *new[:3], end]
    assert tokenizer(["SKS", "<CAT> a"]).input_ids == [[start, *new[3:], end], [start, *new[:3], a, end]]
    assert tiny_pipe.maybe_convert_prompt("a <cat>", tokenizer) == "a <cat>"
    site.detach(tiny_pipe.text_encoder, "a")
    teach(tiny_pipe)
    assert type(tokenizer) is kind and tokenizer._tokenizer is backend and SLOT not in vars(tokenizer)
    assert {text: tokenizer(text).input_ids for text in plain} == plain


@pytest.mark.slow
@torch.no_grad()
def test_every_entry_of_a_tokenizer_reads_learned_words_alike(tiny_pipe: DiffusionPipeline, tmp_path: Path) -> None:
    tokenizer, text = tiny_pipe.tokenizer, "a <cat>, red sks dog"
    plain = tokenizer("a red dog").input_ids
    said, size = tokenizer.decode(plain), len(tokenizer)
    attach_words(tiny_pipe, Tokens("<cat>,sks", 3, "red,dog"))
    ids = tokenizer(text).input_ids
    assert tokenizer.encode(text) == ids == tokenizer([text]).input_ids[0] and len(ids) == 2 + 5 - 1 + 6
    names = tokenizer.tokenize(text)
    assert names == tokenizer.convert_ids_to_tokens(ids[1:-1]) and tokenizer.convert_tokens_to_ids(names) == ids[1:-1]
    # compel makes text of tokens, lets diffusers put in what it has learned, and tokens of that again.
    again = tiny_pipe.maybe_convert_prompt(tokenizer.decode(ids[1:-1]), tokenizer)
    assert again == "a <cat> , red sks dog" and tokenizer.encode(again, add_special_tokens=False) == ids[1:-1]
    assert tokenizer.decode(plain) == said and tokenizer.decode([ids[1:-1]] * 2) == [again] * 2
    assert tokenizer.decode(ids[3]) == "<cat>|1"
    both = [*ids, tokenizer.eos_token_id, *ids[1:]]  # as a pair of any texts is marked
    assert tokenizer(text, text).input_ids == both == tokenizer([(text, text)]).input_ids[0]
    assert tokenizer([text], [text]).input_ids == [both]
    words = ["a", "<cat>", ",", "red", "sks", "dog"]
    assert tokenizer(words, is_split_into_words=True).input_ids == ids
    assert tokenizer([words, ["a"]], is_split_into_words=True).input_ids == [ids, tokenizer("a").input_ids]
    assert tokenizer("a red dog", return_offsets_mapping=True).offset_mapping[1:3] == [(0, 1), (2, 5)]
    with pytest.raises(UserError, match="offsets of tokens are not known in a text with learned words"):
        tokenizer(text, return_offsets_mapping=True)
    # What is saved is what others can load: the base, whose embedding has a row for every word of its tokenizer.
    tiny_pipe.save_pretrained(tmp_path)
    saved = type(tiny_pipe).from_pretrained(tmp_path)
    assert len(saved.tokenizer) == len(tokenizer) == size == saved.text_encoder.get_input_embeddings().num_embeddings
    assert saved.text_encoder(torch.tensor([saved.tokenizer(text).input_ids])).last_hidden_state.isfinite().all()


def test_a_soft_prompt_precedes_the_words_of_a_prompt_and_the_first_of_two_texts(tiny_pipe: DiffusionPipeline) -> None:
    tokenizer = tiny_pipe.tokenizer
    attach_words(tiny_pipe, SoftPrompt(3))
    ids = tokenizer("a red dog").input_ids
    assert len(ids) == 3 + 5 and min(ids[1:4]) >= len(tokenizer)
    assert tokenizer(["a", "red", "dog"], is_split_into_words=True).input_ids == ids
    both = [*ids, tokenizer.eos_token_id, *ids[4:]]
    assert tokenizer("a red dog", "a red dog").input_ids == both == tokenizer([("a red dog",) * 2]).input_ids[0]


@torch.no_grad()
def test_words_that_others_add_stand_beside_learned_ones_and_after_them(tiny_pipe: DiffusionPipeline) -> None:
    encoder, tokenizer = tiny_pipe.text_encoder, tiny_pipe.tokenizer
    attach_words(tiny_pipe, Tokens("<cat>", 2, "red"))
    randomize(encoder, "a")
    meant = encoder(torch.tensor([tokenizer("a <cat>").input_ids])).last_hidden_state
    vector = torch.arange(32.0)
    tiny_pipe.load_textual_inversion({"<other>": vector}, token="<other>")  # adds a word and resizes the embedding
    start, a, *ids, end = tokenizer("a <cat> <other>").input_ids
    assert len(ids) == 3 and ids[2] == len(tokenizer) - 1 == encoder.get_input_embeddings().num_embeddings - 1
    table = encoder.get_input_embeddings()
    assert torch.equal(table(torch.tensor([ids]))[0, 2], vector)
    vectors = next(iter(site.adapters(encoder, "a").values())).get_parameter("vectors")
    assert torch.allclose(table(torch.tensor([ids]))[0, :2], vectors, atol=1e-6)
    assert torch.equal(encoder(torch.tensor([tokenizer("a <cat>").input_ids])).last_hidden_state, meant)
    with pytest.raises(UserError, match="teaches the word '<cat>' already"):
        tokenizer.add_tokens(["<cat>"])
    site.detach(encoder, "a")
    teach(tiny_pipe)
    assert tokenizer("a <other>").input_ids == [start, a, ids[2], end]
    assert torch.equal(encoder.get_input_embeddings()(torch.tensor(ids[2])), vector)


@torch.no_grad()
def test_new_words_mean_their_initial_words_until_they_are_trained(tiny_pipe: DiffusionPipeline) -> None:
    encoder, tokenizer = tiny_pipe.text_encoder, tiny_pipe.tokenizer

    def told(prompt: str) -> torch.Tensor:
        ids = tokenizer(prompt, padding="max_length", return_tensors="pt").input_ids
        found: torch.Tensor = encoder(ids).last_hidden_state
        return found

    wanted, plain, matrix = told("a red red"), told("a dog"), encoder.state_dict()
    attach_words(tiny_pipe, Tokens("<new>", 2, "red"))
    assert torch.equal(told("a <new>"), wanted)
    randomize(encoder, "a")
    assert not torch.equal(told("a <new>"), wanted) and torch.equal(told("a dog"), plain)
    vectors = next(iter(site.adapters(encoder, "a").values())).get_parameter("vectors")
    ids = torch.tensor(tokenizer("<new>", add_special_tokens=False).input_ids)
    assert torch.allclose(encoder.get_input_embeddings()(ids[None])[0], vectors, atol=1e-6)
    strengths_of(encoder).write({"a": 0.0})
    assert torch.equal(told("a <new>"), wanted)
    assert encoder.state_dict().keys() == matrix.keys() and parameters(encoder) == 2 * 32
    strengths_of(encoder).write({"a": 0.5})
    with pytest.raises(FoldError, match=r"<new>.*cannot be merged"):
        merge.merge(encoder)


@pytest.mark.slow
@torch.no_grad()
def test_a_soft_prompt_precedes_the_prompts_of_images_that_have_it(tiny_pipe: DiffusionPipeline) -> None:
    tokenizer = tiny_pipe.tokenizer
    before = picture(tiny_pipe)
    start, *words, end = tokenizer("a dog").input_ids
    attach_words(tiny_pipe, SoftPrompt(3, "flat red"))
    new = list(learned(tokenizer).values())
    assert tokenizer("a dog").input_ids == [start, *new, *words, end]
    randomize(tiny_pipe.text_encoder, "a")
    assert not np.array_equal(picture(tiny_pipe), before)
    strengths = strengths_of(tiny_pipe.text_encoder)
    strengths.write({"a": [0.0, 0.5]})
    assert tokenizer(["a dog"] * 2).input_ids == [[start, *words, end], [start, *new, *words, end]]
    strengths.write({"a": 0.0})
    assert np.array_equal(picture(tiny_pipe), before)


def test_words_that_clash_or_do_not_fit_are_errors_that_change_nothing(tiny_pipe: DiffusionPipeline) -> None:
    attach_words(tiny_pipe, Tokens("<cat>", 2))
    ids = tiny_pipe.tokenizer("<cat>").input_ids
    for method, words in [
        (Tokens("<Cat>"), "'a' and 'b' both teach the word '<Cat>'"),
        (Tokens("dog"), "'dog', which the base knows already"),
        (SoftPrompt(75), "leave no room"),
    ]:
        site.attach(tiny_pipe.text_encoder, "b", with_initial_tokens(tiny_pipe, "text_encoder", method), "tokens")
        with pytest.raises(UserError, match=words):
            teach(tiny_pipe)
        assert tiny_pipe.tokenizer("<cat>").input_ids == ids
        site.detach(tiny_pipe.text_encoder, "b")
    with pytest.raises(UserError, match="have 3 tokens, for 2 vectors"):
        with_initial_tokens(tiny_pipe, "text_encoder", SoftPrompt(2, "red cat house"))
    with pytest.raises(UserError, match="unet is not"):
        with_initial_tokens(tiny_pipe, "unet", Tokens())
    with pytest.raises(UserError, match="with_initial_tokens"):
        site.attach(tiny_pipe.text_encoder, "b", Tokens(), "tokens")


@torch.no_grad()
def test_models_that_look_for_the_largest_id_still_find_the_end_of_text(tiny_pipe: DiffusionPipeline) -> None:
    encoder, tokenizer = tiny_pipe.text_encoder, tiny_pipe.tokenizer
    owner = next(module for module in encoder.modules() if "eos_token_id" in vars(module))
    attach_words(tiny_pipe, Tokens("<cat>", 2, "cat"))
    ids = tokenizer("a <cat> dog", padding="max_length", return_tensors="pt").input_ids
    expected = encoder(ids).pooler_output
    site.detach(encoder, "a")
    teach(tiny_pipe)
    owner.eos_token_id = 2  # as the configurations of Stable Diffusion 1 and XL have it
    attach_words(tiny_pipe, Tokens("<cat>", 2, "cat"))
    assert torch.equal(encoder(ids).pooler_output, expected)
    site.detach(encoder, "a")
    teach(tiny_pipe)
    assert owner.eos_token_id == 2


# Files of new words


def save_word(path: Path, pipe: DiffusionPipeline, *methods: Method) -> torch.Tensor:
    """A file of token methods alone."""
    ready = [with_initial_tokens(pipe, "text_encoder", method) for method in methods]
    site.attach_all(pipe.text_encoder, "w", [(method, "tokens") for method in ready])
    randomize(pipe.text_encoder, "w")
    formats.save(path, {"text_encoder": pipe.text_encoder}, "w", formats.Spec(base=asdict(describe(pipe))))
    return next(iter(site.adapters(pipe.text_encoder, "w").values())).get_parameter("vectors").detach()


@pytest.mark.slow
@torch.no_grad()
def test_one_word_alone_is_a_file_that_diffusers_reads(tiny_pipe: DiffusionPipeline, tmp_path: Path) -> None:
    vectors = save_word(tmp_path / "renamed.safetensors", tiny_pipe, Tokens("<cat>", 3, "cat"))
    assert list(load_file(tmp_path / "renamed.safetensors")) == ["emb_params"]
    other = make_pipe()
    other.load_textual_inversion(tmp_path / "renamed.safetensors", token="<theirs>")
    theirs = other.tokenizer(other.maybe_convert_prompt("<theirs>", other.tokenizer), add_special_tokens=False).input_ids
    assert torch.equal(other.text_encoder.get_input_embeddings().weight[theirs], vectors)
    pipe = make_pipe()
    Adapters(pipe).load(tmp_path / "renamed.safetensors", name="word")
    (ours,) = site.adapters(pipe.text_encoder, "word").values()
    assert torch.equal(ours.get_parameter("vectors"), vectors) and ours.words == {"<cat>": (200, 200, 200)}
    found = formats.inspect(tmp_path / "renamed.safetensors")
    assert found.methods == ("tokens",) and found.parameters == 96 and found.components == {"text_encoder": 1}


@pytest.mark.slow
@torch.no_grad()
def test_words_beside_other_methods_are_bundled(tiny_pipe: DiffusionPipeline, tmp_path: Path) -> None:
    save_mixture(tmp_path / "mix.safetensors", tiny_pipe)
    tensors = load_file(tmp_path / "mix.safetensors")
    (ours,) = (part for part in _parts(tiny_pipe, "mix") if type(part).__name__ == "TokensAdapter")
    assert torch.equal(tensors["bundle_emb.<cat>.clip_l"], ours.get_parameter("vectors"))
    found = formats.inspect(tmp_path / "mix.safetensors")
    assert found.methods == ("bitfit", "bottleneck", "lora", "prefix", "prompt", "tokens") and not found.unknown
    assert found.parameters == sum(parameters(components(tiny_pipe)[part], "mix") for part in MIXTURE)


@torch.no_grad()
@pytest.mark.parametrize(
    "name, content, word",
    [
        ("my cat.pt", {"string_to_token": {"*": 265}, "string_to_param": {"*": torch.ones(2, 32)}, "name": "x"}, "my_cat"),
        ("own.safetensors", {"emb_params": torch.ones(2, 32)}, "own"),
        ("trainer.safetensors", {"emp_params": torch.ones(2, 32)}, "trainer"),
        ("scripts.safetensors", {"<toy>": torch.ones(2, 32)}, "<toy>"),
        ("scripts.bin", {"<toy>": torch.ones(2, 32)}, "<toy>"),
        ("bundle.safetensors", {"bundle_emb.toy.clip_l": torch.ones(2, 32)}, "toy"),
    ],
)
def test_words_of_other_programs_load(
    tiny_pipe: DiffusionPipeline, tmp_path: Path, name: str, content: dict[str, Any], word: str
) -> None:
    file = tmp_path / name
    save_file(content, file) if file.suffix == ".safetensors" else torch.save(content, file)
    Adapters(tiny_pipe).load(file, name="theirs", strict=True)
    ids = tiny_pipe.tokenizer(f"a {word}", add_special_tokens=False, return_tensors="pt").input_ids[:, 1:]
    assert torch.allclose(tiny_pipe.text_encoder.get_input_embeddings()(ids), torch.ones(1, 2, 32))


@pytest.mark.slow
@torch.no_grad()
def test_a_word_has_vectors_for_both_text_encoders_of_xl(tmp_path: Path) -> None:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    def base() -> SimpleNamespace:
        first, second = make_pipe(), make_pipe()
        config = CLIPTextConfig(**{**second.text_encoder.config.to_dict(), "hidden_size": 48, "intermediate_size": 64})
        torch.manual_seed(0)
        return SimpleNamespace(
            **first.components,
            config={},
            text_encoder_2=CLIPTextModelWithProjection(config).eval().requires_grad_(False),
            tokenizer_2=second.tokenizer,
        )

    made, parts = base(), {}
    for name in ("text_encoder", "text_encoder_2"):
        parts[name] = getattr(made, name)
        site.attach(parts[name], "w", with_initial_tokens(made, name, Tokens("<cat>", 2, "cat")), "tokens")
        randomize(parts[name], "w")
    file = tmp_path / "cat.safetensors"
    formats.save(file, parts, "w", formats.Spec())
    tensors = load_file(file)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {"clip_l": (2, 32), "clip_g": (2, 48)}
    fresh = base()
    for name, built in formats.load(file, fresh, strict=True).components.items():
        site.attach_built(getattr(fresh, name), "w", built)
    teach(fresh)
    ids = fresh.tokenizer_2("<cat>", add_special_tokens=False, return_tensors="pt").input_ids
    assert torch.allclose(fresh.text_encoder.get_input_embeddings()(ids)[0], tensors["clip_l"])
    assert torch.allclose(fresh.text_encoder_2.get_input_embeddings()(ids)[0], tensors["clip_g"])


def test_a_word_for_another_base_is_an_error(tiny_pipe: DiffusionPipeline, tmp_path: Path) -> None:
    save_file({"emb_params": torch.ones(2, 768)}, tmp_path / "sd.safetensors")
    with pytest.raises(UserError, match=r"does not fit the base.*\(2, 768\).*width here is 32"):
        Adapters(tiny_pipe).load(tmp_path / "sd.safetensors")
    assert not site.sites(tiny_pipe.text_encoder)


# All together


@pytest.mark.slow
def test_a_mixture_is_one_file_and_blends_image_by_image(tiny_pipe: DiffusionPipeline, tmp_path: Path) -> None:
    file = save_mixture(tmp_path / "mix.safetensors", make_pipe())
    other = save_mixture(tmp_path / "other.safetensors", make_pipe(), seed=5)
    digest, before = checksum(components(tiny_pipe)), picture(tiny_pipe)
    adapters = Adapters(tiny_pipe)
    adapters.load(file, name="mix", strict=True)
    with pytest.raises(UserError, match="'mix' and 'other' both teach the word '<cat>'"):
        adapters.load(other)
    assert adapters.names == ("mix",) and not np.array_equal(picture(tiny_pipe), before)
    kinds = {type(part).__name__ for part in _parts(tiny_pipe, "mix")}
    adapters_of = {
        "LoraAdapter",
        "BottleneckAdapter",
        "BitFitAdapter",
        "PrefixAdapter",
        "TokensAdapter",
        "SoftPromptAdapter",
    }
    assert kinds == adapters_of
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))

    def pictures(prompts: list[str]) -> list[np.ndarray]:
        latents = noise.repeat(len(prompts), 1, 1, 1)
        out = tiny_pipe(prompts, num_inference_steps=3, height=64, width=64, latents=latents)
        return [np.asarray(image).astype(int) for image in out.images]

    amounts, prompts = [0.0, 0.4, 1.0], ["a cat", "a <cat>", "a <cat>"]
    adapters.set(mix=amounts)
    together = pictures(prompts)
    for amount, prompt, expected in zip(amounts, prompts, together, strict=True):
        adapters.set(mix=amount)
        assert np.abs(pictures([prompt])[0] - expected).max() <= 1
    with pytest.raises(UserError, match="cannot be merged"):
        adapters.merge()
    adapters.remove("mix")
    assert checksum(components(tiny_pipe)) == digest and np.array_equal(picture(tiny_pipe), before)


@pytest.mark.slow
def test_a_mixture_saved_again_is_the_same_file(tiny_pipe: DiffusionPipeline, tmp_path: Path) -> None:
    file = save_mixture(tmp_path / "mix.safetensors", tiny_pipe)
    drawn = picture(tiny_pipe, steps=4)
    fresh = make_pipe()
    adapters = Adapters(fresh)
    adapters.load(file, name="mix")
    # The same numbers in another place of the memory are not always summed in the same order.
    assert np.abs(picture(fresh, steps=4).astype(int) - drawn.astype(int)).max() <= 1
    parts = {component: components(fresh)[component] for component in MIXTURE}
    formats.save(tmp_path / "again.safetensors", parts, "mix", adapters["mix"].spec)
    first, again = (load_file(path) for path in (file, tmp_path / "again.safetensors"))
    assert list(first) == list(again) and all(torch.equal(first[key], again[key]) for key in first)


def _parts(pipe: DiffusionPipeline, name: str) -> Iterator[Adapter]:
    for part in components(pipe).values():
        for adapter in site.adapters(part, name).values():
            yield from getattr(adapter, "parts", [adapter])


ORDERED = {"bottleneck"}  # the sequential form: it reads what came before
PAIRS = {
    "lora": (Lora(rank=4), "attention+ff"),
    "dora": (Dora(rank=4), "attention+ff"),
    "loha": (Loha(rank=3), "attention+ff"),
    "lokr": (Lokr(rank=2, factor=4), "attention+ff"),
    "oft": (Oft(block_size=4), "attention+ff"),
    "ia3": (Ia3(), "attention+ff"),
    "bitfit": (BitFit(), "biases"),
    "bottleneck": (Bottleneck(hidden=4), "outputs"),
    "parallel": (Bottleneck(hidden=4, form="parallel"), "outputs"),
    "prefix": (Prefix(length=3), "attentions"),
}


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize(("one", "other"), itertools.combinations(PAIRS, 2))
def test_order_matters_to_a_sequential_bottleneck_alone(one: str, other: str) -> None:
    outputs = []
    for names in ((one, other), (other, one)):
        unet = make_pipe().unet
        for name in names:
            method, target = PAIRS[name]
            torch.manual_seed(list(PAIRS).index(name))  # what a fresh adapter starts as
            site.attach(unet, name, method, target)
            randomize(unet, name, seed=list(PAIRS).index(name))
        generator = torch.Generator().manual_seed(7)
        x, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 7, 32, generator=generator)
        outputs.append(unet(x, torch.tensor(500), encoder_hidden_states=text).sample)
    difference = float((outputs[0] - outputs[1]).abs().max() / outputs[0].abs().max())
    # A prefix sits at the whole attention, of whose output projection the bottleneck is a part: they never meet.
    ordered = not ORDERED.isdisjoint({one, other}) and "prefix" not in (one, other)
    assert (difference > 1e-3) if ordered else (difference < 1e-5)
