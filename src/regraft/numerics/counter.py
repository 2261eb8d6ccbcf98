"""Counter-based random numbers: the i-th number of a key is a function of key and i alone.

Any part of a sequence can therefore be made when it is needed, in chunks of any size and on any device, with the same bits: integer
operations wrap in the same way on CPU and GPU, and IEEE 754 rounds the one conversion to float32.

References:
    [SAL11] Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011: the idea. The mixing is the two-round
        multiply-xorshift of 32 bits known as lowbias32, applied twice with a half of the key before each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from regraft.errors import InputError

MOST = 2**31 - 1
"""Largest number of random numbers that one key gives."""

_FIRST, _SECOND = 0x7FEB352D, 0x846CA68B - 2**32


def random_uniform(key: int, start: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """Returns the random numbers ``start`` to ``start + count - 1`` of a key, uniform in [-1, 1], float32 ``(count,)``.

    Args:
        key: Up to 64 bits; different keys give unrelated sequences.
        start: At least 0.
        count: ``start + count`` is at most :data:`MOST`.
        device: Device on which the numbers are made.

    Raises:
        InputError: ``start`` is negative, or ``start + count`` exceeds :data:`MOST`.
    """
    if start < 0 or start + count > MOST:
        raise InputError(f"numbers {start} to {start + count} of a key were asked for; there are {MOST}: use fewer or smaller bases")
    state = torch.arange(start, start + count, dtype=torch.int32, device=device)
    _mix(state.bitwise_xor_(_signed(key)))
    _mix(state.bitwise_xor_(_signed(key >> 32)))
    return state.to(torch.float32).mul_(2.0**-31)


def _mix(state: Tensor) -> None:
    """Mixes 32-bit integers in place by a bijection. Shifts of signed integers bring in copies of the sign; the masks remove them."""
    state.bitwise_xor_((state >> 16).bitwise_and_(0xFFFF)).mul_(_FIRST)
    state.bitwise_xor_((state >> 15).bitwise_and_(0x1FFFF)).mul_(_SECOND)
    state.bitwise_xor_((state >> 16).bitwise_and_(0xFFFF))


def _signed(bits: int) -> int:
    """Returns the low 32 bits as a signed integer."""
    low = bits & 0xFFFFFFFF
    return low - 2**32 if low >= 2**31 else low
