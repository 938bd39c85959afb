"""The figures that compare a student's states with its teacher's, on states made by hand."""

from __future__ import annotations

import numpy as np
import pytest

from nd_jax.errors import UserError
from nd_jax.text_report import compare_states

RNG = np.random.Generator(np.random.Philox(0))
TEACHER = RNG.standard_normal((20, 5, 8)) + 2
MASK = (np.arange(5) < RNG.integers(1, 6, (20, 1))).astype(np.int32)


def test_equal_states():
    report = compare_states(TEACHER, TEACHER, MASK)
    assert report.tokens == MASK.sum()
    assert (report.mse, report.relative_mse) == (0, 0)
    assert report.cosine == pytest.approx(1)
    assert (report.neighbours, report.retrieval) == (1, 1)
    assert (report.separation, report.separation_correlation) == (pytest.approx(1), pytest.approx(1))
    assert report.neighbours_chance == 1 / 19


def test_padding_is_not_read():
    other = np.where(MASK[..., None] > 0, TEACHER, 1e3)
    assert compare_states(TEACHER, other, MASK) == compare_states(TEACHER, TEACHER, MASK)


def test_a_collapsed_student_is_near_but_separates_nothing():
    """The mean of all prompts: a decent cosine, no separation."""
    mean = np.broadcast_to(TEACHER[MASK > 0].mean(0), TEACHER.shape)
    report = compare_states(TEACHER, mean, MASK)
    assert report.cosine > 0.8
    assert report.separation == pytest.approx(0, abs=1e-6)
    assert report.separation_correlation < 0.5
    assert report.retrieval <= 0.1
    assert report.neighbours < 0.3


def test_a_scaled_student_keeps_neighbours_and_loses_separation():
    report = compare_states(TEACHER, 0.5 * TEACHER, MASK)
    assert report.cosine == pytest.approx(1)
    assert report.relative_mse == pytest.approx(0.25)
    assert report.separation == pytest.approx(0.5)
    assert (report.neighbours, report.separation_correlation) == (1, pytest.approx(1))


def test_shuffled_prompts_are_at_chance():
    report = compare_states(TEACHER, np.roll(TEACHER, 1, axis=0), np.ones_like(MASK))
    assert report.retrieval == 0
    assert abs(report.separation_correlation) < 0.4
    assert report.separation == pytest.approx(1)


def test_two_prompts_have_no_neighbours_to_agree_on():
    with pytest.raises(UserError, match="2 different prompts, expected at least 3"):
        compare_states(TEACHER[:2], TEACHER[:2], MASK[:2])
