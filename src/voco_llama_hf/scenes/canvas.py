"""Where scenes are drawn: how large the picture is, how many objects it holds, and what its places are called."""

from __future__ import annotations

from dataclasses import dataclass


HALVES = (("top", "bottom"), ("left", "right"))
THIRDS = (("top", "middle", "bottom"), ("left", "middle", "right"))


@dataclass(frozen=True)
class Canvas:
    """
    A square picture, cut into cells; every object of a still scene lies inside a cell of its own, so no two overlap.

    Args:
        side (`int`): Pixels a side.
        grid (`int`): Cells a side. Those of a grid of two or three have names, those of a larger one rows and
            columns.
        sizes (`dict[str, tuple[int, int]]`): Pixels of small and large objects, both ends included.
        difficulties (`dict[str, tuple[int, int]]`): Numbers of objects of sparse and dense scenes, both ends included.
        moving (`tuple[int, int]`): Pixels of the objects of a video, both ends included.
    """

    side: int
    grid: int
    sizes: dict[str, tuple[int, int]]
    difficulties: dict[str, tuple[int, int]]
    moving: tuple[int, int]

    @property
    def cell(self) -> int:
        """Pixels of a cell a side."""
        return self.side // self.grid

    @property
    def third(self) -> int:
        """Pixels of a third of the picture, the cells of a video."""
        return self.side // 3

    @property
    def is_named(self) -> bool:
        """Whether the cells have names instead of numbers."""
        return self.grid <= 3

    @property
    def positions(self) -> tuple[str, ...]:
        """Names of the cells, rows first."""
        if self.is_named:
            rows, columns = HALVES if self.grid == 2 else THIRDS
            return tuple("center" if r == c == "middle" else f"{r} {c}" for r in rows for c in columns)
        numbers = range(1, self.grid + 1)
        return tuple(f"row {row} column {column}" for row in numbers for column in numbers)

    @property
    def words(self) -> tuple[str, ...]:
        """What is said of these places alone, with the space in front where there is one."""
        return () if self.is_named else ("row", " row", " column")

    def at(self, cell: int) -> str:
        """The place of a cell as a question names it."""
        return f"the {self.positions[cell]}" if self.is_named else self.positions[cell]


# 4 by 4 patches of 8 pixels: trainings of minutes on one CPU core
MINI = Canvas(
    side=32,
    grid=2,
    sizes={"small": (8, 9), "large": (13, 14)},
    difficulties={"sparse": (1, 2), "dense": (3, 4)},
    moving=(7, 9),
)
SMALL = Canvas(
    side=64,
    grid=3,
    sizes={"small": (11, 13), "large": (17, 19)},
    difficulties={"sparse": (1, 4), "dense": (5, 9)},
    moving=(13, 18),
)
# As many patches of 8 pixels as CLIP-L at 336 pixels has: 24 by 24
LARGE = Canvas(
    side=192,
    grid=5,
    sizes={"small": (11, 15), "large": (24, 34)},
    difficulties={"sparse": (1, 4), "dense": (5, 20)},
    moving=(16, 48),
)

# What a vision tower of 64 pixels can read in four tiles: scaled down to one, small objects have five pixels
TILES = Canvas(
    side=128,
    grid=3,
    sizes={"small": (10, 11), "large": (13, 14)},
    difficulties={"sparse": (1, 4), "dense": (5, 9)},
    moving=(13, 18),
)


def canvas_of(image_size: int) -> Canvas:
    """The canvas that a model of this image size is asked about; a size that no scenes have is resized to."""
    return next((canvas for canvas in (MINI, LARGE) if canvas.side == image_size), SMALL)
