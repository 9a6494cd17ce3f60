"""The model of torch's allocator: its rules, one example each, worked out by hand."""

import itertools
import random

import pytest

from tests.card.allocator import (
    MIB,
    CachingAllocator,
    CardFull,
    ExpandableAllocator,
    peaks,
    smallest_card,
)

KINDS = [CachingAllocator, ExpandableAllocator]


def after(*requests, kind=CachingAllocator, limit=1 << 40):
    """Allocate sizes in MiB as numbers 1, 2, ...; a negative number frees that allocation."""
    allocator, number = kind(limit=limit), 0
    for request in requests:
        if request < 0:
            allocator.free(-request)
        else:
            number += 1
            allocator.allocate(number, int(request * MIB))
    return allocator


@pytest.mark.parametrize(
    ("size", "allocated", "reserved"),
    [
        (1, 512, 2 * MIB),  # the smallest block; small requests share a segment of 2 MiB
        (MIB, MIB, 2 * MIB),
        (MIB + 1, MIB + 512, 20 * MIB),  # larger ones share segments of 20 MiB
        (10 * MIB - 512, 10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB, 10 * MIB),  # still larger ones have a segment of their own
        (11 * MIB, 12 * MIB, 12 * MIB),  # rounded up to 2 MiB, of which 1 MiB is not split off ...
        (11 * MIB - 512, 11 * MIB - 512, 12 * MIB),  # ... but more is
    ],
)
def test_a_request_takes_a_block_of_a_segment(size, allocated, reserved):
    assert peaks([(1, size)]) == (allocated, reserved)


def test_large_remainders_are_split_off_and_small_ones_stay_in_the_block():
    assert after(40, -1, 30).free_blocks[False][0][0] == 10 * MIB  # 40 are free, 30 are taken
    assert not after(40, -1, 39).free_blocks[False]  # 1 MiB is left, which is not more than 1 MiB


def test_the_smallest_block_that_is_large_enough_is_taken():
    allocator = after(30, 40, 60, -1, -2, -3, 35)
    assert [size // MIB for size, _ in allocator.free_blocks[False]] == [5, 30, 60]


def test_free_neighbours_join_and_segments_do_not():
    assert [size // MIB for size, _ in after(8, 8, 12, -1, -2).free_blocks[False]] == [20]
    assert [size // MIB for size, _ in after(12, 12, -1, -2).free_blocks[False]] == [12, 12]


def test_free_segments_stay_reserved_until_the_card_is_full():
    assert after(30, -1, 32).reserved == 62 * MIB
    assert after(30, -1, 32, limit=60 * MIB).reserved == 32 * MIB
    with pytest.raises(CardFull):
        after(30, 32, limit=60 * MIB)


def test_a_segment_with_a_used_block_cannot_be_given_back():
    # 30 of 40 MiB are free, but 10 of them hold the whole segment: 40 + 32 are needed.
    with pytest.raises(CardFull):
        after(40, -1, 10, 32, limit=71 * MIB)
    assert after(40, -1, 10, 32, limit=72 * MIB).reserved == 72 * MIB


def test_an_expandable_segment_gives_its_pages_back_and_grows():
    allocator = after(40, -1, 10, 32, kind=ExpandableAllocator, limit=60 * MIB)
    # 10 of the first two pages of 20 MiB are used; 32 more fit into the other 30 and one more page.
    assert allocator.reserved == 60 * MIB and allocator.allocated == 42 * MIB
    # Five free pages in front are given back; 110 take the free half of the sixth page, and five pages behind it.
    again = after(100, 10, -1, 110, kind=ExpandableAllocator, limit=120 * MIB)
    assert again.reserved == again.allocated == 120 * MIB


def test_small_requests_do_not_use_large_segments():
    assert after(20, -1, 0.5).reserved == 22 * MIB
    assert after(20, -1, 0.5, kind=ExpandableAllocator).reserved == 22 * MIB


@pytest.mark.parametrize("kind", KINDS)
def test_the_smallest_card_is_the_limit_between_running_and_not(kind):
    events = [(1, 40 * MIB), (2, 30 * MIB), (1, 0), (3, 50 * MIB), (2, 0), (3, 0), (4, 90 * MIB)]
    smallest = smallest_card(events, kind)
    kind(limit=smallest).replay(events)
    with pytest.raises(CardFull):
        kind(limit=smallest * 99 // 100).replay(events)


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_never_overlap_and_all_of_them_are_accounted_for(kind):
    """Against the plainest oracle: the sum of the sizes, and intervals compared pair by pair."""
    draw, allocator, live = random.Random(0), kind(limit=3000 * MIB), {}
    for number in range(3000):
        if live and draw.random() < 0.48:
            allocator.free(gone := draw.choice(list(live)))
            del live[gone]
        else:
            live[number] = draw.choice([draw.randrange(1, MIB), draw.randrange(MIB, 40 * MIB)])
            try:
                allocator.allocate(number, live[number])
            except CardFull:
                del live[number]
    blocks = sorted((block.address, block.size) for block in allocator.blocks.values())
    assert all(a + size <= b for (a, size), (b, _) in itertools.pairwise(blocks))
    assert allocator.allocated == sum(size for _, size in blocks) >= sum(live.values())
    free = sum(size for keys in allocator.free_blocks.values() for size, _ in keys)
    assert allocator.reserved == allocator.allocated + free <= allocator.limit
