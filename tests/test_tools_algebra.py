"""Pairs and rules against what they stand for, written out: full decompositions, numpy, and peft's own rules."""

import numpy as np
import pytest
import torch
from peft.utils import merge_utils
from torch import Tensor

from peft_diffusion.core.adapter import LowRank
from peft_diffusion.core.errors import UserError
from peft_diffusion.core.reduction import Truncation, reduced_matrix, reduced_pair, summed
from peft_diffusion.tools.combination import Combination, core_space, knots, linear
from peft_diffusion.tools.grams import Gram, Seen
from peft_diffusion.tools.merging import _Matching
from peft_diffusion.tools.output_matching import columns_matched, damped, matched, missed
from peft_diffusion.tools.side_by_side import side_by_side

STRENGTHS = (0.7, -0.4, 1.1)


def pair(seed: int, rank: int = 6, outputs: int = 40, inputs: int = 30) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(rank, inputs, generator=generator), torch.randn(outputs, rank, generator=generator) / rank)


def product(one: LowRank) -> Tensor:
    return one.up @ one.down


def with_values(values: Tensor, outputs: int, inputs: int) -> Tensor:
    """A matrix of these singular values."""
    generator = torch.Generator().manual_seed(3)
    left = torch.linalg.qr(torch.randn(outputs, len(values), generator=generator))[0]
    right = torch.linalg.qr(torch.randn(inputs, len(values), generator=generator))[0]
    matrix: Tensor = left @ torch.diag(values) @ right.mT
    return matrix


def best_error(matrix: Tensor, rank: int) -> float:
    """What the best approximation of a rank leaves out (Eckart and Young), by numpy in float64."""
    values = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
    return float(np.sqrt((values[rank:] ** 2).sum() / (values**2).sum()))


def test_a_sum_of_pairs_of_different_ranks_is_exact() -> None:
    several = [pair(1, 4), pair(2, 9), pair(3, 1)]
    assert torch.allclose(product(summed(several)), sum(map(product, several), torch.zeros(40, 30)), atol=1e-5)


@pytest.mark.parametrize("shape", [(40, 30), (12, 50), (50, 12)])  # the rank is 18: also above both sides
def test_a_pair_is_reduced_as_well_as_by_a_decomposition_of_the_whole(shape: tuple[int, int]) -> None:
    whole = summed([pair(seed, 6, *shape) for seed in (1, 2, 3)])
    found = reduced_pair(whole, Truncation(rank=5))
    matrix = product(whole)
    left_out = float((matrix - product(found.pair)).norm() / matrix.norm())
    assert found.pair.down.shape == (5, shape[1])
    assert left_out == pytest.approx(best_error(matrix, 5), rel=1e-4)
    assert found.error == pytest.approx(best_error(matrix, 5), rel=1e-4)
    assert found.norm == pytest.approx(float(matrix.norm()), rel=1e-5)
    assert float(found.pair.up.norm()) == pytest.approx(float(found.pair.down.norm()), rel=1e-4)


def gram(seed: int, inputs: int = 30, rows: int = 50) -> Tensor:
    """Of inputs that are alike in part, as those of a layer are."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, inputs, generator=generator).double() @ torch.randn(inputs, inputs, generator=generator).double()
    return x.T @ x / rows


@pytest.mark.parametrize("rank", [30, 4])
@pytest.mark.parametrize("off_diagonal", [1.0, 0.9])
def test_outputs_are_matched_as_by_regmean_written_out(rank: int, off_diagonal: float) -> None:
    """On whole matrices in float64, by numpy; the third adapter changes nothing here, and its outputs are to stay."""
    pairs, raw = [pair(1), pair(2, 9), None], [gram(seed).numpy() for seed in (1, 2, 3)]
    changes = [np.zeros((40, 30)) if one is None else product(one).double().numpy() for one in pairs]
    grams = [off_diagonal * one + (1 - off_diagonal) * np.diag(np.diag(one)) for one in raw]
    best = sum(change @ one for change, one in zip(changes, grams, strict=True)) @ np.linalg.inv(sum(grams))
    values, vectors = np.linalg.eigh(sum(grams))
    root, inverse = (vectors * values**power @ vectors.T for power in (0.5, -0.5))
    u, singular, v = np.linalg.svd(best @ root, full_matrices=False)
    expected = (u[:, :rank] * singular[:rank]) @ v[:rank] @ inverse
    found = matched(pairs, [damped(torch.from_numpy(one), off_diagonal) for one in raw], rank)
    np.testing.assert_allclose(product(found).numpy(), expected, atol=2e-4 * np.abs(expected).max())

    def objective(change: np.ndarray) -> float:
        return float(sum(np.trace((change - own) @ one @ (change - own).T) for own, one in zip(changes, grams, strict=True)))

    whole = np.sum(changes, 0)
    others = [whole, whole / 3, product(reduced_matrix(torch.from_numpy(whole), Truncation(rank)).pair).numpy()]
    assert all(objective(product(found).double().numpy()) < objective(other) for other in others)
    x = torch.randn(20, 30, generator=torch.Generator().manual_seed(7))
    apart = x.double().numpy() @ (product(found).double().numpy() - changes[0]).T
    assert missed(found, pairs[0], x) == pytest.approx(np.sqrt((apart**2).sum(1).mean()), rel=1e-4)


@pytest.mark.parametrize("rank", [15, 4])
def test_columns_are_matched_as_by_least_squares_written_out(rank: int) -> None:
    """On whole matrices in float64, one unknown for each input of each change, by numpy's lstsq on the inputs themselves."""
    generator = np.random.default_rng(0)
    pairs, inputs = [pair(1), None, pair(2, 9)], [generator.normal(size=(50, 30)) / 50**0.5 for _ in range(3)]
    changes = [np.zeros((40, 30)) if one is None else product(one).double().numpy() for one in pairs]
    # Row by row of inputs x, the outputs are sum_i sum_c dW_i[:, c] x[c] d_i[c].
    rows = np.concatenate([np.concatenate([x[:, None, :] * one for one in (changes[0], changes[2])], 2) for x in inputs])
    wanted = np.concatenate([x @ own.T for x, own in zip(inputs, changes, strict=True)])
    coefficients = np.linalg.lstsq(rows.reshape(-1, 60), wanted.ravel(), rcond=None)[0]
    best = changes[0] * coefficients[:30] + changes[2] * coefficients[30:]
    stacked = np.concatenate(inputs)
    values, vectors = np.linalg.eigh(stacked.T @ stacked)
    root, inverse = (vectors * values**power @ vectors.T for power in (0.5, -0.5))
    u, singular, v = np.linalg.svd(best @ root, full_matrices=False)
    found = product(columns_matched(pairs, [torch.from_numpy(x.T @ x) for x in inputs], rank)).numpy()
    np.testing.assert_allclose(found, (u[:, :rank] * singular[:rank]) @ v[:rank] @ inverse, atol=2e-4 * np.abs(best).max())


def test_inputs_that_never_occur_change_nothing() -> None:
    """A Gram matrix of few rows, and one of none, can still be divided by."""
    few = torch.randn(3, 30, generator=torch.Generator().manual_seed(1)).double()
    found = matched([pair(1)], [few.T @ few], 30)
    assert missed(found, pair(1), few) < 1e-3 * missed(pair(1), None, few)
    for match in (matched, columns_matched):
        assert bool(product(match([pair(1)], [torch.zeros(30, 30).double()], 30)).isfinite().all())


def test_all_ranks_leave_nothing_out() -> None:
    one = pair(1, 6)
    found = reduced_pair(one, Truncation())
    assert found.error == 0
    assert torch.allclose(product(found.pair), product(one), atol=1e-5)


@pytest.mark.parametrize("falling", [0.5, 1.0])  # as of a fine-tuned weight, and slower
def test_a_large_matrix_is_reduced_nearly_as_well_as_by_a_full_decomposition(falling: float) -> None:
    values = torch.arange(1, 301).float() ** -falling
    matrix = with_values(values, 400, 300)
    found = reduced_matrix(matrix, Truncation(rank=16))
    assert found.error == pytest.approx(best_error(matrix, 16), rel=2e-3)
    assert found.error >= best_error(matrix, 16) * (1 - 1e-5)
    assert torch.equal(found.pair.up, reduced_matrix(matrix, Truncation(rank=16)).pair.up)  # chance has a seed


def test_numbers_of_ranks_are_those_of_kohyas_formulas() -> None:
    values = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.5, 0.5])  # their sum is 16, that of their squares 85.5
    # resize_lora.py: index_sv_cumulative, index_sv_fro and index_sv_ratio, each plus 1
    assert Truncation(energy=0.74).kept(values) == 2  # 12 of 16 are 0.75
    assert Truncation(energy=0.76).kept(values) == 3
    assert Truncation(frobenius=0.966).kept(values) == 2  # sqrt(80 / 85.5) is 0.9673
    assert Truncation(frobenius=0.968).kept(values) == 3
    assert Truncation(ratio=4).kept(values) == 2  # above 2, and 2 itself is not
    assert Truncation(ratio=4.1).kept(values) == 3
    assert Truncation(rank=2, energy=0.99).kept(values) == 2  # the rank is the most
    assert Truncation(energy=1e-9).kept(values) == 1
    assert Truncation(energy=0.5).kept(torch.zeros(4)) == 1  # of a layer that changes nothing


@pytest.mark.parametrize("wanted", [Truncation(energy=0.6), Truncation(frobenius=0.9), Truncation(ratio=3)])
def test_a_large_matrix_keeps_as_many_ranks_as_its_exact_values_say(wanted: Truncation) -> None:
    values = torch.arange(1, 301).float() ** -0.7
    matrix = with_values(values, 300, 500)
    found = reduced_matrix(matrix, wanted)
    exact = torch.from_numpy(np.linalg.svd(matrix.double().numpy(), compute_uv=False))
    assert len(found.pair.down) == wanted.kept(exact)
    assert found.error == pytest.approx(best_error(matrix, len(found.pair.down)), rel=2e-3)


@pytest.mark.parametrize("rule", ["ties", "magnitude"])
def test_rules_are_those_of_peft(rule: str) -> None:
    changes = [product(pair(seed)) for seed in (1, 2, 3)]
    theirs = {"ties": merge_utils.ties, "magnitude": merge_utils.magnitude_prune}[rule]
    ours = Combination(rule, 0.3)(changes, STRENGTHS, 0)  # type: ignore[arg-type]
    assert torch.allclose(ours, theirs(changes, torch.tensor(STRENGTHS), 0.3), atol=1e-6)


@pytest.mark.parametrize("rule", ["dare-ties", "dare-linear"])
def test_dropping_nothing_is_what_peft_does_with_density_1(rule: str) -> None:
    changes = [product(pair(seed)) for seed in (1, 2, 3)]
    theirs = {"dare-ties": merge_utils.dare_ties, "dare-linear": merge_utils.dare_linear}[rule]
    ours = Combination(rule, 1.0)(changes, STRENGTHS, 0)  # type: ignore[arg-type]
    assert torch.allclose(ours, theirs(changes, torch.tensor(STRENGTHS), 1.0), atol=1e-6)


def test_dare_drops_its_share_and_keeps_the_mean() -> None:
    ones = torch.ones(200, 200)
    found = Combination("dare-linear", 0.25, seed=5)([ones], [1.0], 0)
    assert set(found.unique().tolist()) == {0.0, 4.0}
    assert float(found.mean()) == pytest.approx(1, abs=0.05)
    assert torch.equal(found, Combination("dare-linear", 0.25, seed=5)([ones], [1.0], 0))
    assert not torch.equal(found, Combination("dare-linear", 0.25, seed=5)([ones], [1.0], 1))  # at another site
    assert not torch.equal(found, Combination("dare-linear", 0.25, seed=6)([ones], [1.0], 0))


def written_out_knots(changes: list[Tensor], strengths: tuple[float, ...], rule: Combination) -> Tensor:
    """The paper's steps on whole matrices: decompose them side by side, merge what belongs to each, multiply."""
    u, values, v = torch.linalg.svd(torch.cat(changes, 1), full_matrices=False)
    kept = values > 1e-5 * values[0]
    parts = (values[kept, None] * v[kept]).split(changes[0].shape[1], 1)
    merged: Tensor = u[:, kept] @ rule(list(parts), strengths, 0)
    return merged


def written_out_core_space(several: list[LowRank], strengths: tuple[float, ...], rule: Combination) -> Tensor:
    left = torch.linalg.svd(torch.cat([one.up for one in several], 1), full_matrices=False)[0]
    right = torch.linalg.svd(torch.cat([one.down for one in several]), full_matrices=False)[2].mT
    cores = [left.mT @ one.up @ one.down @ right for one in several]
    merged: Tensor = left @ rule(cores, strengths, 0) @ right.mT
    return merged


@pytest.mark.parametrize("rule", [Combination("ties", 0.4), Combination("magnitude", 0.5)])
def test_knots_is_the_papers_steps(rule: Combination) -> None:
    several = [pair(1, 4), pair(2, 5), pair(3, 6)]
    found = product(knots(several, STRENGTHS, rule, 0))
    # A direction may point either way: TIES and trimming do not mind, as all parts turn with it; but + wins a draw.
    assert torch.allclose(found, written_out_knots([product(one) for one in several], STRENGTHS, rule), atol=1e-4)


@pytest.mark.parametrize("rule", [Combination("ties", 0.4), Combination("magnitude", 0.5)])
def test_core_space_is_the_papers_steps(rule: Combination) -> None:
    several = [pair(1, 4), pair(2, 5), pair(3, 6)]
    found = core_space(several, STRENGTHS, rule, 0)
    assert torch.allclose(product(found), written_out_core_space(several, STRENGTHS, rule), atol=1e-4)
    assert len(found.down) == 15


@pytest.mark.parametrize("align", [knots, core_space])
def test_an_alignment_that_keeps_all_is_the_sum(align: object) -> None:
    """Both are exact changes of basis: with a rule that only adds, nothing is lost, also where ranks exceed a side."""
    several = [pair(seed, 6, 12, 10) for seed in (1, 2, 3)]
    found = align(several, STRENGTHS, Combination("magnitude", 1.0), 0)  # type: ignore[operator]
    assert torch.allclose(product(found), linear([product(one) for one in several], STRENGTHS), atol=1e-5)


@pytest.mark.parametrize(
    ("outputs", "inputs", "rank", "own"),
    [(300, 70, 40, 40), (70, 300, 40, 12), (24, 30, 40, 40), (40, 24, 60, 3)],
    ids=["tall", "wide, of fewer ranks than written", "more ranks than rows", "all three"],
)
def test_a_pair_is_reduced_as_float64_does_it(outputs: int, inputs: int, rank: int, own: int) -> None:
    """The factors may have more ranks than the change has, and more than either side of the weight."""
    draw = torch.Generator().manual_seed(rank)
    mixed = torch.randn(own, rank, generator=draw)
    whole = LowRank(torch.randn(rank, inputs, generator=draw), torch.randn(outputs, own, generator=draw) @ mixed)
    for kept in (2, 8):
        found = reduced_pair(whole, Truncation(rank=kept))
        matrix = whole.up.double() @ whole.down.double()
        u, values, v = torch.linalg.svd(matrix, full_matrices=False)
        best = (u[:, :kept] * values[:kept]) @ v[:kept]
        assert float((product(found.pair).double() - best).norm()) < 1e-5 * float(matrix.norm())
        assert found.error == pytest.approx(float(values[kept:].norm() / matrix.norm()), abs=1e-5)
        assert torch.isfinite(found.pair.up).all() and torch.isfinite(found.pair.down).all()


def test_a_pair_of_zeros_is_reduced_to_zeros() -> None:
    found = reduced_pair(LowRank(torch.randn(4, 8), torch.zeros(6, 4)), Truncation(rank=2))
    assert not product(found.pair).any() and found.error == 0


def test_what_is_worked_on_side_by_side_comes_in_order_and_leaves_the_threads_of_torch() -> None:
    before, taken = torch.get_num_threads(), list[tuple[int, int]]()
    side_by_side(range(9), lambda one: (one, torch.get_num_threads()), taken.append, threads=3)
    assert taken == [(number, 1) for number in range(9)]

    def fails(one: int) -> int:
        if one == 4:
            raise UserError("the fifth")
        return one

    with pytest.raises(UserError, match="the fifth"):
        side_by_side(range(9), fails, lambda one: None, threads=3)
    assert torch.get_num_threads() == before


def test_outputs_are_matched_on_the_inputs_of_each_file_and_where_one_has_none_on_equal_ones() -> None:
    layer, other = ("unet", "layer"), ("unet", "other")
    seen = [Seen(Gram(number * torch.eye(2), rows=2), [torch.full((1, 2), float(number))]) for number in (1, 3)]
    matching = _Matching(["one", "two"], [{layer: seen[0]}, {layer: seen[1], other: seen[1]}], 1.0)
    grams, checked = matching.inputs(layer, 2)
    assert [one[0, 0].item() for one in grams] == [0.5, 1.5] and [one[0, 0].item() for one in checked] == [1.0, 3.0]
    for found in matching.inputs(other, 2):
        assert len(found) == 2 and all(torch.equal(one, torch.eye(2, dtype=one.dtype)) for one in found)
