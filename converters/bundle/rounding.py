"""Which way a weight is rounded, or at what scale, learned from recorded inputs by AIMET (aimet-onnx, an extra).

AdaRound (arXiv 2004.10568) decides for every weight whether it is rounded up or down; SeqMSE searches for every
channel's scale. Both only change a graph's integers and scales, which then go through our own quantiser: graphs keep
their form, names and 16-bit values.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from onnx import numpy_helper

from nd_jax.converters.bundle.encodings import Encoding, quantise, weight_encoding
from nd_jax.converters.bundle.quantise import CHANNEL_AXIS
from nd_jax.errors import UserError

Method = Literal["adaround", "seqmse"]
Rounded = Mapping[str, tuple[np.ndarray, Encoding]]
"""Integers and encoding of weights by name."""
CONFIG = "htp_quantsim_config_v79_per_channel_linear.json"


@dataclass(frozen=True)
class Rounding:
    """What to learn, for which graphs. ``iterations`` of AdaRound for every layer; AIMET recommends 10000."""

    method: Method
    graphs: tuple[str, ...] = ("decoder", "decoder_first", "upscaler")
    iterations: int = 10_000
    candidates: int = 20
    """Scales that SeqMSE tries for every channel."""


def check_aimet() -> Any:
    """The package. Raises UserError where it is missing."""
    try:
        import aimet_onnx
    except ImportError as error:
        raise UserError(
            f"rounding needs the package aimet-onnx ({error}): pip install 'nd-jax[aimet]', or use --rounding nearest"
        ) from None
    return aimet_onnx


def rounded_weights(path: Path, runs: Iterable[Mapping[str, np.ndarray]], rounding: Rounding) -> Rounded:
    """Learned integers and encodings of a saved float32 graph's weights, those of signed 8 bits by channel."""
    aimet, model = check_aimet(), onnx.load(path)
    inputs = [{name: np.ascontiguousarray(x, np.float32) for name, x in run.items()} for run in runs]
    before = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    nodes = {
        node.input[1]: node for node in model.graph.node if node.op_type in CHANNEL_AXIS and node.input[1] in before
    }
    folder = Path(aimet.__file__).parent / "common" / "quantsim_config"
    sim = aimet.QuantizationSimModel(
        model, param_type="int8", activation_type="int16", config_file=str(folder / CONFIG), dummy_input=inputs[0]
    )
    if rounding.method == "adaround":
        aimet.apply_adaround(sim, inputs, rounding.iterations)
    else:
        aimet.apply_seq_mse(sim, inputs, rounding.candidates)
    after = {tensor.name: numpy_helper.to_array(tensor) for tensor in sim.model.model.graph.initializer}
    found = {}
    for name, node in nodes.items():
        quantiser = sim.qc_quantize_op_dict.get(name)
        encodings = None if quantiser is None else quantiser.get_encodings()
        bias = before[node.input[2]] if len(node.input) > 2 else None
        if encodings:
            scale = np.array([each.delta for each in encodings], np.float32)
            found[name] = combined(before[name], after[name], scale, CHANNEL_AXIS[node.op_type], bias)
    return found


def combined(
    before: np.ndarray, after: np.ndarray, scale: np.ndarray, axis: int, bias: np.ndarray | None
) -> tuple[np.ndarray, Encoding]:
    """Integers and encoding of one weight: the learned ``scale`` [C] and the weight ``after`` learning, except for
    channels whose bias asks for a larger scale than their weights; those are rounded to nearest."""
    plain, ours = (weight_encoding(before, axis, bias=each) for each in (None, bias))
    raised = ours.scale > plain.scale
    shape = [-1 if k == axis else 1 for k in range(before.ndim)]
    integers = np.clip(np.rint(after / scale.astype(np.float64).reshape(shape)), -128, 127).astype(np.int8)
    integers = np.where(raised.reshape(shape), quantise(before, ours), integers)
    return integers, Encoding(np.where(raised, ours.scale, scale).astype(np.float32), ours.zero, axis)
