"""Chips that graphs are made for: names, numbers and the rates that latency estimates assume."""

from __future__ import annotations

from typing import NamedTuple

from nd_jax.errors import UserError

LARGEST = 1 << 32
"""Bytes of one context binary: a Hexagon process has 32-bit addresses."""


class Target(NamedTuple):
    """``number``: the compiler's ``soc_model``; ``arch``: of the Hexagon. ``tmacs``: 10^12 multiply-adds a second with
    8-bit weights and 16-bit activations, half the 8-bit rate; ``gigabytes``: memory traffic a second. The last two are
    assumptions from published peak figures, not measurements. ``title``: what the chip is sold as;
    ``windows``: it is a laptop's."""

    name: str
    number: int
    arch: str
    tmacs: float
    gigabytes: float
    title: str
    windows: bool = False


TARGETS = {
    target[0]: Target(*target)
    for target in (
        # 45 TOPS, LPDDR5X-8448
        ("sc8380xp", 60, "v73", 11.2, 135.0, "Snapdragon X Elite", True),
        # no published TOPS, taken as X Elite's; LPDDR5X-10667
        ("sm8750", 69, "v79", 11.2, 85.0, "Snapdragon 8 Elite"),
        # said to be a third faster
        ("sm8850", 87, "v81", 15.0, 85.0, "Snapdragon 8 Elite Gen 5"),
        # 80 TOPS
        ("sc8480xp", 88, "v81", 20.0, 152.0, "Snapdragon X2 Elite", True),
        # no published TOPS, taken as half of X Elite's; LPDDR5X-8400
        ("sm8550", 43, "v73", 5.6, 67.0, "Snapdragon 8 Gen 2"),
        # no published TOPS, taken as three quarters of X Elite's; LPDDR5X-9600
        ("sm8650", 57, "v75", 8.4, 77.0, "Snapdragon 8 Gen 3"),
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


def named(names: tuple[str, ...]) -> tuple[str, ...]:
    """The names without repetitions. Raises UserError where there are none: binaries are made for somebody."""
    found = tuple(dict.fromkeys(name.lower() for name in names if name))
    if not found:
        raise UserError(f"--target is missing; expected one of {', '.join(TARGETS)}")
    return found
