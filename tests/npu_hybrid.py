"""A tiny hybrid folder whose second picture tower is the video system's own second tower."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

from tiny_hybrid import FIRST_FRAME, write_hybrid
from tiny_system import random_params

from nd_jax.converters.component import save_component

WIDE_UNET = dataclasses.replace(FIRST_FRAME["ssd_1b_unet"][0], cross_attention_dim=8 + 16)
"""Reads states of 8 channels of the first tower and 16 of the shared one."""


def write_sharing_hybrid(folder: Path) -> Path:
    """``folder/hybrid`` as ``tiny_hybrid`` writes it, one tower shared."""
    path, module = write_hybrid(folder), FIRST_FRAME["ssd_1b_unet"][1]
    for name in ("ssd_1b_text_encoder_2", "ssd_1b_unet"):
        shutil.rmtree(path / name)
    shutil.copytree(path / "text_encoder_2", path / "ssd_1b_text_encoder_2")
    save_component(path / "ssd_1b_unet", WIDE_UNET, random_params(module.definition(WIDE_UNET), 2))
    return path
