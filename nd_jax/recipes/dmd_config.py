"""Settings of pyramidal distribution matching; the recipe is in ``dmd.py``."""

from __future__ import annotations

from dataclasses import dataclass, field

from nd_jax.errors import UserError
from nd_jax.recipes.dmd_loss import Reduction, Weighting
from nd_jax.recipes.flow_matching import FlowRecipeConfig
from nd_jax.training.optim import OptimConfig


@dataclass(frozen=True)
class DmdRecipeConfig(FlowRecipeConfig):
    """What a distribution-matching run does. The paper's numbers where it gives some, marked; all others are ours."""

    train_text: bool = False
    """Stays off: all three networks read the same text."""
    caption_dropout: float = 0.0
    """The student runs without guidance, so it has no use for the empty prompt."""
    steps: tuple[int, ...] = (1, 1, 1)
    """Euler steps that the student will take in each stage, on the plain grid; paper: 4-4-4, 2-2-1 and 1-1-1."""
    fake_updates: int = 2
    """Updates of the fake before every update of the student (paper)."""
    exact: bool = True
    """The clean prediction that the true velocity takes to the clean latent; off for the paper's, which comes out too
    sharp in inner stages."""
    first_guidance: float = 7.0
    """The teacher's guidance for units without history, ``v_uncond + w (v_cond - v_uncond)``; 1 is none."""
    later_guidance: float = 5.0
    """The same for all other units."""
    levels: int = 4
    """Even levels of local noise at which teacher and fake are compared, 1 among them (paper)."""
    weighting: Weighting = "normalised"
    """Of samples by the inverse of the teacher's error: bounded over the batch, raw (paper), or none."""
    weight_floor: float = 0.1
    """Errors below this share of the batch's mean count as that, if normalised."""
    cauchy_weight: float = 1.0
    """Of the regression to the data (paper)."""
    cauchy_reduction: Reduction = "sum"
    """Whether its squared norm is the sum over a sample (paper) or the mean."""
    simulated: float = 0.0
    """Share of rows whose input is reached by the student's own earlier steps in the stage, not taken from the data."""
    renew: bool = False
    """Sample the student with fresh noise after every step, and simulate its steps so; off for Euler steps (paper)."""
    ema_decay: float = 0.99
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(
            learning_rate=2e-6, schedule="constant", warmup_steps=1, b1=0.0, b2=0.999, weight_decay=0.0
        )
    )
    """The student's."""
    fake_optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(
            learning_rate=4e-7, schedule="constant", warmup_steps=1, b1=0.0, b2=0.999, weight_decay=0.0
        )
    )
    """The fake's; its schedule counts the fake's updates."""


def check(config: DmdRecipeConfig, stages: int) -> None:
    """Raises UserError for settings that cannot be, with a schedule of so many stages."""
    if config.train_text:
        raise UserError("dmd: --recipe.train-text is on; student, fake and teacher read the same frozen text")
    if len(config.steps) != stages or min(config.steps) < 1:
        raise UserError(f"dmd: steps {config.steps}; expected at least 1 for each of the {stages} stages")
    for name in ("fake_updates", "levels"):
        if getattr(config, name) < 1:
            raise UserError(f"dmd: {name} is {getattr(config, name)}, expected at least 1")
    if not 0 <= config.simulated <= 1 or not 0 < config.weight_floor <= 1:
        raise UserError(
            f"dmd: simulated {config.simulated} and weight floor {config.weight_floor}; expected shares of 1, the "
            "latter above 0"
        )
    if config.cauchy_weight < 0:
        raise UserError(f"dmd: cauchy weight is {config.cauchy_weight}, expected at least 0")
    if config.renew and not config.exact:
        raise UserError("dmd: --recipe.renew puts noise on exact clean predictions; leave --recipe.exact on")
