"""Chips that graphs are made for: names, numbers and the rates that latency estimates assume."""

from __future__ import annotations

from typing import NamedTuple

from nd_jax.errors import UserError


class Target(NamedTuple):
    """``number``: the compiler's ``soc_model``; ``arch``: of the Hexagon. ``tmacs``: 10^12 multiply-adds a second with
    8-bit weights and 16-bit activations, half the 8-bit rate; ``gigabytes``: memory traffic a second. The last two are
    assumptions from published peak figures, not measurements."""

    name: str
    number: int
    arch: str
    tmacs: float
    gigabytes: float


TARGETS = {
    target[0]: Target(*target)
    for target in (
        ("sc8380xp", 60, "v73", 11.2, 135.0),  # Snapdragon X Elite: 45 TOPS, LPDDR5X-8448
        ("sm8750", 69, "v79", 11.2, 85.0),  # Snapdragon 8 Elite: no published TOPS, taken as X Elite's; LPDDR5X-10667
        ("sm8850", 87, "v81", 15.0, 85.0),  # Snapdragon 8 Elite Gen 5: said to be a third faster
        ("sc8480xp", 88, "v81", 20.0, 152.0),  # Snapdragon X2 Elite: 80 TOPS
    )
}
PAPER = {
    "text_encoder_3": (3.0, 3.5),
    "text_encoder": (5.9, 43.6),
    "text_encoder_2": (14.0, 76.5),
    "vae_encoder": (941.7, 1206.5),
    "denoiser_stage0": (54.9, 104.7),
    "denoiser_stage1": (101.4, 218.3),
    "denoiser_stage2": (590.2, 938.3),
}
"""Milliseconds in the paper's Table 7 (arXiv 2511.06055) on X Elite and 8 Elite, at full size."""


def chosen(names: tuple[str, ...]) -> list[Target]:
    """Targets by name; none given: all. Raises UserError for names that are not in the table."""
    unknown = [name for name in names if name.lower() not in TARGETS]
    if unknown:
        raise UserError(f"target {unknown[0]!r} is not known; expected one of {', '.join(TARGETS)}")
    return [TARGETS[name.lower()] for name in names] or list(TARGETS.values())
