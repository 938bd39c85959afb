"""The token layout of one denoiser call: which clips it sees, when they happened and who may attend to whom.

Order of tokens: text, then the history's clips oldest first, then the current unit; within a clip frame by frame,
row by row. The previous unit enters at the current stage's resolution, the one before one stage lower, and so on;
all older units share one clip at the lowest resolution. Unit 0 is one frame, later units ``frames_per_unit`` frames.

An ``Envelope`` is the static part. It has room for ``units`` finished units, so that one compiled program serves every
unit: the slot "k units back" holds unit ``unit_index - k`` and is empty where that is negative.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from nd_jax.errors import UserError

PADDED_TEXT, REAL, PADDED_IMAGE = 0, 1, 2
"""Segments: tokens attend within their own only, so that padding reaches nothing and no row of the mask is empty."""

UnitIndex = int | Int[Array, ""] | Int[Array, " b"]
Clip = tuple[int, int, int]


class Slot(NamedTuple):
    """A clip of history: units ``oldest`` .. ``newest`` units back, at resolution ``level``."""

    level: int
    oldest: int
    newest: int


def history_plan(stage: int, units: int) -> tuple[Slot, ...]:
    """Clips of a history of ``units`` finished units at ``stage``, oldest first."""
    own = min(max(stage, 1), units)  # units that come as clips of their own
    slots = [Slot(max(stage - back + 1, 0), back, back) for back in range(own, 0, -1)]
    return (*((Slot(0, units, own + 1),) if units > own else ()), *slots)


def legal_multiple(patch_size: int, stages: int) -> int:
    """Full-resolution latent heights and widths must be multiples of this."""
    return patch_size * 2 ** (stages - 1)


def unit_frames(unit: int, frames_per_unit: int = 1) -> slice:
    """Latent frames of a unit: frame 0 alone, then ``frames_per_unit`` at a time."""
    return slice(0, 1) if unit == 0 else slice((unit - 1) * frames_per_unit + 1, unit * frames_per_unit + 1)


@dataclass(frozen=True)
class Envelope:
    """Static shape of one stage's denoiser call; hashable.

    ``height`` and ``width`` are the latent's FULL size (that of the top stage), whatever ``stage`` is.
    Raises ``UserError`` for sizes that do not divide over the stages and patches, naming the nearest legal ones.
    """

    stage: int
    units: int
    text_length: int
    height: int
    width: int
    patch_size: int = 2
    frames_per_unit: int = 1
    stages: int = 3

    def __post_init__(self):
        if not 0 <= self.stage < self.stages:
            raise UserError(f"layout: stage {self.stage} does not exist, expected 0 to {self.stages - 1}")
        for name, least in (("units", 0), ("text_length", 0), ("patch_size", 1), ("frames_per_unit", 1)):
            if getattr(self, name) < least:
                raise UserError(f"layout: {name} is {getattr(self, name)}, expected at least {least}")
        multiple = legal_multiple(self.patch_size, self.stages)
        for name in ("height", "width"):
            size = getattr(self, name)
            if size < 1 or size % multiple:
                nearest = max(1, round(size / multiple)) * multiple
                raise UserError(
                    f"layout: latent {name} {size} does not fit {self.stages} stages and patches of {self.patch_size}; "
                    f"expected a multiple of {multiple}; the nearest is {nearest}"
                )

    @property
    def slots(self) -> tuple[Slot, ...]:
        """The history's clips, oldest first."""
        return history_plan(self.stage, self.units)

    def size(self, level: int) -> tuple[int, int]:
        """Latent height and width at a resolution level."""
        scale = 2 ** (self.stages - 1 - level)
        return self.height // scale, self.width // scale

    @cached_property
    def clips(self) -> tuple[Clip, ...]:
        """(frames, height, width) of every clip in latent pixels, oldest first; the last is the current unit."""
        history = [((s.oldest - s.newest + 1) * self.frames_per_unit, *self.size(s.level)) for s in self.slots]
        return (*history, (self.frames_per_unit, *self.size(self.stage)))

    @property
    def image_length(self) -> int:
        """Number of image tokens."""
        return sum(frames * h * w for frames, h, w in self.clips) // self.patch_size**2

    @property
    def length(self) -> int:
        """Number of tokens, text included."""
        return self.text_length + self.image_length

    def frame_times(self) -> tuple[np.ndarray, ...]:
        """Per clip, the time of each frame relative to the first frame of the current unit, int32."""
        f = self.frames_per_unit
        times = [np.arange(-slot.oldest * f, -(slot.newest - 1) * f, dtype=np.int32) for slot in self.slots]
        return (*times, np.arange(f, dtype=np.int32))


def envelopes(
    units: int,
    text_length: int,
    height: int,
    width: int,
    *,
    patch_size: int = 2,
    frames_per_unit: int = 1,
    stages: int = 3,
) -> tuple[Envelope, ...]:
    """One envelope per stage, lowest resolution first."""
    return tuple(
        Envelope(stage, units, text_length, height, width, patch_size, frames_per_unit, stages)
        for stage in range(stages)
    )


@jax.tree_util.register_dataclass
@dataclass
class LayoutArrays:
    """The data of a layout, per token with text first.

    ``times``: temporal position (text and padding 0), int32 [B or 1, L]. ``segments``: int32 [B or 1, L], see ``REAL``.
    """

    times: Int[Array, "b l"]
    segments: Int[Array, "b l"]
    fixed: tuple[int, ...] | None = dataclasses.field(default=None, metadata={"static": True})
    """``times`` where they are known while tracing and the same in every row."""

    def mask(self, causal: bool = True) -> Bool[Array, "b l l"]:
        """Whether query (axis 1) may see key (axis 2): same segment and, if causal, not later."""
        allowed = self.segments[:, :, None] == self.segments[:, None, :]
        return allowed & (self.times[:, :, None] >= self.times[:, None, :]) if causal else allowed


def check_unit_index(envelope: Envelope, unit_index: UnitIndex) -> Int[Array, ""] | Int[Array, " b"]:
    """``unit_index`` as int32. Concrete host values are checked; traced ones must lie in 0 .. envelope.units."""
    if isinstance(unit_index, int | np.integer | np.ndarray):
        low, high = np.min(unit_index), np.max(unit_index)
        if low < 0 or high > envelope.units:
            raise UserError(
                f"layout: unit index {low if low < 0 else high} does not fit an envelope for {envelope.units} units of "
                f"history, expected 0 to {envelope.units}; use a larger envelope"
            )
    return jnp.asarray(unit_index, jnp.int32)


def clip_times(envelope: Envelope, unit_index: UnitIndex) -> tuple[Int[Array, "b t"], ...]:
    """Absolute time of every frame of every clip, [B or 1, frames] each; negative where the frame does not exist.

    Where unit 0 stands in a slot of several frames, its one frame is the last of them.
    """
    index = check_unit_index(envelope, unit_index).reshape(-1, 1)
    first = (index - 1) * envelope.frames_per_unit + 1
    return tuple(first + relative for relative in envelope.frame_times())


def _arrays(times: Sequence, tokens: Sequence[int], text_mask: Array | None, text_length: int, xp=jnp) -> LayoutArrays:
    rows = max([t.shape[0] for t in times] + ([] if text_mask is None else [text_mask.shape[0]]))
    image = xp.concatenate([xp.repeat(t, n, axis=1) for t, n in zip(times, tokens, strict=True)], axis=1)
    image = xp.broadcast_to(image, (rows, image.shape[1]))
    real = xp.ones((rows, text_length), bool) if text_mask is None else xp.asarray(text_mask) > 0
    text = xp.broadcast_to(xp.where(real, REAL, PADDED_TEXT), (rows, text_length))
    segments = xp.concatenate([text, xp.where(image >= 0, REAL, PADDED_IMAGE)], axis=1)
    times = xp.concatenate([xp.zeros_like(text), xp.maximum(image, 0)], axis=1)
    return LayoutArrays(times.astype(np.int32), segments.astype(np.int32))


def layout_arrays(
    envelope: Envelope, unit_index: UnitIndex, text_mask: Int[Array, "b s"] | None = None
) -> LayoutArrays:
    """Times and segments of an envelope when unit ``unit_index`` (scalar or one per row, may be traced) is current.

    ``text_mask`` is 1 for real and 0 for padded text tokens; ``None`` means all real. With a scalar unit index and no
    mask there is one row for the whole batch. Raises ``UserError`` for a mask of another length than the envelope's.
    """
    if text_mask is not None and text_mask.shape[1] != envelope.text_length:
        raise UserError(f"layout: text mask has {text_mask.shape[1]} tokens, the envelope {envelope.text_length}")
    tokens = [h * w // envelope.patch_size**2 for _, h, w in envelope.clips]
    arrays = _arrays(clip_times(envelope, unit_index), tokens, text_mask, envelope.text_length)
    if not isinstance(unit_index, int):
        return arrays
    first = (unit_index - 1) * envelope.frames_per_unit + 1
    relative = [np.repeat(t, n) for t, n in zip(envelope.frame_times(), tokens, strict=True)]
    image = np.maximum(first + np.concatenate(relative), 0)
    return dataclasses.replace(arrays, fixed=(0,) * envelope.text_length + tuple(image.tolist()))


def exact_layout(
    clip_grids: Sequence[Clip], text_mask: Int[Array, "b s"] | None, patch_size: int = 2, text_length: int | None = None
) -> LayoutArrays:
    """The layout of any list of clips (frames, height, width), oldest first, without padding; frames count from 0.

    ``text_length`` is needed only without a mask. Numpy arrays unless the mask is a JAX array.
    """
    times, start, tokens = [], 0, []
    for frames, height, width in clip_grids:
        if height % patch_size or width % patch_size:
            raise UserError(f"layout: clip of {height}x{width} does not divide into patches of {patch_size}")
        times.append(np.arange(start, start + frames, dtype=np.int32)[None])
        tokens.append(height // patch_size * (width // patch_size))
        start += frames
    length = text_length or 0 if text_mask is None else text_mask.shape[1]
    traced = isinstance(text_mask, jax.Array)
    return _arrays(times, tokens, text_mask, length, jnp if traced else np)
