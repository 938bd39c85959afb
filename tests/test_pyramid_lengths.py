"""Balanced lengths and the split of a batch into columns."""

import json
import re

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN

from nd_jax.errors import UserError
from nd_jax.pyramid.columns import column, column_stages, interleave
from nd_jax.pyramid.lengths import balanced_lengths

TABLE = json.loads((GOLDEN / "training" / "stage_length_table.json").read_text())["table"]


@pytest.mark.parametrize("name", TABLE)
def test_lengths_are_those_of_the_reference(name):
    facts = {key: None if value == "None" else int(value) for key, value in re.findall(r"(\w+)=(\w+)", name)}
    table = [
        [
            list(
                balanced_lengths(
                    rank,
                    call,
                    max_length=facts["max_temporal_length"],
                    sync_group=facts["video_sync_group"],
                    max_units=facts["max_units"],
                )
            )
            for call in range(1, len(row) + 1)
        ]
        for rank, row in enumerate(TABLE[name])
    ]
    assert table == TABLE[name]


def test_ranks_beyond_one_group_repeat_it():
    kwargs = {"max_length": 16, "sync_group": 4}
    assert balanced_lengths(6, 3, **kwargs) == balanced_lengths(2, 3, **kwargs)
    assert len(balanced_lengths(0, 1, stages=2, **kwargs)) == 2


def test_a_group_larger_than_the_video_is_refused():
    with pytest.raises(UserError, match="max_length 7 is less than sync_group 8"):
        balanced_lengths(0, 1, max_length=7, sync_group=8)
    with pytest.raises(UserError, match="call 0"):
        balanced_lengths(0, 0, max_length=8, sync_group=8)


def test_columns():
    assert column_stages((1, 2, 1)) == (0, 1, 1, 2)
    assert column_stages((0, 1)) == (1,)
    rows = jnp.arange(12).reshape(12, 1)
    parts = [column(rows, g, 4) for g in range(4)]
    np.testing.assert_array_equal(parts[1][:, 0], [1, 5, 9])
    np.testing.assert_array_equal(interleave(parts), rows)
    for ratios in ((), (0, 0), (1, -1), (0.5, 1)):
        with pytest.raises(UserError, match="sample ratios"):
            column_stages(ratios)
