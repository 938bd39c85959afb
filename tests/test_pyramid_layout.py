"""Token layouts: the padded envelope equals the exact layout on real tokens, and padding reaches nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nd_jax.errors import UserError
from nd_jax.pyramid.history import history_slots, unit_history
from nd_jax.pyramid.layout import (
    PADDED_IMAGE,
    Envelope,
    envelopes,
    exact_layout,
    history_plan,
    layout_arrays,
    unit_frames,
)

TEXT_MASK = np.array([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]])


def exact_clips(envelope, unit):
    """Clips of a unit without padding: (frames, h, w), oldest first."""
    f = envelope.frames_per_unit
    clips = []
    for slot in history_plan(envelope.stage, unit):
        frames = sum(1 if unit == back else f for back in range(slot.newest, slot.oldest + 1))
        clips.append((frames, *envelope.size(slot.level)))
    return [*clips, (1 if unit == 0 else f, *envelope.size(envelope.stage))]


def test_envelopes_of_the_paper():
    stages = envelopes(6, 128, 40, 64)
    assert [e.length for e in stages] == [408, 648, 1728]
    assert stages[0].clips == ((5, 10, 16), (1, 10, 16), (1, 10, 16))
    assert stages[1].clips == ((5, 10, 16), (1, 20, 32), (1, 20, 32))
    assert stages[2].clips == ((4, 10, 16), (1, 20, 32), (1, 40, 64), (1, 40, 64))
    assert len({*stages, *envelopes(6, 128, 40, 64)}) == 3


@pytest.mark.parametrize("frames_per_unit", [1, 2])
@pytest.mark.parametrize(("stages", "height", "width"), [(3, 8, 16), (3, 16, 8), (2, 4, 8), (4, 16, 16)])
def test_padded_equals_exact(stages, height, width, frames_per_unit):
    """Every stage and unit, text padding included: same times, segments and mask where tokens are real."""
    for stage in range(stages):
        envelope = Envelope(stage, 6, 5, height, width, frames_per_unit=frames_per_unit, stages=stages)
        build = jax.jit(lambda unit, envelope=envelope: layout_arrays(envelope, unit, TEXT_MASK))
        for unit in range(7):
            padded = jax.tree.map(np.asarray, build(unit))
            exact = exact_layout(exact_clips(envelope, unit), TEXT_MASK, 2)
            keep = padded.segments[0] != PADDED_IMAGE
            np.testing.assert_array_equal(padded.times[:, keep], exact.times)
            np.testing.assert_array_equal(padded.segments[:, keep], exact.segments)
            for causal in (True, False):
                mask = padded.mask(causal)
                np.testing.assert_array_equal(mask[:, keep][:, :, keep], exact.mask(causal))
                assert not mask[:, keep][:, :, ~keep].any()
                assert mask.any(-1).all()


def test_units_may_differ_within_a_batch():
    envelope = Envelope(1, 3, 5, 8, 8)
    units = np.array([0, 3, 1])
    together = jax.jit(lambda u: layout_arrays(envelope, u, TEXT_MASK))(units)
    for row, unit in enumerate(units):
        alone = layout_arrays(envelope, int(unit), TEXT_MASK[row : row + 1])
        np.testing.assert_array_equal(together.times[row], alone.times[0])
        np.testing.assert_array_equal(together.segments[row], alone.segments[0])


def test_layout_without_text_mask_has_one_row():
    arrays = layout_arrays(Envelope(0, 2, 3, 8, 8), 2)
    assert arrays.times.shape == arrays.segments.shape == (1, 3 + 3)
    np.testing.assert_array_equal(arrays.times[0], [0, 0, 0, 0, 1, 2])
    assert exact_layout([(1, 2, 2)], None, 2, text_length=3).times.shape == (1, 4)


def test_masks_and_times_match_the_reference(golden):
    case = golden("mmdit_pieces")
    checked = 0
    for name in case.meta["subcases"]:
        inputs, expected = case.subcase(name)
        masks = sorted(key for key in expected if key.startswith("attention_mask/"))
        for key in masks:
            stage = int(key.split("/")[1])
            clips = [inputs[k] for k in sorted(inputs) if k.startswith(f"sample/{stage}/")]
            clips = [clip.shape[2:] for clip in clips]
            text = inputs["encoder_attention_mask"][stage :: len(masks)]
            layout = exact_layout(clips, text, case.config["patch_size"])
            if f"rope_ids/{stage}" in expected:
                times = layout.times[:, text.shape[1] :, None]
                np.testing.assert_array_equal(times, expected[f"rope_ids/{stage}"])
            np.testing.assert_array_equal(layout.mask()[:, None], expected[key])
            checked += 1
    assert checked == 6


@pytest.mark.parametrize("frames_per_unit", [1, 2])
def test_history_slots_hold_the_exact_history(frames_per_unit):
    rng = np.random.Generator(np.random.Philox(5))
    frames = 1 + 4 * frames_per_unit
    latents = rng.standard_normal((2, frames, 8, 16, 3), dtype=np.float32)
    for stage in range(3):
        envelope = Envelope(stage, 4, 0, 8, 16, frames_per_unit=frames_per_unit)
        gather = jax.jit(lambda z, u, envelope=envelope: history_slots(envelope, z, u))
        for unit in range(5):
            exact = unit_history([latents[:, unit_frames(u, frames_per_unit)] for u in range(unit)], 3)[stage]
            exact = [clip[:, t] for clip in exact for t in range(clip.shape[1])]
            slots = gather(latents, jnp.array([unit, unit]))
            assert tuple(slot.shape[1:4] for slot in slots) == envelope.clips[:-1]
            padded = [slot[:, t] for slot in slots for t in range(slot.shape[1])]
            empty = len(padded) - len(exact)
            assert all(not np.any(frame) for frame in padded[:empty])
            for a, b in zip(padded[empty:], exact, strict=True):
                np.testing.assert_allclose(a, b, atol=1e-6)


def test_history_never_reads_the_current_or_later_frames():
    latents = np.ones((1, 5, 8, 8, 1), np.float32)
    latents[:, 2:] = np.nan
    for stage in range(3):
        for clip in history_slots(Envelope(stage, 4, 0, 8, 8), latents, 2):
            assert np.isfinite(clip).all()


def test_bad_layouts_are_refused():
    with pytest.raises(UserError, match=r"width 20 does not fit .* multiple of 8; the nearest is 16"):
        Envelope(0, 1, 4, 16, 20)
    with pytest.raises(UserError, match="stage 3 does not exist"):
        Envelope(3, 1, 4, 16, 16)
    with pytest.raises(UserError, match="units is -1"):
        Envelope(0, -1, 4, 16, 16)
    envelope = Envelope(0, 2, 4, 16, 16)
    for unit in (3, -1, np.array([0, 3])):
        with pytest.raises(UserError, match="expected 0 to 2"):
            layout_arrays(envelope, unit)
    with pytest.raises(UserError, match="text mask has 5 tokens, the envelope 4"):
        layout_arrays(envelope, 0, TEXT_MASK)
    with pytest.raises(UserError, match="3x4 does not divide"):
        exact_layout([(1, 3, 4)], None, 2)
