"""Codes of 2 to 8 bits as bytes and back: the order is that of the bits of a little-endian number.

Code k of a row takes bits k * bits .. k * bits + bits - 1 of the row, where bit i is bit i % 8 of
byte i // 8, the least significant one first. Hence

  8 bits   byte k is code k
  4 bits   byte b is code 2b | code 2b+1 << 4: even k in the low nibble, as a Q4Array has them
  2 bits   byte b is code 4b | code 4b+1 << 2 | code 4b+2 << 4 | code 4b+3 << 6
  3, 5, 6  8 (or 4) codes in 3, 5 (or 3) bytes; a code may lie across two bytes
"""

import numpy as np
from numpy.typing import NDArray

from q4jax.errors import ConfigError

Bytes = NDArray[np.uint8]
BITS = (2, 3, 4, 5, 6, 8)


def pack(codes: Bytes, bits: int) -> Bytes:
  """uint8[..., K] codes below 2^bits -> uint8[..., K * bits / 8].

  Raises:
    ConfigError: bits without a packing, rows that do not fill whole bytes, a code out of range.
  """
  _check(bits)
  k = codes.shape[-1]
  if k * bits % 8:
    raise ConfigError(f"{k} codes of {bits} bits do not fill whole bytes; pad the rows.")
  if codes.size and int(codes.max()) >> bits:
    raise ConfigError(f"code {int(codes.max())} does not fit {bits} bits.")
  if bits == 8:
    return codes.copy()
  per_run, run_bytes = _run(bits)
  runs = codes.reshape(*codes.shape[:-1], -1, per_run)
  out = np.zeros((*runs.shape[:-1], run_bytes), np.uint8)
  for i in range(per_run):
    byte, shift = divmod(i * bits, 8)
    out[..., byte] |= runs[..., i] << shift  # uint8: what is above bit 7 falls off.
    if shift + bits > 8:
      out[..., byte + 1] |= runs[..., i] >> (8 - shift)
  return out.reshape(*codes.shape[:-1], k * bits // 8)


def unpack(packed: Bytes, bits: int) -> Bytes:
  """The inverse of `pack`.

  Raises:
    ConfigError: bits without a packing, or bytes that are no whole number of runs.
  """
  _check(bits)
  if bits == 8:
    return packed.copy()
  per_run, run_bytes = _run(bits)
  if packed.shape[-1] % run_bytes:
    raise ConfigError(
      f"{packed.shape[-1]} bytes are no whole number of runs of {run_bytes} bytes, which hold "
      f"{per_run} codes of {bits} bits."
    )
  runs = packed.reshape(*packed.shape[:-1], -1, run_bytes)
  out = np.empty((*runs.shape[:-1], per_run), np.uint8)
  mask = np.uint8(2**bits - 1)
  for i in range(per_run):
    byte, shift = divmod(i * bits, 8)
    code = runs[..., byte] >> shift
    if shift + bits > 8:
      code = code | runs[..., byte + 1] << (8 - shift)
    out[..., i] = code & mask
  return out.reshape(*packed.shape[:-1], packed.shape[-1] * 8 // bits)


def _run(bits: int) -> tuple[int, int]:
  """The smallest number of codes that fills whole bytes, and that number of bytes."""
  per_run = 8 // np.gcd(bits, 8)
  return int(per_run), int(per_run * bits // 8)


def _check(bits: int) -> None:
  if bits not in BITS:
    raise ConfigError(f"codes of {bits} bits have no packing; {', '.join(map(str, BITS))} do.")
