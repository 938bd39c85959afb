"""Names of QuickSRNet, as the AIMET model zoo saves it."""

from __future__ import annotations

from nd_jax.converters.tables import Extras, Rule, conv2d
from nd_jax.models.quicksrnet import QuickSRNetConfig


def rules(config: QuickSRNetConfig) -> list[Rule]:
    """All parameters."""
    return [
        *conv2d("cnn/{n}", "cnn.{n}"),
        *conv2d("conv_last", "conv_last"),
        *conv2d("anchor/net", "anchor.net"),
    ]


def extras(config: QuickSRNetConfig) -> Extras:
    """Nothing beside the parameters."""
    return Extras()
