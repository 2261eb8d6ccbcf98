"""A file that is hashed while it is written has the bytes and the checksum of one that was not."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import pytest

from regraft.streaming import writer
from regraft.streaming.writer import HashedFile


def test_the_checksum_is_that_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "_STEP_BYTES", 1000)  # so that it lets go of what is written on the way
    monkeypatch.setattr(writer, "WINDOW_BYTES", 2000)
    blocks = [os.urandom(size) for size in (7, 700, 0, 5000, 1, 3000)]
    with HashedFile(tmp_path / "a") as file:
        for block in blocks:
            file.pad(32)
            file.write(block)
    expected = b""
    for block in blocks:
        expected += bytes(-len(expected) % 32) + block
    assert (tmp_path / "a").read_bytes() == expected
    assert file.sha256 == hashlib.sha256(expected).hexdigest()


def test_a_disk_that_takes_a_part_of_a_block_is_full_and_gives_no_checksum(tmp_path: Path) -> None:
    class Full:
        left = 10

        def write(self, data: memoryview) -> int:
            taken, self.left = min(len(data), self.left), max(0, self.left - len(data))
            if data and not taken:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return taken

    file = HashedFile(tmp_path / "a")
    with pytest.raises(OSError, match="No space left"), file:  # noqa: PT012
        real, file._file = file._file, Full()  # type: ignore[assignment]
        try:
            file.write(b"0123456789")
            file.write(b"x")
        finally:
            file._file = real
    assert file.sha256 == ""
