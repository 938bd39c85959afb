"""Taking heads and hidden channels out of the denoiser's blocks, so that its arrays shrink.

Every block keeps equally many (each its own), so that blocks stay stacked. What goes can be made up for: the next layer
(the attention's output, the MLP's second map) is fitted to give what it gave before, by least squares over what its
inputs are on calibration data.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int

from nd_jax.errors import UserError
from nd_jax.models.functional import Params
from nd_jax.models.mmdit_config import MMDiTConfig

Moments = Mapping[str, Float[np.ndarray, "f+1 f+1"]]
"""Of one block: by name of an inner activation (``mmdit_block.Inside``) the weighted sum of ``a a^T`` over tokens,
where ``a`` is the activation's channels and a 1."""
OUTPUTS = {
    "image_seen": ("attn", "to_out"),
    "text_seen": ("attn", "to_add_out"),
    "image_hidden": ("ff", "down"),
    "text_hidden": ("ff_context", "down"),
}
"""The layer that reads an inner activation."""


@dataclasses.dataclass(frozen=True)
class Kept:
    """What stays, block by block with the last one last, in ascending order: heads, hidden channels of the image's MLP,
    and of the text's (of stacked blocks only)."""

    heads: Int[np.ndarray, "depth h"]
    mlp: Int[np.ndarray, "depth f"]
    text_mlp: Int[np.ndarray, "k g"]


def highest(scores: Float[np.ndarray, "rows n"], count: int) -> Int[np.ndarray, "rows count"]:
    """Places of the ``count`` highest of each row, in ascending order. Raises UserError for more than there are."""
    if not 1 <= count <= scores.shape[1]:
        raise UserError(f"prune: {count} of {scores.shape[1]} heads or channels to keep, expected 1 to all")
    return np.sort(np.argsort(-scores, axis=1, kind="stable")[:, :count], axis=1)


def narrow(
    config: MMDiTConfig,
    params: Params,
    kept: Kept,
    moments: Sequence[Moments] | None = None,
    damping: float = 1e-4,
) -> tuple[MMDiTConfig, Params]:
    """The denoiser with narrower blocks, in NumPy; with ``moments`` of every block the next layers are fitted.

    ``damping``: see ``fitted``.
    """
    blocks = [jax.tree.map(lambda w, i=i: np.asarray(w)[i], params["blocks"]) for i in range(config.num_layers - 1)]
    blocks.append(jax.tree.map(np.asarray, params["last_block"]))
    made = []
    for place, block in enumerate(blocks):
        text = kept.text_mlp[place] if place < len(kept.text_mlp) else None
        stays = {
            "seen": _channels(kept.heads[place], config.attention_head_dim),
            "image_hidden": kept.mlp[place],
            "text_hidden": text,
        }
        made.append(_narrow_block(block, stays, None if moments is None else moments[place], damping))
    stacked = jax.tree.map(lambda *layers: np.stack(layers), *made[:-1])
    sizes = kept.heads.shape[1], kept.mlp.shape[1], kept.text_mlp.shape[1]
    whole = config.num_attention_heads, 4 * config.width, 4 * config.width
    names = ("kept_heads", "mlp_width", "text_mlp_width")
    told = {name: size if size < most else None for name, size, most in zip(names, sizes, whole, strict=True)}
    return dataclasses.replace(config, **told), {**params, "blocks": stacked, "last_block": made[-1]}


def _channels(heads: Int[np.ndarray, " h"], size: int) -> Int[np.ndarray, " c"]:
    return (heads[:, None] * size + np.arange(size)).ravel()


def _narrow_block(block: Params, stays: Mapping[str, Any], moments: Moments | None, damping: float) -> Params:
    """One block; layers that read what goes are fitted, those that make it lose columns."""

    def columns(tree: Params, keep: np.ndarray) -> Params:
        return {"kernel": tree["kernel"][:, keep], "bias": tree["bias"][keep]}

    made = {name: dict(tree) for name, tree in block.items()}
    for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"):
        made["attn"][name] = columns(block["attn"][name], stays["seen"])
    made["ff"]["up"] = columns(block["ff"]["up"], stays["image_hidden"])
    if "ff_context" in block:
        made["ff_context"]["up"] = columns(block["ff_context"]["up"], stays["text_hidden"])
    for name, (part, layer) in OUTPUTS.items():
        if layer in block.get(part, {}):
            keep = stays["seen"] if name.endswith("seen") else stays[name]
            found = None if moments is None else moments[name]
            made[part][layer] = fitted(block[part][layer], keep, found, damping)
    return made


def fitted(
    layer: Params, keep: Int[np.ndarray, " c"], moments: Float[np.ndarray, "f+1 f+1"] | None, damping: float
) -> Params:
    """A linear layer that reads the inputs ``keep`` only, closest in the mean square to what it gave with all of them.

    With inputs K that stay (the constant 1 of the bias among them) and R that go, and their moments G, the change of
    the weights is ``(G_KK + d I)^-1 G_KR W_R``: ridge regression towards the old weights, ``d`` being ``damping`` times
    the mean of G's diagonal. Without moments the layer only loses rows.
    """
    kernel, bias = np.asarray(layer["kernel"]), np.asarray(layer["bias"])
    if moments is None or len(keep) == len(kernel):
        return {"kernel": kernel[keep], "bias": bias}
    gone, stays = np.setdiff1d(np.arange(len(kernel)), keep), np.append(keep, len(kernel))
    moments = np.asarray(moments, np.float64)
    among = moments[np.ix_(stays, stays)]
    among[np.diag_indices_from(among)] += damping * np.trace(moments) / len(moments)
    change = np.linalg.solve(among, moments[np.ix_(stays, gone)] @ kernel[gone].astype(np.float64))
    return {
        "kernel": (kernel[keep] + change[:-1]).astype(kernel.dtype),
        "bias": (bias + change[-1]).astype(bias.dtype),
    }
