"""Damaged and hostile files end in a right load or in one line: 2,000 cases, always the same. See ``scripts/fuzz.py``."""

from pathlib import Path

import pytest
from conftest import make_pipe

from scripts import fuzz

CASES = 2000


@pytest.fixture(scope="module")
def world(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> fuzz.World:
    return fuzz.World(make_pipe(), tiny_base, tmp_path_factory.mktemp("fuzz"))


@pytest.mark.slow
@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_files_of_others_are_loaded_right_or_refused_in_a_line(name: str, world: fuzz.World) -> None:
    fuzz.run(world, name, round(CASES * fuzz.TARGETS[name][2]))
    assert sum(world.ended[name].values()) > 10
    assert world.ended[name]["loaded"] and (world.ended[name]["refused"] or name in ("captions", "jsonl", "beside"))
