"""What combining takes, which grows faster than the number of images, and refusing what cannot fit.

The laws go through the measurements in `benchmarks/combine.md`: codes of 129 bytes, 768 dimensions, and a
cosine of about 0.6 between most images, which is the slowest geometry that was measured.
"""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass

from laion_assets.io.errors import InputError
from laion_assets.io.machine import free_disk, free_memory
from laion_assets.io.spill import HELD_BYTES
from laion_assets.io.text import as_bytes, count

MEMORY, MEMORY_OF_AN_IMAGE = 550e6, 107  # bytes, with two processes
MEMORY_OF_A_REPEAT = 100  # bytes of a row whose image another row has
MEASURED_CORES = 2
DISK_OF_AN_IMAGE = 675  # bytes
SMALL = 100_000  # images that are never refused for their memory
HOUR = 3600  # seconds
LINEAR, QUADRATIC = 36e-6, 728e-12  # core-seconds of an image, and of a pair of images
START = 11e-6  # core-seconds of an image when a stripe begins; the linear part has those of one stripe
STRIPE = 8 * HOUR  # core-seconds of comparing one stripe, at most: an hour on 16 cores
NODE = 16  # cores of a usual node


def stripes_of(images: int) -> int:
    """Return in how many stripes different images are compared; at least 1."""
    return max(1, math.ceil(QUADRATIC * images**2 / STRIPE))


def worth(cores: int) -> float:
    """Return the cores that would do as much if none waited: 16 do as much as 9."""
    return min(cores, MEASURED_CORES) + max(cores - MEASURED_CORES, 0) / 2


@dataclass(frozen=True)
class Needs:
    """What combining takes.

    Attributes:
        images: number of different ids; near-duplicates are among them.
        memory: bytes of memory.
        disk: bytes of intermediate files.
        core_seconds: time of a processor core, for all stripes.
        stripes: number of stripes in which the images are compared.

    """

    images: int
    memory: float
    disk: float
    core_seconds: float
    stripes: int

    @classmethod
    def of(cls, images: int, rows: int | None = None) -> Needs:
        """Estimate the needs of different images, which have some rows; by default one each."""
        repeats = 0 if rows is None else rows - images
        stripes = stripes_of(images)
        return cls(
            images,
            MEMORY + MEMORY_OF_AN_IMAGE * images + MEMORY_OF_A_REPEAT * repeats,
            DISK_OF_AN_IMAGE * images,
            (LINEAR + (stripes - 1) * START) * images + QUADRATIC * images**2,
            stripes,
        )

    def hours(self, nodes: int = 1, cores: int = NODE) -> float:
        """Return the time on some nodes, each of which compares one stripe after the other."""
        alone = (LINEAR - START) * self.images
        of_a_stripe = (self.core_seconds - alone) / self.stripes
        return (alone + math.ceil(self.stripes / nodes) * of_a_stripe) / worth(cores) / HOUR

    def shortage(self) -> str | None:
        """Return what this machine lacks; None if it has enough.

        The laws are of large requests: a small one takes less memory, and no disk.
        """
        memory, disk = free_memory(), free_disk()
        if self.images > SMALL and self.memory > memory:
            return f"{as_bytes(self.memory)} of memory, but {as_bytes(memory)} are free"
        if self.disk > max(disk, HELD_BYTES):
            where = tempfile.gettempdir()
            return f"{as_bytes(self.disk)} of disk, but {as_bytes(disk)} are free in {where}"
        return None

    def check(self) -> None:
        """Refuse what cannot fit on this machine.

        Raises:
            InputError: it has too little memory or disk; the message says how much is needed and free.

        """
        if lacks := self.shortage():
            raise InputError(
                f"combining {self.images:,} different images needs about {lacks}: give it more (TMPDIR "
                "names the folder of intermediate files), or split the seed set"
            )

    def __str__(self) -> str:
        """Describe the needs in one sentence."""
        unit, name = (HOUR, "core-hour") if self.core_seconds >= HOUR else (1, "core-second")
        return (
            f"combining {count(self.images, 'different image')} takes about "
            f"{count(max(round(self.core_seconds / unit), 1), name)}, {as_bytes(self.memory)} of memory "
            f"and {as_bytes(self.disk)} of disk"
        )
