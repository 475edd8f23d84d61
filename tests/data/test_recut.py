"""Samples of another length continue an epoch: no token twice, nearly none left out, then whole epochs of the new length."""

from hypothesis import given, settings
from hypothesis import strategies as st

from megagpt.data.permutation import mix
from megagpt.data.recut import Place, Windows, place_after
from megagpt.data.state import Cut


def first_token(place: Place, num_tokens: int, cut: Cut, seed: int, index: int) -> int:
    """As TokenDataset has it, written out."""
    rest = place.rest.length if place.rest else 0
    if place.rest and index < place.begin + rest:
        return place.rest.first_token(index - place.begin)
    windows = Windows(num_tokens, cut.seq_len, cut.seq_len, cut.shuffle_block)
    epoch, position = divmod(index - place.begin - rest, windows.length)
    return windows.window(position, mix(seed, place.epoch + epoch)) * cut.seq_len


@settings(max_examples=150, deadline=None)
@given(
    num_tokens=st.integers(400, 3000),
    seed=st.integers(0, 99),
    block=st.integers(4, 9),
    phases=st.lists(st.tuples(st.integers(3, 30), st.integers(1, 9), st.integers(0, 100)), min_size=2, max_size=4),
)
def test_no_token_comes_twice_before_the_next_epoch(
    num_tokens: int, seed: int, block: int, phases: list[tuple[int, int, int]]
) -> None:
    """phases: (tokens per sample, shuffle_block from the second on, how many per cent of what is left are given)."""
    phases[0] = (min(phases[0][0], 12), block, phases[0][2])
    used = [0] * num_tokens
    cuts, index = (Cut(0, phases[0][0], block),), 0
    for number, (seq_len, shuffle_block, percent) in enumerate(phases):
        if number:
            cuts = (*cuts, Cut(index, seq_len, shuffle_block))
        place = place_after(cuts, num_tokens, seed)
        whole = place.rest is None
        if whole and index:
            return  # the epoch was used up to its end: nothing of it was left to cut
        length = Windows(num_tokens, seq_len, seq_len, shuffle_block).length if whole else place.rest.length  # type: ignore[union-attr]
        for _ in range(length * percent // 100):
            start = first_token(place, num_tokens, cuts[-1], seed, index)
            assert start + seq_len + 1 <= num_tokens
            for token in range(start, start + seq_len):
                used[token] += 1
            index += 1
    assert max(used) <= 1
    place = place_after((*cuts, Cut(index, 5, 3)), num_tokens, seed)
    if place.rest is None:
        return
    for number in range(place.rest.length):  # all that is left
        start = place.rest.first_token(number)
        used[start : start + 5] = [count + 1 for count in used[start : start + 5]]
    assert max(used) <= 1
    base = place.rest.windows
    blocks_touched = (len(phases) + 1) * base.block * base.seq_len  # one that was being read at each change
    ends = (
        base.num_blocks * 29 + num_tokens - base.length * base.seq_len
    )  # less than a sample in each block, and the split's end
    assert used.count(0) <= blocks_touched + ends
    begin = index + place.rest.length
    windows = Windows(num_tokens, 5, 5, 3)
    assert first_token(place, num_tokens, Cut(index, 5, 3), seed, begin) == windows.window(0, mix(seed, place.epoch)) * 5
    assert place.epoch == 1


def test_an_epoch_that_is_used_up_is_followed_by_the_next() -> None:
    windows = Windows(1001, 10, 10, 8)
    assert windows.length == 100
    place = place_after((Cut(0, 10, 8), Cut(300, 50, 2)), 1001, seed=3)
    assert (place.begin, place.rest, place.epoch) == (300, None, 3)
    place = place_after((Cut(0, 10, 8), Cut(301, 40, 2)), 1001, seed=3)
    assert place.rest is not None
    # 13 blocks of 8 windows (80 tokens), the last of 4 (40 tokens); the one of sample 300 is abandoned
    assert place.rest.length in (12 * 2 - 1, 12 * 2)
    assert place.epoch == 4


def test_half_a_block_of_the_old_length_is_a_block_of_twice_the_length() -> None:
    """With 8 blocks of 4 x 10 tokens, 3 of which are given, 5 blocks of 2 x 20 tokens follow in the order of the epoch."""
    old, key = Windows(321, 10, 10, 4), mix(7, 0)
    place = place_after((Cut(0, 10, 4), Cut(12, 20, 4)), 321, seed=7)
    assert place.rest is not None
    expected = [old.window(position, key) * 10 for position in range(12, 32, 2)]
    assert [place.rest.first_token(i) for i in range(place.rest.length)] == expected
