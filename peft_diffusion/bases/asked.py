"""What a person may say of a base that does not say it itself. Imports no torch."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, TypeAlias

AskedPrediction: TypeAlias = Literal["auto", "epsilon", "v"]
"""What a network predicts; ``auto`` is what its files say."""

PREDICTIONS: Mapping[str, str] = MappingProxyType({"epsilon": "epsilon", "v": "v_prediction"})
"""As the configurations of schedulers call them."""
