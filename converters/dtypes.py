"""Element types: how safetensors, NumPy and the command line call them."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from nd_jax.checked_files import shown
from nd_jax.errors import UserError

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

# safetensors name -> NumPy dtype, little endian as the format demands.
STORED: dict[str, np.dtype] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": BFLOAT16,
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype(bool),
}
STORED_NAME = {dtype: name for name, dtype in STORED.items()}

# What parameters may be, by the names that the command line takes.
PARAMETER = {"fp32": STORED["F32"], "bf16": BFLOAT16, "fp16": STORED["F16"]}
TORCH_NAME = {STORED["F32"]: "float32", BFLOAT16: "bfloat16", STORED["F16"]: "float16"}


def parameter_dtype(dtype: object | None) -> np.dtype | None:
    """``"fp32"``, ``"bf16"``, ``"fp16"`` or a dtype of that kind; ``None`` (keep what is stored) passes through.

    Raises:
        UserError: for any other.
    """
    if dtype is None:
        return None
    if isinstance(dtype, str) and dtype in PARAMETER:
        return PARAMETER[dtype]
    try:
        result = np.dtype(dtype)
    except TypeError:
        result = None
    if result not in TORCH_NAME:
        raise UserError(f"dtype {shown(dtype)} is not supported; expected one of {', '.join(PARAMETER)}")
    return result
