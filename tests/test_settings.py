"""Settings: what stands once in a field, and everything that is made from it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest

from peft_diffusion.core.settings import pick


@dataclass(frozen=True)
class Whole:
    steps: int = 300
    seed: int = 0
    folder: str = "pictures"


@dataclass(frozen=True)
class Part:
    seed: int
    steps: int = 1
    rates: Mapping[str, float] = field(default_factory=dict)


def test_a_part_is_picked_from_a_whole_by_equal_names() -> None:
    assert pick(Part, Whole(), {"rates": {"unet": 0.1}}) == Part(0, 300, {"unet": 0.1})
    assert pick(Part, Whole(), {"rates": {}, "seed": 7}).seed == 7  # the later one counts


def test_a_field_that_no_source_has_is_refused_although_it_has_a_default() -> None:
    with pytest.raises(TypeError, match="Part needs rates, which none of its sources has"):
        pick(Part, Whole())
