"""Operations on adapters in any order; ``scripts/check_adapters.py`` runs thousands."""

from pathlib import Path

import pytest
from conftest import make_pipe

from scripts.check_adapters import World, check


@pytest.mark.slow
def test_operations_in_any_order_draw_as_a_plain_model_does(tmp_path: Path) -> None:
    world = World(make_pipe(), tmp_path)
    check(world, 12, 25)
    assert world.counts.total() > 150 and world.counts.keys() == {"load", "set", "swap", "remove", "merge", "draw"}
