"""Narrower blocks for a system: what to keep, by Taylor scores; how much, by numbers or a budget; the next layers
fitted."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float

from nd_jax.errors import UserError
from nd_jax.generate import Generator
from nd_jax.influence import generator_of
from nd_jax.models.gates import IMAGE
from nd_jax.models.mmdit_config import MMDiTConfig
from nd_jax.models.system import DENOISER
from nd_jax.recipes.widths import Kept, highest, narrow
from nd_jax.sweep.calibration import record
from nd_jax.sweep.costs import Cost, Part, cost_model
from nd_jax.sweep.gradients import taylor
from nd_jax.sweep.moments import inner_moments
from nd_jax.sweep.units import Units
from nd_jax.system import VideoSystem

STEPS = 16
"""Sizes of an MLP that a budget chooses from."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of every block: heads, and hidden channels of the image's and the text's MLP. None: as many as there are."""

    heads: int | None = None
    mlp: int | None = None
    text_mlp: int | None = None

    def of(self, config: MMDiTConfig) -> tuple[int, int, int]:
        """With the numbers of ``config`` where there is none. Raises UserError for more than it has."""
        most = config.heads, config.mlp_channels, config.text_mlp_channels
        found = tuple(size or whole for size, whole in zip(dataclasses.astuple(self), most, strict=True))
        for name, size, whole in zip(("heads", "mlp", "text-mlp"), found, most, strict=True):
            if not 1 <= size <= whole:
                raise UserError(f"prune widths: --{name} {size}, expected 1 to {whole}")
        return found


@dataclasses.dataclass(frozen=True)
class Importances:
    """Taylor scores, rows are blocks with the last one last."""

    heads: Float[np.ndarray, "depth h"]
    mlp: Float[np.ndarray, "depth f"]
    text_mlp: Float[np.ndarray, "k g"]

    def kept(self, sizes: tuple[int, int, int]) -> Kept:
        """The most important ones."""
        return Kept(*(highest(x, n) for x, n in zip((self.heads, self.mlp, self.text_mlp), sizes, strict=True)))


def narrow_system(
    system: VideoSystem,
    prompts: Sequence[str],
    choose: Callable[[Generator, Importances], tuple[int, int, int]],
    *,
    seed: int = 0,
    samples: int = 1,
    steps: int | None = 2,
    batch: int = 8,
    probes: int = 4,
    fit: bool = True,
    damping: float = 1e-4,
    told: Callable[[str], None] = lambda line: None,
) -> tuple[VideoSystem, Kept]:
    """The system with narrower blocks, and what they kept. ``choose`` says how many stay, knowing what they are worth.

    Without ``fit`` the layers behind only lose rows.
    """
    config, generator = system.config.diffusion_transformer, generator_of(system)
    told("recording what the denoiser meets")
    calibration = record(generator, prompts, seed=seed, samples=samples, batch=batch, steps=steps)
    told("Taylor scores of heads and hidden channels")
    given = system, generator.envelopes, calibration
    worth = importances(config, lambda units: taylor(*given, units, probes=probes, seed=seed).mean(axis=(0, 1)))
    kept = worth.kept(choose(generator, worth))
    moments = None
    if fit:
        told("fitting the layers behind what goes")
        moments = inner_moments(*given)
    smaller, params = narrow(config, system.params[DENOISER], kept, moments, damping)
    blocks = system.kept_blocks if system.kept_blocks is not None else tuple(range(config.num_layers))
    changes = {
        "config": dataclasses.replace(system.config, diffusion_transformer=smaller),
        "params": {**system.params, DENOISER: params},
        "kept_blocks": blocks,
    }
    return dataclasses.replace(system, **changes), kept


def importances(config: MMDiTConfig, scores: Callable[[Units], Float[np.ndarray, " n"]]) -> Importances:
    """From a score of units: each head, and each hidden channel (or the finest slices that divide both MLPs)."""
    heads = Units(config, "heads")
    slices = math.gcd(config.mlp_channels, config.text_mlp_channels)
    channels = Units(config, "mlp", slices)
    grid = channels.grid(scores(channels)).reshape(config.num_layers, 2, slices)
    image = np.repeat(grid[:, IMAGE], config.mlp_channels // slices, axis=1)
    text = np.repeat(grid[:-1, 1 - IMAGE], config.text_mlp_channels // slices, axis=1)
    return Importances(heads.grid(scores(heads)), image, text)


def within(name: str, budget: float) -> Callable[[Generator, Importances], tuple[int, int, int]]:
    """For ``narrow_system``: of all sizes for which figure ``name`` of ``Cost`` is at most ``budget``, those that lose
    the least by Taylor's formula. Raises UserError where none is small enough, or the whole network is."""

    def choose(generator: Generator, worth: Importances) -> tuple[int, int, int]:
        config, cost = generator.system.config.diffusion_transformer, width_costs(generator)
        lost = [np.append(np.cumsum(np.sort(x, axis=1), axis=1)[:, ::-1], np.zeros((len(x), 1)), axis=1).sum(axis=0)
                for x in (worth.heads, worth.mlp, worth.text_mlp)]  # fmt: skip
        options = [
            range(1, config.heads + 1),
            _steps(config.mlp_channels),
            _steps(config.text_mlp_channels),
        ]
        best, found = np.inf, None
        for sizes in ((h, f, g) for h in options[0] for f in options[1] for g in options[2]):
            # Of n in ascending order the lowest n - kept go; ``lost`` counts from the other end.
            loses = sum(float(each[size]) for each, size in zip(lost, sizes, strict=True))
            if loses < best and cost(sizes).figures()[name] <= budget:
                best, found = loses, sizes
        whole = config.heads, config.mlp_channels, config.text_mlp_channels
        if found is None or found == whole:
            least = cost(tuple(each[0] for each in options)).figures()[name]
            most = cost(whole).figures()[name]
            raise UserError(
                f"prune widths: budget of {budget:.6g} {name}, expected {least:.6g} to less than {most:.6g}"
            )
        return found

    return choose


def _steps(channels: int) -> list[int]:
    return sorted({max(1, channels * n // STEPS) for n in range(1, STEPS + 1)})


def width_costs(generator: Generator) -> Callable[[tuple[int, int, int]], Cost]:
    """What a denoiser costs whose blocks have so many heads and hidden channels: exact, since counts are linear in
    them."""
    config = generator.system.config.diffusion_transformer
    slices = math.gcd(config.mlp_channels, config.text_mlp_channels)
    heads_of, mlp_of = Units(config, "heads"), Units(config, "mlp", slices)
    model = cost_model(generator, heads_of)
    nothing = Part(0, 0, 0, np.zeros(len(generator.envelopes)))
    head, image, text = nothing, nothing, nothing
    for place, piece in zip(heads_of.places, model.pieces, strict=True):
        head = head.plus(piece, 1.0 if place[1] == 0 else 0.0)
    for place, piece in zip(mlp_of.places, cost_model(generator, mlp_of).pieces, strict=True):
        first = 1.0 if place[2] == 0 else 0.0
        image = image.plus(piece, first * slices / config.mlp_channels if place[1] == IMAGE else 0.0)
        text = text.plus(piece, first * slices / config.text_mlp_channels if place[1] != IMAGE else 0.0)

    def cost(sizes: tuple[int, int, int]) -> Cost:
        heads, channels, text_channels = sizes
        left = model.whole.plus(head, heads - config.heads)
        left = left.plus(image, channels - config.mlp_channels)
        return model.cost(left.plus(text, text_channels - config.text_mlp_channels))

    return cost
