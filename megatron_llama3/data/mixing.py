"""In which order one dataset's stream is read: in blocks of the run's longest sequence, permuted, so that no batch is one long document.

A place is the number of tokens given so far, all epochs; here it is turned into a stretch of the stream of `packing.py`.

- A *window* is the blocks that begin in one epoch, permuted. The last ends among the next epoch's documents, so all are whole.
- A *group* is up to 256 of them that follow each other in that order. Sequences shorter than a block take turns in it: a piece of each
  block, then the next piece of each. So the short sequences of a length ramp are mixed as well.
- A window keeps the length of blocks, and a group that of pieces, with which it began; a new sequence length begins with the next group.

Every token is given once an epoch whatever the lengths are. All of it is arithmetic on a few numbers, which a checkpoint keeps.
"""

import hashlib
from functools import lru_cache
from typing import NamedTuple

_MOST_IN_A_GROUP = 256
_ROUNDS = 64


class Stretch(NamedTuple):
    """Tokens start to start + length of a dataset's stream."""

    start: int
    length: int


class Group(NamedTuple):
    """Blocks that take turns. All lengths are in tokens."""

    window: int
    """where its window begins in the stream, and how many tokens were given before it"""
    block_length: int
    number: int
    """of the group in its window"""
    piece_length: int
    lead: int
    """tokens that end the sequence which the group before could not end: the last block gives them, so that the others stay whole"""


class Mixing:
    """The order of a stream of that period. Windows that begin from now on have blocks of `block_length`; `key` names the order."""

    def __init__(self, tokens_per_epoch: int, block_length: int, key: str) -> None:
        self.tokens_per_epoch, self.block_length, self.key = tokens_per_epoch, block_length, key

    def first_group(self) -> Group:
        return Group(0, self.block_length, 0, self.block_length, 0)

    def restored(self, saved: dict[str, int], position: int) -> Group:
        """From a checkpoint, with `position` tokens given. Raises ValueError or TypeError where the two do not belong together."""
        group = Group(**saved)
        if not all(type(n) is int and n >= 0 for n in group) or not group.block_length or not 0 < group.piece_length <= group.block_length:
            raise ValueError(f"{saved} is no group of blocks")
        start, end = self._bounds(group)
        if not start <= position <= end or not 0 <= group.lead < group.piece_length or group.number >= self._groups(group):
            raise ValueError(f"{position} tokens given do not lie in {saved}")
        return group

    def group_at(self, group: Group, position: int, seq_length: int) -> Group:
        """The group in which a sequence begins at `position`; `group` is that of an earlier place, since which all had `seq_length`."""
        start, end = self._bounds(group)
        while position >= end:
            group = self._following(group, position, seq_length)
            start, end = self._bounds(group)
        if position == start:
            length = group.block_length if group.number else self.block_length
            group = _cut(group._replace(block_length=length), 0, seq_length)
        return group

    def stretches(self, group: Group, position: int, seq_length: int) -> list[Stretch]:
        """The sequence at `position`: one stretch, or several where the length of sequences has changed. `group` as in `group_at`."""
        group, found, given = self.group_at(group, position, seq_length), [], 0
        while given < seq_length:
            start, end = self._bounds(group)
            if position + given == end:
                group = self._following(group, position, seq_length)
                continue
            begin, length = self._rest_of_piece(group, position + given - start)
            length = min(length, seq_length - given)
            joins = found and sum(found[-1]) == begin
            found[-1:] = [Stretch(found[-1].start, found[-1].length + length)] if joins else [*found[-1:], Stretch(begin, length)]
            given += length
        return found

    def _blocks(self, group: Group) -> int:
        """In the group's window: those that begin before its epoch ends."""
        return -(-(self.tokens_per_epoch - group.window % self.tokens_per_epoch) // group.block_length)

    def _groups(self, group: Group) -> int:
        """In the group's window."""
        return -(-self._blocks(group) // _MOST_IN_A_GROUP)

    def _places(self, group: Group) -> tuple[int, int]:
        """First and last (not included) of the group's blocks in the permuted window; groups differ by one block at most."""
        blocks, groups = self._blocks(group), self._groups(group)
        return blocks * group.number // groups, blocks * (group.number + 1) // groups

    def _bounds(self, group: Group) -> tuple[int, int]:
        """Tokens given before the group and after it."""
        first, last = self._places(group)
        return group.window + first * group.block_length, group.window + last * group.block_length

    def _following(self, group: Group, position: int, seq_length: int) -> Group:
        """The next group, cut for sequences of which one begins at `position`."""
        _, end = self._bounds(group)
        is_last = group.number + 1 == self._groups(group)
        following = Group(end, self.block_length, 0, 0, 0) if is_last else group._replace(number=group.number + 1)
        return _cut(following, position - end, seq_length)

    def _rest_of_piece(self, group: Group, offset: int) -> Stretch:
        """From the token `offset` of the group to the end of its piece."""
        first, last = self._places(group)
        if offset < group.lead:
            return self._in_block(group, last - 1, offset, group.lead - offset)
        turn, offset = divmod(offset - group.lead, (last - first) * group.piece_length)
        width = min(group.piece_length, group.block_length - turn * group.piece_length)
        place, offset = first + offset // width, offset % width
        begin = turn * group.piece_length + offset + (group.lead if place == last - 1 else 0)
        return self._in_block(group, place, begin, min(width - offset, group.block_length - begin))

    def _in_block(self, group: Group, place: int, begin: int, length: int) -> Stretch:
        key = f"{self.key} {group.window // self.tokens_per_epoch} blocks"
        block = permuted(place, self._blocks(group), key)
        return Stretch(group.window + block * group.block_length + begin, length)


def _cut(group: Group, ahead: int, seq_length: int) -> Group:
    """The group for sequences of which one begins `ahead` tokens after the group does, or before it."""
    lead = ahead % seq_length if group.block_length % seq_length == 0 else 0
    return group._replace(piece_length=min(seq_length, group.block_length), lead=lead)


@lru_cache(maxsize=1 << 14)  # reading ahead has asked for what is read next
def permuted(number: int, count: int, key: str) -> int:
    """Where `number` goes in a permutation of 0..count-1 that depends on `key` alone: a swap-or-not shuffle (Hoang, Morris and Rogaway
    2012), which pairs all numbers in each round and swaps a pair or not, so that it needs no memory and no count is special."""
    for pivot, factor, summand in _rounds(count, key):
        partner = (pivot - number) % count
        if (factor * max(number, partner) + summand) >> 63 & 1:
            number = partner
    return number


@lru_cache(maxsize=512)
def _rounds(count: int, key: str) -> list[tuple[int, int, int]]:
    """What pairs the numbers in each round, and the two 64-bit numbers of a hash that says which pairs are swapped."""
    digests = [hashlib.sha256(f"{key} {number}".encode()).digest() for number in range(_ROUNDS)]
    numbers = [[int.from_bytes(part, "little") for part in (d[:16], d[16:24], d[24:])] for d in digests]
    return [(pivot % count, factor, summand) for pivot, factor, summand in numbers]
