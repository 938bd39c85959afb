"""What text encoders are distilled on: prompts of several sources by index, the empty one among them."""

from __future__ import annotations

import bisect
import itertools
import operator
from collections.abc import Sequence
from typing import Any

from nd_jax.data.evaluation_prompts import refuse_evaluation_prompts
from nd_jax.errors import UserError


class PromptSource:
    """``source[i]`` is ``{"caption": str}``: those of ``sources`` (whose examples have ``caption``), one after another.

    A share ``empty`` of them, spread evenly, is the empty prompt instead, which guidance reads.
    Raises UserError without prompts, and at a prompt that evaluation uses.
    """

    def __init__(self, sources: Sequence[Any], *, empty: float = 0.0):
        self.sources, self.empty = list(sources), empty
        self.ends = list(itertools.accumulate(len(source) for source in self.sources))
        if not self.ends or not self.ends[-1]:
            raise UserError("prompts: there are none, expected folders of nd-jax data prompts, or captions")
        if not 0 <= empty < 1:
            raise UserError(f"prompts: a share of {empty} empty ones, expected at least 0 and below 1")

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> dict[str, str]:
        index = operator.index(index)
        if not 0 <= index < len(self):
            raise IndexError(f"prompts: index {index} of {len(self)}")
        # The golden ratio's multiples are spread evenly over [0, 1): any stretch of prompts has its share.
        if (index * 0.6180339887498949) % 1 < self.empty:
            return {"caption": ""}
        number = bisect.bisect_right(self.ends, index)
        caption = self.sources[number][index - self.ends[number] + len(self.sources[number])]["caption"]
        text = caption.decode() if isinstance(caption, bytes) else caption
        refuse_evaluation_prompts([text], f"prompts: number {index}")
        return {"caption": text}
