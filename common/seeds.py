"""Streams of random numbers. A stream's purpose is part of its seed, so no two streams are
equal."""
import hashlib

import numpy as np


def derive_seed(purpose: str, *numbers: int) -> int:
    """A 63-bit seed from a purpose, such as "order of the faces", and numbers, such as (seed,
    epoch)."""
    text = "/".join(map(str, (purpose, *numbers)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def random_stream(purpose: str, *numbers: int) -> np.random.Generator:
    """NumPy's generator for a purpose and numbers."""
    return np.random.default_rng(derive_seed(purpose, *numbers))
