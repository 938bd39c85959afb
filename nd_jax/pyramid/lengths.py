"""How many units each stage trains on, so that every step costs the same (Pyramid-Flow's length balancing)."""

from __future__ import annotations

from nd_jax.errors import UserError


def balanced_lengths(
    rank: int, call: int, *, max_length: int, sync_group: int, max_units: int | None = None, stages: int = 3
) -> tuple[int, ...]:
    """Units (history + the trained one) per stage, lowest resolution first, for one data rank at one step.

    ``call`` counts steps from 1. The ranks of a group of ``sync_group`` take neighbouring lengths, and the group moves
    through ``1 .. max_length`` from step to step. A long top-resolution clip comes with short ones below and the other
    way round: ``u`` at the top, ``max_length + 1 - u`` elsewhere, both capped at ``max_units`` (what the data has).
    Raises ``UserError`` where no whole group fits into ``max_length`` (the table has no entries then).
    """
    if sync_group < 1 or max_length < sync_group:
        raise UserError(
            f"balanced lengths: max_length {max_length} is less than sync_group {sync_group}, so no group of ranks "
            "fits; expected 1 <= sync_group <= max_length; lower sync_group"
        )
    if call < 1 or rank < 0 or stages < 1 or (max_units is not None and max_units < 1):
        raise UserError(
            f"balanced lengths: rank {rank}, call {call}, stages {stages}, max_units {max_units}; expected rank >= 0, "
            "the others >= 1"
        )
    groups = max_length // sync_group
    top = call % groups * sync_group + rank % sync_group + 1
    cap = max_length if max_units is None else max_units
    return (min(max_length + 1 - top, cap),) * (stages - 1) + (min(top, cap),)
