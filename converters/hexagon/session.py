"""Sessions of onnxruntime on Qualcomm's provider and on nothing else. Imported by processes made for it alone."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnxruntime
import onnxruntime_qnn

PROVIDER = "QNNExecutionProvider"
COMMON = {"offload_graph_io_quantization": "0", "enable_htp_fp16_precision": "1"}
"""Quantising inputs and outputs is the binary's work; float graphs are fp16, the only floats that the NPU has."""


@functools.cache
def devices() -> tuple[Any, ...]:
    """The provider's device, once registered."""
    onnxruntime.register_execution_provider_library(PROVIDER, onnxruntime_qnn.get_library_path())
    found = [device for device in onnxruntime.get_ep_devices() if device.ep_name == PROVIDER]
    if not found:
        raise RuntimeError(f"{PROVIDER} has no device here")
    return tuple(found[:1])


def open_qnn(
    path: Path, number: int, *, entries: Mapping[str, str] | None = None, options: Mapping[str, str] | None = None
) -> onnxruntime.InferenceSession:
    """A session for the chip ``number`` (a target's). ``entries`` are the session's, ``options`` the provider's.

    Raises RuntimeError if anything at all would run elsewhere.
    """
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    for key, value in {"session.disable_cpu_ep_fallback": "1", **(entries or {})}.items():
        settings.add_session_config_entry(key, value)
    chosen = {"backend_path": onnxruntime_qnn.get_qnn_htp_path(), "soc_model": str(number), **COMMON, **(options or {})}
    settings.add_provider_for_devices(list(devices()), chosen)
    # The Python wrapper would retry on the CPU provider, and say nothing, if it were not told otherwise.
    session = onnxruntime.InferenceSession(str(path), settings, enable_fallback=0)
    session.disable_fallback()
    if session.get_providers()[:1] != [PROVIDER]:
        raise RuntimeError(f"it got the providers {session.get_providers()}; expected {PROVIDER} first")
    return session
