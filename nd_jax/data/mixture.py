"""Several sources of clips as one, each with its share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from nd_jax.errors import UserError


class Mixture:
    """Random access to several sources, ``shares[k]`` examples of source k in every ``sum(shares)``.

    Every example of the source that lasts longest comes once; shorter sources are repeated.
    Raises UserError for a source or share without examples, and for clips of different sizes.
    """

    def __init__(self, sources: Sequence[Any], shares: Sequence[int]):
        if len(shares) != len(sources) or not sources or min(shares) < 1 or min(map(len, sources)) < 1:
            raise UserError(
                f"data: shares {tuple(shares)} of {len(sources)} sources; expected a share of at least 1 each"
            )
        sizes = {(source.height, source.width) for source in sources}
        if len(sizes) > 1:
            told = " and ".join(f"{height}x{width}" for height, width in sorted(sizes))
            raise UserError(f"data: clips of {told} in one batch; expected one size")
        self.height, self.width = sizes.pop()
        self.sources, self.shares = tuple(sources), tuple(shares)
        self._places = [(k, n) for k, share in enumerate(shares) for n in range(share)]
        self._rounds = max(-(-len(source) // share) for source, share in zip(sources, shares, strict=True))

    def __len__(self) -> int:
        return self._rounds * len(self._places)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not 0 <= index < len(self):
            raise IndexError(f"data: index {index} of {len(self)} clips")
        number, place = divmod(int(index), len(self._places))
        which, offset = self._places[place]
        source = self.sources[which]
        return {"video": source[(number * self.shares[which] + offset) % len(source)]["video"]}
