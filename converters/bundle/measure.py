"""SNR of every graph in the form it is deployed in, on the recorded test split."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import onnxruntime

from nd_jax.converters.graphs.parts import ENCODER
from nd_jax.converters.graphs.session import run_session

GOALS = {
    "text_encoder_3": 45.0,
    "adapter": 45.0,
    "vae_encoder": 40.0,
    "denoiser_stage0": 29.0,
    "denoiser_stage1": 24.0,
    "denoiser_stage2": 24.0,
    "decoder": 35.0,
    "decoder_first": 35.0,
    "unet": 33.0,
    "image_decoder": 31.0,
    "upscaler": 40.0,
}
"""dB that a graph has to reach (encoder: the mean alone, which is what a sampled latent consists of; UNet and image
decoder: the paper's figures)."""
MEASURED = {ENCODER: ("mean",)}
"""Outputs that count, where not all do."""


def split_snr(
    name: str,
    session: onnxruntime.InferenceSession,
    runs: Iterable[tuple[Mapping[str, np.ndarray], Mapping[str, np.ndarray]]],
) -> float:
    """``outputs_snr`` of a session over runs (inputs, float32 outputs)."""
    return outputs_snr(name, ((reference, run_session(session, inputs)) for inputs, reference in runs))


def outputs_snr(name: str, pairs: Iterable[tuple[Mapping[str, np.ndarray], Mapping[str, np.ndarray]]]) -> float:
    """``20 log10(|ref| / |ref - found|)`` in dB over all pairs (reference, found) and the outputs that count; infinite
    for equal ones.

    States that a decoder only hands on, and values of one output, are weighed as they are: by their squares.
    """
    signal = error = 0.0
    for reference, found in pairs:
        for key in counted(name, reference):
            expected, got = np.asarray(reference[key], np.float64), np.asarray(found[key], np.float64)
            signal += float(np.square(expected).sum())
            error += float(np.square(expected - got).sum())
    with np.errstate(divide="ignore"):
        return float("inf") if not error else 10 * float(np.log10(signal / error))


def counted(name: str, outputs: Mapping[str, np.ndarray]) -> list[str]:
    """The outputs that count: a decoder's frames, not its states; the mean of moments; otherwise all."""
    if name in MEASURED:
        return [key for key in outputs if key in MEASURED[name]]
    frames = [key for key in outputs if key.startswith("frame/")]
    return frames or list(outputs)
