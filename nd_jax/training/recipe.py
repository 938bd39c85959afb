"""What the loop asks of a recipe, and nothing more."""

from __future__ import annotations

from typing import Any, Protocol

import jax

from nd_jax.training.sharding import Rules

State = Any
Batch = Any
Metrics = dict[str, Any]


class Recipe(Protocol):
    """A training method as two pure functions and two descriptions.

    The loop traces ``init`` and ``step`` exactly once each; both must be deterministic in their arguments.
    """

    rules: Rules
    """Path rules for the parameters: how they are split over the mesh, and which optimizer group they join."""

    def init(self, key: jax.Array, *given: Any) -> State:
        """The state before the first step. Traceable.

        ``given`` is what the caller handed to ``train(..., given=...)``: trees of arrays such as imported or pruned
        parameters. The state is usually a ``TrainState``; any tree works whose top level has ``step`` (int32 scalar)
        and ``params``, and whose other large leaves are shaped like parameters or covered by ``rules``.
        """
        ...

    def step(self, state: State, batch: Batch) -> tuple[State, Metrics]:
        """One update. Traceable and pure: randomness comes from the state's key, ``state.step`` grows by one.

        Metrics are scalars in a dict, which may nest (``{"loss": {"flow": x}}`` is logged as ``loss/flow``). The loop
        stops when one of them is not finite, so name them after what they measure.
        """
        ...

    def batch_spec(self) -> Any:
        """Shapes and dtypes of one *global* batch, as a tree of ``jax.ShapeDtypeStruct``.

        Axis 0 of every leaf counts examples and is split over the mesh; scalars and leaves with axis 0 of length 1
        are replicated.
        """
        ...
