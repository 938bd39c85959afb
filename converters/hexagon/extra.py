"""The extra ``hexagon``: Qualcomm's compiler and emulator as the wheel onnxruntime-qnn brings them."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path

from nd_jax.errors import UserError

PACKAGE, MODULE, LICENCE = "onnxruntime-qnn", "onnxruntime_qnn", "Qualcomm_LICENSE.pdf"


def installed() -> bool:
    """Whether the compiler is there; nothing is imported."""
    return importlib.util.find_spec(MODULE) is not None and importlib.util.find_spec("onnxruntime") is not None


def require() -> dict[str, str]:
    """Versions of the packages that a binary depends on. Raises UserError, which says what to do, without them."""
    if not installed():
        raise UserError(
            f"npu: the package {PACKAGE} is missing (Linux on x86-64, glibc 2.35 or later): pip install "
            f"'nd-jax[hexagon]'; it brings Qualcomm's libraries under Qualcomm's own licence ({LICENCE} in the wheel)"
        )
    return {name: importlib.metadata.version(name) for name in (PACKAGE, "onnxruntime")}


def licence() -> Path:
    """Where the installed wheel keeps the licence of Qualcomm's libraries."""
    spec = importlib.util.find_spec(MODULE)
    return Path(spec.origin).parent / LICENCE if spec is not None and spec.origin else Path(LICENCE)


def licence_line() -> str:
    """What people are told before the libraries are used."""
    return f"using Qualcomm's compiler and emulator under Qualcomm's licence: {licence()}"
