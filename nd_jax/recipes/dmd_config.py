"""Settings of pyramidal distribution matching; the recipe is in ``dmd.py``."""

from __future__ import annotations

from dataclasses import dataclass, field

from nd_jax.errors import UserError
from nd_jax.recipes.dmd_loss import Reduction, Weighting
from nd_jax.recipes.few_step_config import FewStepConfig, check_few_steps
from nd_jax.training.optim import OptimConfig


@dataclass(frozen=True)
class DmdRecipeConfig(FewStepConfig):
    """What a distribution-matching run does. The paper's numbers where it gives some, marked; all others are ours."""

    fake_updates: int = 2
    """Updates of the fake before every update of the student (paper)."""
    shared: bool = True
    """The fake learns on what the student is judged by, with noise and levels of its own; off: on units, inputs and
    noise of its own as well, for one more forward pass of the student each."""
    exact: bool = True
    """The clean prediction that the true velocity takes to the clean latent; off for the paper's, which comes out too
    sharp in inner stages."""
    levels: int = 4
    """Even levels of local noise at which teacher and fake are compared, 1 among them (paper)."""
    weighting: Weighting = "normalised"
    """Of samples by the inverse of the teacher's error: bounded over the batch, raw (paper), or none."""
    weight_floor: float = 0.1
    """Errors below this share of the batch's mean count as that, if normalised."""
    cauchy_weight: float = 1.0
    """Of the regression to the data (paper); rows of the student's own have none."""
    cauchy_reduction: Reduction = "sum"
    """Whether its squared norm is the sum over a sample (paper) or the mean."""
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
    check_few_steps(config, stages, "dmd")
    for name in ("fake_updates", "levels"):
        if getattr(config, name) < 1:
            raise UserError(f"dmd: {name} is {getattr(config, name)}, expected at least 1")
    if not 0 < config.weight_floor <= 1:
        raise UserError(f"dmd: weight floor {config.weight_floor}; expected a share of 1 above 0")
    if config.cauchy_weight < 0:
        raise UserError(f"dmd: cauchy weight is {config.cauchy_weight}, expected at least 0")
    if config.renew and not config.exact:
        raise UserError("dmd: --recipe.renew puts noise on exact clean predictions; leave --recipe.exact on")
