"""A model of torch's caching allocator: which bytes a sequence of allocations reserves on a card.

The rules are those of c10/cuda/CUDACachingAllocator.cpp (torch 2.13) with its defaults. A request is rounded up to
512 bytes. Requests of at most 1 MiB are cut from segments of 2 MiB; larger ones below 10 MiB from segments of 20 MiB;
still larger ones have a segment of their own, rounded up to 2 MiB. The smallest free block that is large enough is
taken, and split if enough remains. A freed block joins its free neighbours. Segments stay reserved until the card is
full; then those without a used block are given back, and the request is tried once more.

With expandable segments, each of the two pools is one segment that grows at its end, page by page, and every
remainder is split off; if the card is full, free pages are given back wherever they are.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass

MIB = 2**20
ALIGNMENT = 512  # kMinBlockSize
SMALL_REQUEST, SMALL_SEGMENT = MIB, 2 * MIB  # kSmallSize, kSmallBuffer
LARGE_REQUEST, LARGE_SEGMENT = 10 * MIB, 20 * MIB  # kMinLargeAlloc, kLargeBuffer
SEGMENT_ROUNDING = 2 * MIB  # kRoundLarge
UNLIMITED = 1 << 62
PROBES = 12  # halvings of the search for the smallest card

Event = tuple[int, int]  # number of an allocation, and its bytes; 0 bytes: it is freed


class CardFull(Exception):
    """The card has no room for a request, even after all free memory was given back."""


@dataclass(slots=True, eq=False)
class Block:
    """A piece of a segment. `before` and `after` are its neighbours."""

    address: int
    size: int
    small: bool
    used: bool = False
    mapped: bool = True  # False: address space of an expandable segment without memory behind it
    before: "Block | None" = None
    after: "Block | None" = None

    def key(self) -> tuple[int, int]:
        return self.size, self.address

    def fits(self) -> bool:
        return not self.used and self.mapped


def round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


class CachingAllocator:
    """Bytes allocated and reserved, now and at the peak. limit: bytes that the card has for torch."""

    def __init__(self, *, limit: int = UNLIMITED) -> None:
        self.limit = limit
        self.allocated = self.reserved = self.peak_allocated = self.peak_reserved = 0
        self.blocks: dict[int, Block] = {}  # by number of the allocation
        self.free_blocks: dict[bool, list[tuple[int, int]]] = {True: [], False: []}  # by pool: sorted keys
        self.at: dict[int, Block] = {}  # free blocks by address
        self.next_address = 0

    def allocate(self, number: int, size: int) -> None:
        size = max(ALIGNMENT, round_up(size, ALIGNMENT))
        block = self.find(size, small=size <= SMALL_REQUEST)
        if self.remainder_is_kept(block, size):
            self.split(block, size)
        block.used = True
        self.blocks[number] = block
        self.allocated += block.size
        self.peak_allocated = max(self.peak_allocated, self.allocated)

    def free(self, number: int) -> None:
        block = self.blocks.pop(number)
        self.allocated -= block.size
        block.used = False
        for other in (block.before, block.after):
            if other is not None and other.fits():
                self.forget(other)
                block = joined(block, other)
        self.keep(block)

    def replay(self, events: Iterable[Event]) -> None:
        """Allocate and free in this order. Raises CardFull."""
        for number, size in events:
            if size:
                self.allocate(number, size)
            else:
                self.free(number)

    # --- free blocks ------------------------------------------------------------------------------------------

    def find(self, size: int, *, small: bool) -> Block:
        """Take the best free block out of its pool, or a new one."""
        keys = self.free_blocks[small]
        place = bisect_left(keys, (size, 0))
        if place == len(keys):
            return self.new_block(size, small=small)
        block = self.at[keys[place][1]]
        self.forget(block)
        return block

    def keep(self, block: Block) -> None:
        insort(self.free_blocks[block.small], block.key())
        self.at[block.address] = block

    def forget(self, block: Block) -> None:
        keys = self.free_blocks[block.small]
        del keys[bisect_left(keys, block.key())], self.at[block.address]

    def remainder_is_kept(self, block: Block, size: int) -> bool:
        remainder = block.size - size
        return remainder >= ALIGNMENT if block.small else remainder > SMALL_REQUEST

    def split(self, block: Block, size: int) -> None:
        rest = Block(block.address + size, block.size - size, block.small, before=block, after=block.after)
        if block.after is not None:
            block.after.before = rest
        block.size, block.after = size, rest
        self.keep(rest)

    # --- segments ---------------------------------------------------------------------------------------------

    def new_block(self, size: int, *, small: bool) -> Block:
        segment = segment_size(size)
        self.make_room(segment)
        self.reserve(segment)
        block = Block(self.next_address, segment, small)
        self.next_address += segment + 1  # no two segments are neighbours
        return block

    def reserve(self, size: int) -> None:
        self.reserved += size
        self.peak_reserved = max(self.peak_reserved, self.reserved)

    def make_room(self, size: int) -> None:
        """Give free segments back if the card is full. Raises CardFull."""
        if self.reserved + size > self.limit:
            self.empty_cache()
        if self.reserved + size > self.limit:
            raise CardFull

    def empty_cache(self) -> None:
        for block in list(self.at.values()):
            if block.before is None and block.after is None:
                self.forget(block)
                self.reserved -= block.size


class ExpandableAllocator(CachingAllocator):
    """The allocator with expandable segments."""

    def __init__(self, *, limit: int = UNLIMITED) -> None:
        super().__init__(limit=limit)
        self.tails = {small: Block(int(small) << 60, 1 << 59, small, mapped=False) for small in (True, False)}
        self.holes: dict[bool, list[Block]] = {True: [self.tails[True]], False: [self.tails[False]]}

    def remainder_is_kept(self, block: Block, size: int) -> bool:
        return block.size - size >= ALIGNMENT

    def new_block(self, size: int, *, small: bool) -> Block:
        """Map pages behind the lowest addresses with enough room, together with a free block in front of them."""
        for again in (False, True):
            hole = next(hole for hole in self.holes[small] if room_at(hole) >= size)
            front = hole.before if hole.before is not None and hole.before.fits() else None
            missing = round_up(size - (front.size if front else 0), page_size(small))
            if self.reserved + missing <= self.limit:
                break
            if again:
                raise CardFull
            self.empty_cache()
        self.reserve(missing)
        block = self.mapped(hole, missing)
        if front is not None:
            self.forget(front)
            block = joined(block, front)
        return block

    def mapped(self, hole: Block, size: int) -> Block:
        block = Block(hole.address, size, hole.small, before=hole.before, after=hole)
        if hole.before is not None:
            hole.before.after = block
        hole.before, hole.address, hole.size = block, hole.address + size, hole.size - size
        if not hole.size:
            self.holes[hole.small].remove(hole)
            block.after = hole.after
            if hole.after is not None:
                hole.after.before = block
        return block

    def empty_cache(self) -> None:
        """Give back all whole pages inside free blocks."""
        for block in list(self.at.values()):
            page = page_size(block.small)
            start, end = round_up(block.address, page), (block.address + block.size) // page * page
            if start < end:
                self.unmap(block, start, end)

    def unmap(self, block: Block, start: int, end: int) -> None:
        self.forget(block)
        self.reserved -= end - start
        last = block.address + block.size
        if end < last:
            rest = Block(end, last - end, block.small, before=block, after=block.after)
            if block.after is not None:
                block.after.before = rest
            block.after, block.size = rest, end - block.address
            self.keep(rest)
        if start > block.address:
            front = Block(block.address, start - block.address, block.small, before=block.before, after=block)
            if block.before is not None:
                block.before.after = front
            block.before, block.address, block.size = front, start, end - start
            self.keep(front)
        block.mapped = False
        holes = self.holes[block.small]
        for other in (block.before, block.after):
            if other is not None and not other.used and not other.mapped:
                holes.remove(other)
                block = joined(block, other)
        insort(holes, block, key=lambda hole: hole.address)


def joined(block: Block, other: Block) -> Block:
    """Return one block in place of two neighbours."""
    first, second = (block, other) if block.address < other.address else (other, block)
    first.size += second.size
    first.after = second.after
    if second.after is not None:
        second.after.before = first
    return first


def room_at(hole: Block) -> int:
    return hole.size + (hole.before.size if hole.before is not None and hole.before.fits() else 0)


def segment_size(size: int) -> int:
    if size <= SMALL_REQUEST:
        return SMALL_SEGMENT
    return LARGE_SEGMENT if size < LARGE_REQUEST else round_up(size, SEGMENT_ROUNDING)


def page_size(small: bool) -> int:
    return SMALL_SEGMENT if small else LARGE_SEGMENT


def peaks(events: Iterable[Event]) -> tuple[int, int]:
    """Return the bytes allocated and reserved at the peak on a card without limit."""
    allocator = CachingAllocator()
    allocator.replay(events)
    return allocator.peak_allocated, allocator.peak_reserved


def smallest_card(events: list[Event], kind: type[CachingAllocator] = CachingAllocator) -> int:
    """Return the fewest bytes with which torch gets through, to within a 4096th of the peak."""
    too_small, enough = peaks(events)
    while not runs(events, kind, enough):
        too_small, enough = enough, 2 * enough
    for _ in range(PROBES):
        middle = (too_small + enough) // 2
        too_small, enough = (too_small, middle) if runs(events, kind, middle) else (middle, enough)
    return enough


def runs(events: list[Event], kind: type[CachingAllocator], limit: int) -> bool:
    try:
        kind(limit=limit).replay(events)
    except CardFull:
        return False
    return True
