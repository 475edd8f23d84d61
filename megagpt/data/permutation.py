"""A keyed permutation of 0..size-1 that is computed, not stored: the order of training samples takes no memory and no start-up.

A Feistel network on the smallest power of two that holds `size`, walked until it lands inside (format-preserving encryption,
Black and Rogaway 2002). On average fewer than two walks of six rounds.
"""

_MASK = (1 << 64) - 1
_ROUNDS = 6


def permute(index: int, size: int, key: int) -> int:
    """Where `index` goes: a bijection of 0..size-1 for each key. Raises ValueError outside the range."""
    return _walk(index, size, key, range(_ROUNDS))


def unpermute(index: int, size: int, key: int) -> int:
    """The inverse of `permute`."""
    return _walk(index, size, key, range(_ROUNDS - 1, -1, -1))


def mix(*values: int) -> int:
    """One 64-bit key from integers (splitmix64's finaliser, chained): changing any of them changes it."""
    state = 0x9E3779B97F4A7C15
    for value in values:
        state = _finalise((state ^ (value & _MASK)) + 0x9E3779B97F4A7C15)
    return state


def _walk(index: int, size: int, key: int, rounds: range) -> int:
    if not 0 <= index < size:
        raise ValueError(f"index={index} is outside 0..{size - 1}")
    bits = max((size - 1).bit_length(), 2)
    low_bits = bits // 2
    high_bits = bits - low_bits
    while True:
        high, low = index >> low_bits, index & ((1 << low_bits) - 1)
        # Even rounds change the high half, odd ones the low half; run backwards, the same steps undo themselves.
        for number in rounds:
            if number % 2 == 0:
                high ^= _finalise(key + (number << 56) + low) & ((1 << high_bits) - 1)
            else:
                low ^= _finalise(key + (number << 56) + high) & ((1 << low_bits) - 1)
        index = high << low_bits | low
        if index < size:
            return index


def _finalise(value: int) -> int:
    value &= _MASK
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _MASK
    return value ^ (value >> 31)
