"""Few sizes, so that few programs compile."""


def bucket(n: int, least: int = 1) -> int:
  """The smallest power of two that is at least n and `least`."""
  return max(least, 1 << (n - 1).bit_length())
