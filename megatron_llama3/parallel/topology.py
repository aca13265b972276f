"""Rank <-> (tp, cp, pp, dp) by arithmetic alone, so that any rank's groups are known at any scale (paper, section 3.3.2, figure 5)."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Coordinates:
    """Where a rank sits on each axis, every field counted from 0."""

    tp: int
    cp: int
    pp: int
    dp: int


@dataclass(frozen=True)
class Topology:
    """The size of each axis. Ranks are numbered with TP fastest, then CP, PP and DP: the innermost axis needs the most bandwidth."""

    tp: int = 1
    cp: int = 1
    pp: int = 1
    dp: int = 1

    @property
    def world_size(self) -> int:
        return self.tp * self.cp * self.pp * self.dp

    def rank(self, c: Coordinates) -> int:
        return c.tp + self.tp * (c.cp + self.cp * (c.pp + self.pp * c.dp))

    def coordinates(self, rank: int) -> Coordinates:
        # Digits of the rank's number, the fastest first.
        rank, tp = divmod(rank, self.tp)
        rank, cp = divmod(rank, self.cp)
        dp, pp = divmod(rank, self.pp)
        return Coordinates(tp, cp, pp, dp)

    def group_ranks(self, rank: int, *axes: str) -> list[int]:
        """The ranks that differ from `rank` only along `axes` ("tp", "cp", "pp", "dp"), in ascending order."""
        here = self.coordinates(rank)
        positions = [here]
        for axis in axes:
            positions = [Coordinates(**{**vars(p), axis: i}) for p in positions for i in range(getattr(self, axis))]
        return sorted(self.rank(p) for p in positions)
