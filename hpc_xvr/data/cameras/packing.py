"""Pixels of 10 and 12 bit that are packed without gaps, most significant bit first."""

from __future__ import annotations

import math

import numpy as np


def unpack(data: np.ndarray, bits: int) -> np.ndarray:
    """Values of packed pixels.

    Args:
        data: (n,) uint8, whole groups: 5 bytes hold 4 values of 10 bit, 3 bytes 2 of 12 bit.
        bits: 10 or 12.

    Returns:
        (8 * n / bits,) uint16.
    """
    group = math.lcm(bits, 8)
    octets = data.reshape(-1, group // 8).astype(np.uint16)
    values = np.empty((len(octets), group // bits), np.uint16)
    for k in range(group // bits):
        octet, begin = divmod(k * bits, 8)  # a value lies within two bytes
        both = octets[:, octet] << 8 | octets[:, octet + 1]
        values[:, k] = both >> (16 - begin - bits) & (2**bits - 1)
    return values.ravel()
