"""How near a distilled text encoder is to its teacher, on prompts that it was not trained on.

Both are compared where the denoiser reads them. What needs videos, the judged accuracy of generation with the student
in place, is the evaluation protocol's (``nd-jax evaluate``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from nd_jax.errors import UserError
from nd_jax.models.functional import count_parameters
from nd_jax.models.system import CLIP_1, CLIP_2
from nd_jax.recipes.text_teacher import Teacher, teacher_params
from nd_jax.system import VideoSystem


@dataclasses.dataclass(frozen=True)
class TextReport:
    """Figures over all valid tokens, and over pairs of prompts, a prompt being the mean of its tokens."""

    prompts: int
    tokens: int
    """Valid ones, of all prompts."""
    cosine: float
    """Mean cosine of student and teacher, token by token."""
    mse: float
    """Mean squared error over tokens and channels."""
    relative_mse: float
    """The same as a share of the teacher's mean square."""
    neighbours: float
    """Share of prompts whose nearest other prompt is the same for student and teacher."""
    neighbours_chance: float
    """What ``neighbours`` would be for a student that knows nothing."""
    retrieval: float
    """Share of the student's prompts that are nearest to the same prompt of the teacher's; by chance 1 / prompts."""
    separation: float
    """Mean distance between two of the student's prompts, as a share of the teacher's; 0 where all are alike."""
    separation_correlation: float
    """Pearson's correlation of those distances, student against teacher."""

    def to_dict(self) -> dict[str, Any]:
        """The figures, for JSON."""
        return dataclasses.asdict(self)


def compare_states(
    teacher: Float[np.ndarray, "n s d"], student: Float[np.ndarray, "n s d"], mask: Int[np.ndarray, "n s"]
) -> TextReport:
    """The report on N different prompts. Raises UserError for fewer than three."""
    if len(mask) < 3:
        raise UserError(f"text report: {len(mask)} different prompts, expected at least 3 to compare")
    valid = np.asarray(mask) > 0
    teacher, student = (np.asarray(x, np.float64) for x in (teacher, student))
    wanted, found = teacher[valid], student[valid]
    norms = np.linalg.norm(wanted, axis=-1) * np.linalg.norm(found, axis=-1)
    mse = np.mean(np.square(found - wanted))
    means = [(x * valid[..., None]).sum(1) / valid.sum(1, keepdims=True) for x in (teacher, student)]
    within = [_distances(x, x) for x in means]
    pairs = [distances[np.triu_indices(len(mask), 1)] for distances in within]
    for distances in within:
        np.fill_diagonal(distances, np.inf)
    nearest = [distances.argmin(1) for distances in within]
    return TextReport(
        prompts=len(mask),
        tokens=int(valid.sum()),
        cosine=float(np.mean((wanted * found).sum(-1) / np.maximum(norms, 1e-12))),
        mse=float(mse),
        relative_mse=float(mse / np.mean(np.square(wanted))),
        neighbours=float(np.mean(nearest[0] == nearest[1])),
        neighbours_chance=1 / (len(mask) - 1),
        retrieval=float(np.mean(_distances(means[1], means[0]).argmin(1) == np.arange(len(mask)))),
        separation=float(pairs[1].mean() / pairs[0].mean()),
        separation_correlation=_correlation(*pairs),
    )


def _distances(a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m d"]) -> Float[np.ndarray, "n m"]:
    squares = np.square(a).sum(1)[:, None] + np.square(b).sum(1) - 2 * a @ b.T
    return np.sqrt(np.maximum(squares, 0))


def _correlation(a: Float[np.ndarray, " k"], b: Float[np.ndarray, " k"]) -> float:
    """Pearson's; 0 where one of them does not vary."""
    a, b = a - a.mean(), b - b.mean()
    scale = np.linalg.norm(a) * np.linalg.norm(b)
    return float(a @ b / scale) if scale > 0 else 0.0


def text_states(
    system: VideoSystem, prompts: Sequence[str], *, batch: int = 64
) -> tuple[Float[np.ndarray, "n s d"], Int[np.ndarray, "n s"]]:
    """What the system's denoiser reads of prompts, after its context embedder if it has one, and the valid tokens."""
    reader = Teacher(system.config)
    params = jax.tree.map(jnp.asarray, teacher_params(system.config, system.params))
    encode = jax.jit(reader)
    states, masks = [], []
    for start in range(0, len(prompts), batch):
        chosen = list(prompts[start : start + batch])
        ids, mask, _ = system.tokenizers["t5"]([*chosen, *[""] * (batch - len(chosen))])
        states.append(np.asarray(encode(params, ids, mask))[: len(chosen)])
        masks.append(mask[: len(chosen)])
    return np.concatenate(states), np.concatenate(masks)


def text_report(
    teacher: VideoSystem, student: VideoSystem, prompts: Sequence[str], *, batch: int = 64
) -> dict[str, Any]:
    """``TextReport`` on held-out prompts, parameters of both text paths, and whether the pooled towers were kept.

    Raises UserError for fewer than three different prompts.
    """
    different = list(dict.fromkeys(prompts))
    (wanted, mask), (found, _) = (text_states(system, different, batch=batch) for system in (teacher, student))
    parameters = [count_parameters(teacher_params(x.config, x.params)) for x in (teacher, student)]
    towers = [{name: x.params[name] for name in (CLIP_1, CLIP_2) if name in x.params} for x in (teacher, student)]
    kept = jax.tree.structure(towers[0]) == jax.tree.structure(towers[1])
    kept = kept and all(jax.tree.leaves(jax.tree.map(np.array_equal, *towers)))
    return {
        **compare_states(wanted, found, mask).to_dict(),
        "teacher_parameters": parameters[0],
        "student_parameters": parameters[1],
        "pooled_towers": "kept" if kept else "changed",
    }
