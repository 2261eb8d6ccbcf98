"""Random numbers by counting: the i-th number of a key is a function of key and i alone.

So any part of a sequence is made when it is needed, in chunks of any size, on any device, and is the same to the bit: integer
operations wrap alike on CPU and GPU, and the one conversion to float32 is rounded by IEEE 754.

References:
    [SAL11] Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011: the idea. The mixing is the two-round
        multiply-xorshift of 32 bits known as lowbias32, applied twice with a half of the key before each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from regraft.errors import InputError

MOST = 2**31 - 1
"""Numbers of one key."""

_FIRST, _SECOND = 0x7FEB352D, 0x846CA68B - 2**32


def random_uniform(key: int, start: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """Returns numbers ``start`` to ``start + count`` of a key, uniform in [-1, 1], float32 ``(count,)``.

    Args:
        key: Up to 64 bits; different keys give unrelated sequences.
        start: At least 0.
        count: ``start + count`` is at most :data:`MOST`.
        device: Where they are made.

    Raises:
        InputError: A key has no so many numbers.
    """
    if start < 0 or start + count > MOST:
        raise InputError(f"numbers {start} to {start + count} of a key were asked for; there are {MOST}: use fewer or smaller bases")
    state = torch.arange(start, start + count, dtype=torch.int32, device=device)
    _mix(state.bitwise_xor_(_signed(key)))
    _mix(state.bitwise_xor_(_signed(key >> 32)))
    return state.to(torch.float32).mul_(2.0**-31)


def _mix(state: Tensor) -> None:
    """Scrambles 32-bit integers in place, one to one. Shifts of signed integers bring copies of the sign in; the masks remove them."""
    state.bitwise_xor_((state >> 16).bitwise_and_(0xFFFF)).mul_(_FIRST)
    state.bitwise_xor_((state >> 15).bitwise_and_(0x1FFFF)).mul_(_SECOND)
    state.bitwise_xor_((state >> 16).bitwise_and_(0xFFFF))


def _signed(bits: int) -> int:
    """Returns the low 32 bits as a signed integer."""
    low = bits & 0xFFFFFFFF
    return low - 2**32 if low >= 2**31 else low
