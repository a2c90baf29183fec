"""The element types that weights files may hold, under the names that each format gives them.

A type that is not in a table is refused by name: there is no guessing and no cast. All formats store little-endian.
"""

from __future__ import annotations

import sys

import ml_dtypes
import numpy as np

if sys.byteorder != "little":  # every reader here hands file bytes to numpy as they are
    raise ImportError("jaxft.hub.weights reads and writes little-endian files and needs a little-endian machine")

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

# https://huggingface.co/docs/safetensors (format): the names in the header.
SAFETENSORS: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": BFLOAT16,
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
FLOATS = frozenset(dtype for name, dtype in SAFETENSORS.items() if name[0] in "FB" and name != "BOOL")
SAFETENSORS_NAMES: dict[np.dtype, str] = {dtype: name for name, dtype in SAFETENSORS.items()}

# The storage classes that torch.save names in data.pkl.
TORCH_STORAGES: dict[str, np.dtype] = {
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": BFLOAT16,
    "DoubleStorage": np.dtype(np.float64),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}

# flax.serialization writes `array.dtype.name`.
FLAX: dict[str, np.dtype] = {
    dtype.name: dtype for dtype in (*SAFETENSORS.values(), np.dtype(np.complex64), np.dtype(np.complex128))
}
