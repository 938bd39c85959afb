"""First frames by another system: hybrid generation where there is no image model of its own, as in the shapes worlds.

The many-step teacher makes the first frame with its guidance; a student of few steps continues it. That is the paper's
hybrid with the teacher in SSD-1B's place.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8

from nd_jax.generate import Generator, generate
from nd_jax.system import VideoSystem


def teacher_frames(
    teacher: VideoSystem,
    prompts: Sequence[str],
    *,
    height: int,
    width: int,
    seed: int = 0,
    batch: int = 16,
    negative_prompt: str = "",
) -> UInt8[np.ndarray, "n h w 3"]:
    """The first frame that ``teacher`` gives each prompt, by its own plan; of prompt n the one that its own video with
    this seed begins with.

    Raises UserError for a size that does not fit the teacher.
    """
    generator = Generator(teacher, height=height, width=width, frames=1)
    videos = generate(teacher, prompts, seed=seed, batch=batch, generator=generator, negative_prompt=negative_prompt)
    return videos[:, 0]
