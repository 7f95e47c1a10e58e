"""The few sizes of batch that a device is prepared for."""

from collections.abc import Iterator


def buckets_up_to(max_batch: int) -> tuple[int, ...]:
    """Return the sizes that are prepared, ascending: the powers of two below ``max_batch``, and that itself."""
    return (*(2**power for power in range(max_batch.bit_length()) if 2**power < max_batch), max_batch)


def bucket_of(count: int, buckets: tuple[int, ...]) -> int:
    """Return the smallest prepared size that holds so many images, from 1 to the largest."""
    return next(size for size in buckets if size >= count)


def portions(count: int, most: int) -> Iterator[slice]:
    """Return slices that take so many rows in order, at most ``most`` at a time."""
    return (slice(start, min(start + most, count)) for start in range(0, count, most))
