"""One object anywhere in twice the width, for distilling steps: docs/steps.md says why.

A prompt leaves open where its object starts, here within 68 to 78 pixels instead of 4 to 14, so that few calls cannot
get by with a mean. The networks are those of shapes_base, whose system is what the teacher starts from.
Commands: nd-jax data prepare shapes_wide --out CLIPS --clips 4096 --seed 21
          nd-jax data latents --data CLIPS --codec shapes_base --out LATENTS
          nd-jax train shapes_wide teacher --start shapes_base --latents LATENTS --out TEACHER
"""

import dataclasses

from nd_jax.configs import shapes_base as base
from nd_jax.training.loop import LoopConfig

UPDATES = 400
"""Of every way of distilling steps, whatever an update costs."""


def steps_run(name: str, **changes):
    """A run of shapes_base with so many updates and learning rates that end with them."""
    run = base.PRESET.runs[name]
    recipe = dataclasses.replace(run.recipe, **changes)
    return dataclasses.replace(run, recipe=recipe, loop=LoopConfig(steps=UPDATES, save_every=100, log_every=10))


teacher = dataclasses.replace(
    base.flow(900, 8e-4, schedule="linear", ema_decay=0.99, batch=24, stage_mix=(1, 1, 2)),
    loop=LoopConfig(steps=900, save_every=150, log_every=25),
)
regress = dataclasses.replace(base.regress, decay_steps=UPDATES)

PRESET = dataclasses.replace(
    base.PRESET,
    name="shapes_wide",
    video=dataclasses.replace(base.PRESET.video, width=128),
    world="64x128",
    runs={
        "teacher": teacher,
        "recovery": base.PRESET.runs["recovery"],
        "recovery_2": base.PRESET.runs["recovery_2"],
        "student": steps_run(
            "student",
            own_history=0.5,
            own_after=100,
            own_ramp=100,
            optim=base.adam(3e-4, UPDATES),
            fake_optim=base.adam(6e-4, 2 * UPDATES),
        ),
        "progressive": steps_run("progressive", round_steps=UPDATES // 2, optim=regress),
        "mean_flow": steps_run("mean_flow", optim=regress),
        "adversarial": steps_run("adversarial", optim=base.adam(3e-4, UPDATES), head_optim=base.adam(1e-3, UPDATES)),
    },
)
