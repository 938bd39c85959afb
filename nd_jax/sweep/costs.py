"""What a candidate costs: parameters, multiply-adds, bytes of weights, and estimated time on a phone's chip.

Multiply-adds and weights are counted in the graphs that the phone gets (``converters.graphs``), built without weights
for one stacked block and a last one, with and without each kind of piece: all counts are sums over pieces. They are
those of one video as the system's folder samples it. Weights have 8 bits. Time is ``max(multiply-adds / rate, bytes /
bandwidth)`` of every call of a stage at a target's published peaks: an estimate (``converters.bundle.targets``), not a
measurement.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from nd_jax.converters.bundle.analysis import Counts, of_graph
from nd_jax.converters.bundle.targets import TARGETS, Target
from nd_jax.converters.graphs.conditioning import conditioning_graph
from nd_jax.converters.graphs.parts import lighter_stage_graph
from nd_jax.errors import UserError
from nd_jax.generate import Generator, needs_negative
from nd_jax.models.functional import Params, count_parameters
from nd_jax.models.gates import IMAGE
from nd_jax.models.mmdit import definition
from nd_jax.models.mmdit_config import MMDiTConfig
from nd_jax.pyramid.layout import Envelope
from nd_jax.sweep.units import Drop, Units

PRECISION = "w8a16"


class Cost(NamedTuple):
    """``parameters``: of the denoiser, as trained; ``macs``: of one video; ``bytes``: of a phone's weights;
    ``milliseconds``: of one video's denoiser calls, by target."""

    parameters: int
    macs: float
    bytes: int
    milliseconds: dict[str, float]

    def figures(self) -> dict[str, float]:
        """By the names of the table's columns."""
        times = {f"ms_{name}": value for name, value in self.milliseconds.items()}
        return {"parameters": self.parameters, "macs": self.macs, "bytes": self.bytes, **times}


class Part(NamedTuple):
    """What a network or a piece of it has: parameters as trained; weights of the stages' graphs, which share them, and
    of the graph that makes the modulation, once a timestep; multiply-adds of a call of every stage."""

    parameters: float
    weights: float
    modulation: float
    macs: Float[np.ndarray, " stages"]

    def plus(self, other: Part, times: float = 1.0) -> Part:
        """The sum with so many of another."""
        return Part(*(one + times * two for one, two in zip(self, other, strict=True)))


@dataclasses.dataclass(frozen=True)
class CostModel:
    """``whole`` network, its pieces in the order of the units, and ``calls`` of every stage for one video."""

    whole: Part
    pieces: list[Part]
    calls: Float[np.ndarray, " stages"]

    def __call__(self, drop: Drop = ()) -> Cost:
        """Of the network without some units."""
        left = self.whole
        for unit in drop:
            left = left.plus(self.pieces[unit], -1.0)
        return self.cost(left)

    def cost(self, part: Part) -> Cost:
        """A part in the words that budgets have."""
        weights = round(part.weights)

        def milliseconds(target: Target) -> float:
            each = [Counts(macs=macs, parameters=weights).milliseconds(target, PRECISION) for macs in part.macs]
            return float(self.calls @ np.array(each))

        return Cost(
            round(part.parameters),
            float(self.calls @ part.macs),
            Counts(parameters=weights + round(part.modulation)).weight_bytes(PRECISION),
            {name: milliseconds(target) for name, target in TARGETS.items()},
        )

    def count(self, name: str, budget: float) -> int:
        """How many units have to go, whichever they are, for figure ``name`` of the rest to be at most ``budget``.

        Raises UserError for a budget that the whole network meets, or that nothing meets.
        """
        order = np.argsort([self((unit,)).figures()[name] for unit in range(len(self.pieces))], kind="stable")[::-1]
        costs = [self(tuple(order[:count].tolist())).figures()[name] for count in range(len(order) + 1)]
        if not costs[-1] <= budget < costs[0]:
            raise UserError(
                f"sweep: budget of {budget:.6g} {name}, expected {math.ceil(costs[-1])} to {math.ceil(costs[0]) - 1}"
            )
        return next(count for count, cost in enumerate(costs) if cost <= budget)


Measure = Callable[..., Part]


def cost_model(generator: Generator, units: Units) -> CostModel:
    """For the generator's system at its size and length."""
    system, envelopes, config = generator.system, generator.envelopes, units.config
    depth, one = config.num_layers - 1, dataclasses.replace(config, num_layers=2)
    measure = functools.partial(_measure, tuple(envelopes))
    base = measure(one)
    block = measure(dataclasses.replace(one, num_layers=3)).plus(base, -1.0)

    @functools.cache
    def piece(last: bool, stream: int) -> Part:
        if units.kind == "blocks":
            return block
        if units.kind == "streams":
            return _stream(one, envelopes, measure, base, stream)
        if units.kind == "heads":
            return base.plus(measure(one, ("kept_heads", config.heads - 1), last), -1.0)
        name, channels = _mlp(config, stream)
        return base.plus(measure(one, (name, channels - channels // units.slices), last), -1.0)

    streams = [place[1] if units.kind in ("streams", "mlp") else IMAGE for place in units.places]
    pieces = [piece(place[0] == depth, stream) for place, stream in zip(units.places, streams, strict=True)]
    plan, given = system.sampling, system.mode == "hybrid"
    calls = (generator.latent_frames - 1) * np.array(plan.later_steps, float)
    calls += 0 if given else np.array(plan.first_steps, float)
    return CostModel(base.plus(block, depth - 1), pieces, calls * (2 if needs_negative(plan) else 1))


def _mlp(config: MMDiTConfig, stream: int) -> tuple[str, int]:
    """The setting of a stream's MLP, and how many hidden channels it has."""
    return ("mlp_width", config.mlp_channels) if stream == IMAGE else ("text_mlp_width", config.text_mlp_channels)


def _measure(
    envelopes: tuple[Envelope, ...], config: MMDiTConfig, changed: tuple[str, int] | None = None, last: bool = False
) -> Part:
    """A network; with ``changed`` its stacked blocks, or its last one, as narrow as that setting says."""
    params = _layers(definition(config).abstract())
    if changed is not None:
        narrow = _layers(definition(dataclasses.replace(config, **dict([changed]))).abstract())
        name = "last_block" if last else "blocks"
        params = {**params, name: narrow[name]}
    counts = [of_graph(lighter_stage_graph(config, params, e, f"stage{e.stage}")) for e in envelopes]
    modulation = of_graph(conditioning_graph(config, params)).parameters
    macs = np.array([each.macs for each in counts], float)
    return Part(count_parameters(params), counts[0].parameters, modulation, macs)


def _layers(abstract: Params) -> Params:
    """Shapes with the stacked ones cut into layers, so that blocks may differ."""

    def cut(leaf: jax.ShapeDtypeStruct) -> tuple[jax.ShapeDtypeStruct, ...]:
        return tuple(jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype) for _ in range(leaf.shape[0]))

    return {**abstract, "blocks": jax.tree.map(cut, abstract["blocks"])}


def _stream(one: MMDiTConfig, envelopes: Sequence[Envelope], measure: Measure, base: Part, stream: int) -> Part:
    """A stream's queries, its attention's products and output, and its MLP, of a stacked block."""
    name, channels = _mlp(one, stream)
    width, inner = one.width, one.heads * one.attention_head_dim
    all_but_one = base.plus(measure(one, (name, 1)), -1.0)
    weights = 2 * width * inner + inner + width
    tokens, text, keys = (
        np.array([getattr(e, name) for e in envelopes], float)
        for name in ("image_length" if stream == IMAGE else "text_length", "text_length", "length")
    )
    products = 2 * text * keys * inner  # text reads every key
    if stream == IMAGE:  # what the graphs multiply beside projections and the text's part
        if one.heads > 1:
            head = base.plus(measure(one, ("kept_heads", one.heads - 1)), -1.0)
            products = one.heads * head.macs - 4 * width * inner * keys - products
        else:
            products = 2 * tokens * keys * inner
    attention = Part(weights, weights, 0, tokens * 2 * width * inner + products)
    return attention.plus(all_but_one, channels / max(channels - 1, 1))
