"""Golden MMDiT cases as this package sees them: parameter trees, channels-last clips and exact layouts."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
from safetensors.numpy import load_file

from nd_jax.models.mmdit import MMDiTConfig

RENAMED = {"attn.to_out.0": "attn.to_out", "net.0.proj": "up", "net.2": "down"}


def tree_path(name: str, layers: int) -> tuple[tuple[str, ...], int | None]:
    """Parameter path of a torch name, and its index on the layer axis (None where there is none)."""
    for torch_part, part in RENAMED.items():
        name = name.replace(torch_part, part)
    parts = name.split(".")
    index = None
    if parts[0] == "transformer_blocks":
        index = int(parts[1])
        parts = ["blocks" if index < layers - 1 else "last_block", *parts[2:]]
        index = index if index < layers - 1 else None
    if parts[-1] == "weight":
        parts[-1] = "scale" if parts[-2].startswith("norm_") and parts[-2] != "norm_out" else "kernel"
    return tuple(parts), index


def from_torch(tensors: dict[str, np.ndarray], layers: int) -> dict:
    """Nested parameter tree from torch-named tensors; the position table is left out."""
    stacked, tree = {}, {}
    for name, value in tensors.items():
        if name == "pos_embed.pos_embed":
            continue
        path, index = tree_path(name, layers)
        value = np.transpose(value, {2: (1, 0), 4: (2, 3, 1, 0)}.get(value.ndim, range(value.ndim)))
        if index is None:
            stacked[path] = value
        else:
            stacked.setdefault(path, [None] * (layers - 1))[index] = value
    for path, value in stacked.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = np.stack(value) if isinstance(value, list) else value
    return tree


def load(case) -> tuple[MMDiTConfig, dict]:
    """Config and parameters of a golden case."""
    config = MMDiTConfig.from_dict(case.config)
    return config, from_torch(load_file(case.folder / "weights.safetensors"), config.num_layers)


def sequence(arrays: dict[str, np.ndarray], prefix: str) -> list:
    """Arrays named PREFIX/0, PREFIX/1/0, ... as nested lists."""
    keys = sorted({int(key[len(prefix) + 1 :].split("/")[0]) for key in arrays if key.startswith(prefix + "/")})
    return [arrays[f"{prefix}/{i}"] if f"{prefix}/{i}" in arrays else sequence(arrays, f"{prefix}/{i}") for i in keys]


def channels_last(x: np.ndarray) -> np.ndarray:
    """B C T H W to B T H W C."""
    return np.moveaxis(x, 1, -1)


def exact_layout(clips: list[np.ndarray], text_mask: np.ndarray, patch: int) -> SimpleNamespace:
    """Times and segments of channels-last clips without padding, text first."""
    times, frame = [np.zeros(text_mask.shape[1], np.int32)], 0
    for clip in clips:
        _, t, height, width, _ = clip.shape
        times.append(np.repeat(np.arange(frame, frame + t, dtype=np.int32), (height // patch) * (width // patch)))
        frame += t
    times = np.concatenate(times)[None]
    image = np.ones((len(text_mask), times.shape[1] - text_mask.shape[1]), np.int32)
    return SimpleNamespace(times=times, segments=np.concatenate([text_mask.astype(np.int32), image], axis=1))


def call_arguments(inputs: dict[str, np.ndarray], patch: int) -> tuple:
    """Positional arguments of the network for a golden subcase."""
    sample = [
        [channels_last(x) for x in (clips if isinstance(clips, list) else [clips])]
        for clips in sequence(inputs, "sample")
    ]
    mask = inputs["encoder_attention_mask"]
    layouts = [exact_layout(clips, mask[g :: len(sample)], patch) for g, clips in enumerate(sample)]
    rest = (inputs["encoder_hidden_states"], inputs["pooled_projections"], inputs["timestep_ratio"])
    return sample, *rest, layouts


def torch_view(tree: dict, name: str, layers: int) -> np.ndarray:
    """The leaf that a torch name stands for, in torch's axis order."""
    path, index = tree_path(name, layers)
    for key in path:
        tree = tree[key]
    value = np.asarray(tree if index is None else tree[index])
    return np.transpose(value, {2: (1, 0), 4: (3, 2, 0, 1)}.get(value.ndim, range(value.ndim)))
