"""Settings that all ways of distilling steps share; the recipe is in ``few_step.py``."""

from __future__ import annotations

from dataclasses import dataclass

from nd_jax.errors import UserError
from nd_jax.recipes.flow_matching import FlowRecipeConfig


@dataclass(frozen=True)
class FewStepConfig(FlowRecipeConfig):
    """What a run that distils steps does, whatever its loss."""

    train_text: bool = False
    """Stays off: all networks read the same text."""
    caption_dropout: float = 0.0
    """The student runs without guidance, so it has no use for the empty prompt."""
    steps: tuple[int, ...] = (1, 1, 1)
    """Steps that the student will take in each stage, on the plain grid; paper: 4-4-4, 2-2-1 and 1-1-1."""
    first_guidance: float = 7.0
    """The teacher's guidance for units without history, ``v_uncond + w (v_cond - v_uncond)``; 1 is none."""
    later_guidance: float = 5.0
    """The same for all other units."""
    simulated: float = 0.0
    """Share of rows whose input is reached by the student's own earlier steps in the stage, not taken from the data."""
    renew: bool = False
    """Sample the student with fresh noise after every step, and simulate its steps so; off for Euler steps (paper)."""
    own_history: float = 0.0
    """Largest share of rows whose history, lower stages and earlier steps the student makes itself (self-forcing)."""
    own_after: int = 0
    """Updates before that share leaves 0."""
    own_ramp: int = 0
    """Updates in which it then grows to its largest."""
    videos: bool = True
    """Off: no videos, prompts alone. Every row is the student's own from the first update on."""


def check_few_steps(config: FewStepConfig, stages: int, name: str) -> None:
    """Raises UserError for settings that cannot be, with a schedule of so many stages; ``name`` is the recipe's."""
    if config.train_text:
        raise UserError(f"{name}: --recipe.train-text is on; student and teacher read the same frozen text")
    if len(config.steps) != stages or min(config.steps) < 1:
        raise UserError(f"{name}: steps {config.steps}; expected at least 1 for each of the {stages} stages")
    if not 0 <= config.simulated <= 1 or not 0 <= config.own_history <= 1:
        raise UserError(
            f"{name}: simulated {config.simulated} and own history {config.own_history}; expected shares of 1"
        )
    if config.own_after < 0 or config.own_ramp < 0:
        raise UserError(
            f"{name}: own history after {config.own_after} updates, growing for {config.own_ramp}; expected at least 0"
        )
    if not config.videos and (config.own_history, config.own_after, config.own_ramp) != (1, 0, 0):
        raise UserError(
            f"{name}: without videos every row is the student's own; expected --recipe.own-history 1, "
            "--recipe.own-after 0 and --recipe.own-ramp 0"
        )
