"""SNR of a graph against the JAX network, on onnxruntime's CPU provider."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime

from nd_jax.converters.graphs.builder import DataFile
from nd_jax.converters.graphs.parts import Part
from nd_jax.converters.graphs.session import open_session, run_session, snr
from nd_jax.errors import UserError

LEAST = 100.0
"""dB that every float32 graph reaches."""


def part_snr(part: Part, session: onnxruntime.InferenceSession, rng: np.random.Generator, samples: int = 1) -> float:
    """The lowest SNR in dB over all outputs and samples. Outputs that the reference does not have are not compared."""
    found = []
    for _ in range(samples):
        inputs, reference = part.sample(rng)
        outputs = run_session(session, inputs)
        common = outputs.keys() & reference.keys()
        found += [snr(reference[name], outputs[name]) for name in common]
        if not common:
            raise UserError(f"graph {part.name}: none of its outputs has a reference")
    return min(found)


def save_part(part: Part, folder: Path, data: DataFile | None = None) -> Path:
    """Write one graph and its weights into ``folder``."""
    path = folder / f"{part.name}.onnx"
    if data is not None:
        part.graph.save(path, data)
        return path
    with DataFile(folder / f"{part.data}.data") as own:
        part.graph.save(path, own)
    return path


def check_part(part: Part, path: Path, seed: int = 0, samples: int = 1) -> float:
    """``part_snr`` of a saved graph. Raises UserError below 100 dB: such a graph is not the network it came from."""
    found = part_snr(part, open_session(path), np.random.Generator(np.random.Philox(seed)), samples)
    if found < LEAST:
        raise UserError(f"graph {part.name} is {found:.1f} dB from the JAX network; expected at least {LEAST:.0f} dB")
    return found
