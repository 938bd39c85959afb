"""Ways to look for the blocks that can go; heads, slices and streams are searched alike.

A strategy is a generator: it yields the candidates that it wants scored, each a tuple of dropped blocks in ascending
order, and is sent a mapping from every one of them to its error. It reads nothing else, so a search that is run again
asks the same, and a table of what is known already brings it back to where it was.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Generator, Mapping
from typing import Any

import numpy as np

from nd_jax.errors import UserError
from nd_jax.sweep.units import Drop

Strategy = Generator[list[Drop], Mapping[Drop, float], None]
IDLE = 50
"""Generations without a new candidate after which evolution has converged."""


def exhaustive(blocks: int, count: int) -> Strategy:
    """All ways to leave out ``count`` blocks: remove-one, remove-two, or everything where there is little."""
    yield list(itertools.combinations(range(blocks), count))


def intervals(blocks: int, longest: int) -> Strategy:
    """All runs of neighbouring blocks, of every length to ``longest``."""
    yield [
        tuple(range(start, start + length)) for length in range(1, longest + 1) for start in range(blocks - length + 1)
    ]


def greedy_removal(blocks: int, count: int) -> Strategy:
    """From the whole network, one block after the other: whichever costs least now."""
    dropped: Drop = ()
    while len(dropped) < count:
        asked = [tuple(sorted((*dropped, k))) for k in range(blocks) if k not in dropped]
        dropped = _best(asked, (yield asked))


def greedy_return(blocks: int, count: int) -> Strategy:
    """From the last block alone, one block back after the other: whichever helps most now."""
    dropped: Drop = tuple(range(blocks))
    while len(dropped) > count:
        asked = [tuple(j for j in dropped if j != k) for k in dropped]
        dropped = _best(asked, (yield asked))


def evolution(blocks: int, count: int, seed: int, size: int | None = None) -> Strategy:
    """CMA-ES (Hansen, arXiv 1604.00772) on one number for each block; the ``count`` blocks with the lowest go.

    Starts from the remove-one errors. It ends when it asks nothing new for ``IDLE`` generations in a row. The package
    ``cmaes`` does the work. Raises UserError where it is not installed.
    """
    try:
        import cmaes
    except ImportError:
        raise UserError("sweep: evolution needs the package cmaes; pip install 'nd-jax[sweep]'") from None
    alone = yield [(k,) for k in range(blocks)]
    cost = np.array([alone[(k,)] for k in range(blocks)])
    ranks = np.argsort(np.argsort(cost, kind="stable"), kind="stable") / max(blocks - 1, 1)
    search = cmaes.CMA(mean=ranks, sigma=0.3, seed=seed, population_size=size or 4 * (4 + int(3 * math.log(blocks))))
    seen: set[Drop] = set()
    idle = 0
    while idle < IDLE and not search.should_stop():
        points = [search.ask() for _ in range(search.population_size)]
        asked = [tuple(sorted(np.argsort(x, kind="stable")[:count].tolist())) for x in points]
        idle = 0 if set(asked) - seen else idle + 1
        seen |= set(asked)
        errors = yield asked
        search.tell([(x, errors[drop]) for x, drop in zip(points, asked, strict=True)])


def cheapest(blocks: int, count: int) -> Strategy:
    """The blocks that cost least alone."""
    alone = yield [(k,) for k in range(blocks)]
    yield [tuple(sorted(sorted(range(blocks), key=lambda k: (alone[(k,)], k))[:count]))]


def fixed(drop: Drop) -> Strategy:
    """One candidate that something else chose."""
    yield [drop]


def plan(
    blocks: int,
    count: int,
    candidates: int,
    seed: int,
    *,
    evolve: bool = True,
    chosen: Mapping[str, Drop] | None = None,
) -> dict[str, Strategy]:
    """By name, what a sweep does, in order: what others have ``chosen``, small systematic searches, and evolution with
    what is left; where all sets of ``count`` blocks fit among the candidates, all of them instead.

    Raises UserError unless ``count`` is from 1 to ``blocks``.
    """
    if not 1 <= count <= blocks:
        raise UserError(f"sweep: {count} blocks to remove, expected 1 to {blocks}; the last block always stays")
    strategies = {
        **{name: fixed(drop) for name, drop in (chosen or {}).items()},
        "remove-one": exhaustive(blocks, 1),
        "cheapest alone": cheapest(blocks, count),
    }
    # The systematic searches, with how many they ask for; those that would take more than half of all are left out.
    for name, strategy, asked in (
        ("intervals", intervals(blocks, count), count * (2 * blocks - count + 1) // 2),
        ("greedy removal", greedy_removal(blocks, count), count * (2 * blocks - count + 1) // 2),
        ("greedy return", greedy_return(blocks, count), (blocks - count) * (blocks + count + 1) // 2),
        ("remove-two", exhaustive(blocks, 2), math.comb(blocks, 2)),
    ):
        if asked and asked <= candidates // 2:
            strategies[name] = strategy
    if math.comb(blocks, count) <= candidates:
        strategies["exhaustive"] = exhaustive(blocks, count)
    elif evolve:
        strategies["evolution"] = evolution(blocks, count, seed)
    return strategies


def run(
    strategies: Mapping[str, Strategy],
    table: Any,
    evaluate: Callable[[list[Drop], str], None],
    *,
    size: int,
    candidates: int,
    stop: Callable[[], Any] = lambda: None,
) -> str:
    """Run strategies in order; why it ended: "stopped", "candidates" (that many are known) or "complete".

    ``table.errors`` maps known candidates to their error; ``evaluate(drops, strategy)`` adds at most ``size`` more.
    """
    for name, strategy in strategies.items():
        try:
            asked = next(strategy)
            while True:
                wanted = [drop for drop in dict.fromkeys(asked) if drop not in table.errors]
                wanted = wanted[: candidates - len(table.errors)] if len(table.errors) < candidates else []
                for start in range(0, len(wanted), size):
                    if stop():
                        return "stopped"
                    evaluate(wanted[start : start + size], name)
                if not all(drop in table.errors for drop in asked):
                    return "candidates"
                asked = strategy.send({drop: table.errors[drop] for drop in asked})
        except StopIteration:
            continue
    return "complete"


def _best(asked: list[Drop], errors: Mapping[Drop, float]) -> Drop:
    return min(asked, key=lambda drop: (errors[drop], drop))
