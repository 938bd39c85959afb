"""Names of the ContextAdapter. A hidden layer is a small torch sequence, of which the matrix is number 1."""

from __future__ import annotations

from nd_jax.converters.tables import Extras, Rule, linear
from nd_jax.models.context_adapter import ContextAdapterConfig


def rules(config: ContextAdapterConfig) -> list[Rule]:
    """All parameters."""
    return [
        *linear("network_layers/{number}", "network_layers.{number}.1"),
        *linear("output_layer", f"network_layers.{len(config.layer_depths)}.0"),
    ]


def extras(config: ContextAdapterConfig) -> Extras:
    """Nothing beside the parameters."""
    return Extras()
