"""Reads the declared decompressed sizes of the batches of an Arrow file, before anything is decompressed.

pyarrow decompresses a batch as a whole. Each compressed buffer begins with its decompressed size; the message before
the buffers has their offsets. Source: Arrow columnar format, "Serialization and Interprocess Communication (IPC)",
Message.fbs and FlatBuffers' own layout of tables.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

_CONTINUATION = 0xFFFFFFFF  # precedes the length of a message since Arrow 0.15
_DICTIONARY_BATCH, _RECORD_BATCH = 2, 3  # Message.header_type
_LONGEST_MESSAGE = 64 << 20


def unpacked_sizes(content: IO[bytes]) -> Iterator[int]:
    """The decompressed size in bytes of each record or dictionary batch in a stream of messages.

    content: positioned at its first message; its position afterwards is undefined.

    Raises:
        OSError: not a stream of Arrow messages, or a damaged one.
    """
    try:
        while (length := _word(content)) not in (None, 0):
            if length == _CONTINUATION and not (length := _word(content)):
                return
            if not length or length > _LONGEST_MESSAGE:
                raise ValueError
            message = _Table.root(_exactly(content, length))
            start, size = content.tell(), message.number(3, "<q")
            if size < 0:
                raise ValueError
            yield sum(_sizes(content, message, start))
            content.seek(start + size)
    except (struct.error, ValueError, IndexError, OverflowError) as error:
        raise OSError("not an Arrow file, or a damaged one") from error


def _sizes(content: IO[bytes], message: "_Table", start: int) -> Iterator[int]:
    """Decompressed size of each compressed buffer of a message; `start` is the offset of its buffers."""
    kind = message.number(1, "<B")
    if kind not in (_DICTIONARY_BATCH, _RECORD_BATCH):
        return
    batch = message.table(2)
    if batch is not None and kind == _DICTIONARY_BATCH:
        batch = batch.table(1)
    if batch is None or batch.table(3) is None:  # not compressed
        return
    for offset, length in batch.pairs(2):
        if length:
            content.seek(start + offset)
            (size,) = struct.unpack("<q", _exactly(content, 8))
            yield max(0, size)  # -1: this buffer is not compressed


def _word(content: IO[bytes]) -> int | None:
    """The next four bytes as a number; None at the end."""
    data = content.read(4)
    return struct.unpack("<I", data)[0] if data else None


def _exactly(content: IO[bytes], count: int) -> bytes:
    data = content.read(count)
    if len(data) < count:
        raise ValueError
    return data


@dataclass(frozen=True)
class _Table:
    """A FlatBuffers table: `at` holds the distance back to its vtable, which has the offset of each field."""

    data: bytes
    at: int

    @classmethod
    def root(cls, data: bytes) -> "_Table":
        return cls(data, struct.unpack_from("<I", data)[0])

    def number(self, field: int, form: str) -> int:
        place = self._place(field)
        return struct.unpack_from(form, self.data, place)[0] if place else 0

    def table(self, field: int) -> "_Table | None":
        place = self._place(field)
        return _Table(self.data, place + struct.unpack_from("<I", self.data, place)[0]) if place else None

    def pairs(self, field: int) -> Iterator[tuple[int, int]]:
        """A list of structs of two numbers: Buffer(offset, length)."""
        place = self._place(field)
        if place:
            place += struct.unpack_from("<I", self.data, place)[0]
            (count,) = struct.unpack_from("<I", self.data, place)
            for index in range(count):
                yield struct.unpack_from("<qq", self.data, place + 4 + 16 * index)

    def _place(self, field: int) -> int:
        fields = self.at - struct.unpack_from("<i", self.data, self.at)[0]
        if fields < 0 or 4 + 2 * field >= struct.unpack_from("<H", self.data, fields)[0]:
            return 0
        offset = struct.unpack_from("<H", self.data, fields + 4 + 2 * field)[0]
        return self.at + offset if offset else 0
