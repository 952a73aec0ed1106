"""Figures that know what they were drawn from: the digest of the records is kept inside the PNG."""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from evidence.record import ROOT

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_HEAD = 8 + 25  # the signature and IHDR: 4 length, 4 name, 13 data, 4 checksum
_KEY = b"records\0"


@dataclass(frozen=True)
class Drawing:
    """A committed PNG, the records it shows, and how to draw it."""

    path: str
    records: Sequence[str]
    draw: Callable[[], Figure]

    def digest(self) -> bytes:
        """Of the records, as hexadecimal digits."""
        whole = hashlib.sha256()
        for record in self.records:
            whole.update((ROOT / record).read_bytes())
        return whole.hexdigest().encode()

    def stale(self) -> bool:
        """Whether the PNG is missing, or was drawn from other records."""
        file = ROOT / self.path
        return not file.is_file() or digest_in(file.read_bytes()) != self.digest()

    def png(self) -> bytes:
        """Drawn anew."""
        from lab_shared.plotting import to_png

        return with_digest(to_png(self.draw()), self.digest())


def with_digest(png: bytes, digest: bytes) -> bytes:
    """The PNG with a text chunk (PNG specification, 11.3.4.3) that holds the digest."""
    body = b"tEXt" + _KEY + digest
    return png[:_HEAD] + struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body)) + png[_HEAD:]


def digest_in(png: bytes) -> bytes | None:
    """What `with_digest` left in a PNG, None if it did not."""
    start = _HEAD + 8
    if png[_HEAD + 4 : start] != b"tEXt" or not png[start:].startswith(_KEY):
        return None
    (length,) = struct.unpack(">I", png[_HEAD : _HEAD + 4])
    return png[start + len(_KEY) : start + length]
