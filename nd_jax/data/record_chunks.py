"""How many records an array_record file has and how large they unpack, read from its chunk headers alone.

Such a file is a Riegeli file (its riegeli_records_file_format.md): 64 KiB blocks that begin with a header of 24 bytes,
and across them chunks that begin with a header of 40 bytes, each chunk with hashes of its own. The library checks the
hashes whenever it reads a chunk. It does not refuse a chunk that unpacks to more than memory holds: that is done here.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

BLOCK, BLOCK_HEADER, CHUNK_HEADER = 1 << 16, 24, 40  # bytes
RECORDS, OTHER = (b"r", b"t"), (b"s", b"m", b"p")  # kinds of chunks


class Chunk(NamedTuple):
    """One chunk as its header describes it."""

    begin: int
    kind: bytes
    records: int
    size: int
    """Bytes of all its records when unpacked."""


def record_chunks(path: Path) -> list[Chunk]:
    """The chunks of records, in order. Raises ValueError saying what is wrong with a file that has none or is cut."""
    size = path.stat().st_size
    if not size:
        raise ValueError("it is empty")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        found = [chunk for chunk in _chunks(data, size) if chunk.kind in RECORDS]
    if len(found) < 2:  # the table of records and, in the last block, where that table is
        raise ValueError("its end is missing")
    return found[:-2]


def _chunks(data: mmap.mmap, size: int) -> Iterator[Chunk]:
    at = 0
    while at < size:
        end = _after(at, CHUNK_HEADER)
        if end > size:
            raise ValueError(f"it ends within a chunk's header, at byte {size}")
        header = _bytes(data, at)
        stored, records = (int.from_bytes(header[a:b], "little") for a, b in ((8, 16), (25, 32)))
        kind = header[24:25]
        if kind not in RECORDS + OTHER:
            raise ValueError(f"at byte {at} is no chunk")
        end = _after(at, CHUNK_HEADER + stored)
        if end > size:
            raise ValueError(f"the chunk at byte {at} should end at byte {end}, the file ends at byte {size}")
        yield Chunk(at, kind, records, int.from_bytes(header[32:40], "little"))
        at = end


def _after(at: int, count: int) -> int:
    """The place ``count`` bytes after ``at``, block headers left out of the count."""
    block, place = divmod(at, BLOCK)
    room = BLOCK - BLOCK_HEADER
    blocks, rest = divmod(max(place - BLOCK_HEADER, 0) + count, room)
    return (block + blocks) * BLOCK + (BLOCK_HEADER + rest if rest else 0)


def _bytes(data: mmap.mmap, at: int) -> bytes:
    """A chunk's header, without the block header that may be before it or in its middle."""
    if at % BLOCK == 0:
        at += BLOCK_HEADER
    first = data[at : min(at + CHUNK_HEADER, at - at % BLOCK + BLOCK)]
    begin = at + len(first) + BLOCK_HEADER
    return first + data[begin : begin + CHUNK_HEADER - len(first)]
