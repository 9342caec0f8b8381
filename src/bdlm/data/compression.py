"""Opens files that may be compressed (.gz, .xz, .bz2, .zst), as a stream of bounded expansion.

In: a path. Out: a binary stream of the plain content. A file that expands without measure (a
compression bomb) is refused while it is read, so that it never fills the memory. Knows nothing
about records or text.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, BinaryIO

from bdlm.core.errors import DataError

# most plain bytes of a compressed byte, over what has been read; text compresses 3 to 20 times
RATIO = 200
SLACK = 1 << 26  # plain bytes that any file may have
CHUNK = 1 << 16
# 32 MB of output at the most: zstd stores 128 KiB of one repeated byte in 4 bytes
ZSTD_INPUT = 1 << 10
MAGIC = (  # what a file that is not text starts with
    (b"\x1f\x8b", "gzip data: let its name end in .gz"),
    (b"\x28\xb5\x2f\xfd", "Zstandard data: let its name end in .zst"),
    (b"\xfd7zXZ\x00", "xz data: let its name end in .xz"),
    (b"BZh", "bzip2 data: let its name end in .bz2"),
    (b"PAR1", "a Parquet file: let its name end in .parquet"),
    (
        b"ARROW1",
        "an Arrow file: name the folder that datasets.save_to_disk wrote, or write Parquet",
    ),
    (b"PK\x03\x04", "a zip archive: unpack it"),
    (b"%PDF", "a PDF: extract its text"),
    (b"\xff\xfe", "UTF-16: convert it, e.g. iconv -f utf-16 -t utf-8"),
    (b"\xfe\xff", "UTF-16: convert it, e.g. iconv -f utf-16 -t utf-8"),
)


def without_compression(path: Path) -> Path:
    """The path without its compression's ending: `a.txt` of `a.txt.gz`."""
    return path.with_suffix("") if path.suffix.lower() in COMPRESSIONS else path


def is_compressed(path: Path) -> bool:
    """Whether the name says that the file is compressed."""
    return path.suffix.lower() in COMPRESSIONS


def open_plain(path: Path) -> IO[bytes]:
    """The plain content of a file. Reading raises `DataError` where it expands too far or is
    damaged (see `Reading`).
    """
    if not is_compressed(path):
        return open(path, "rb")
    return io.BufferedReader(_Bounded(path), CHUNK)


def binary_kind(head: bytes) -> str | None:
    """What a file that starts with these bytes is, with the fix, where it is a known kind of
    something other than UTF-8 text.
    """
    known = next((what for magic, what in MAGIC if head.startswith(magic)), None)
    return known or ("binary data, not text: leave it out" if b"\x00" in head else None)


class Reading:
    """A context that turns what the system says about a file into one line with its name, as a
    `DataError`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, OSError | EOFError | zlib.error | lzma.LZMAError):
            raise DataError(f"{self.path} cannot be read ({error}); check the file") from error


class _Bounded(io.RawIOBase):
    """The expansion of a compressed file, in chunks, refused beyond `SLACK` + `RATIO` x the bytes
    taken from the file.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._out = path, 0
        self._file = open(path, "rb")  # noqa: SIM115 - closed by `close`
        try:
            self._inner = COMPRESSIONS[path.suffix.lower()](self._file)
        except BaseException:
            self._file.close()
            raise

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        content = self._inner.read(len(buffer))
        self._out += len(content)
        if self._out > SLACK + RATIO * self._file.tell():
            raise DataError(
                f"{self._path} expands more than {RATIO} times (over {self._out >> 20} MiB from"
                f" {self._file.tell():,} bytes), as a compression bomb does; if you trust it,"
                " expand it first and give the plain file"
            )
        buffer[: len(content)] = content
        return len(content)

    def readall(self) -> bytes:
        parts = []
        while part := self.read(1 << 20):
            parts.append(part)
        return b"".join(parts)

    def close(self) -> None:
        if not self.closed:
            self._inner.close()
            self._file.close()
        super().close()


class _Zstd:
    """Frames of Zstandard data one after the other; a frame that is cut short is an `EOFError`."""

    def __init__(self, file: BinaryIO, new: Callable[[], Any], error: type[Exception]) -> None:
        self._file, self._new, self._error = file, new, error
        self._frame: Any = None
        self._ready = memoryview(b"")
        self._left = b""

    def read(self, size: int) -> bytes:
        while not self._ready:
            content = self._left or self._file.read(ZSTD_INPUT)
            self._left = b""
            if not content:
                if self._frame is not None:
                    raise EOFError("the Zstandard data ends before its end mark")
                return b""
            self._frame = self._frame or self._new()
            try:
                self._ready = memoryview(self._frame.decompress(content))
            except self._error as error:
                raise OSError(f"not Zstandard data: {error}") from error
            if self._frame.eof:
                self._left, self._frame = self._frame.unused_data, None
        part, self._ready = self._ready[:size], self._ready[size:]
        return bytes(part)

    def close(self) -> None:
        self._frame, self._ready = None, memoryview(b"")


def _zstd(file: BinaryIO) -> Any:
    """Python's own module where there is one (3.14), else the package zstandard."""
    try:
        from compression import zstd  # type: ignore[import-not-found,unused-ignore]

        return _Zstd(file, zstd.ZstdDecompressor, zstd.ZstdError)
    except ImportError:
        pass
    try:
        import zstandard
    except ImportError:
        raise DataError(
            ".zst files need the package zstandard; run: pip install zstandard"
        ) from None
    return _Zstd(file, lambda: zstandard.ZstdDecompressor().decompressobj(), zstandard.ZstdError)


COMPRESSIONS: dict[str, Callable[[BinaryIO], Any]] = {
    ".gz": lambda file: gzip.GzipFile(fileobj=file, mode="rb"),
    ".xz": lzma.LZMAFile,
    ".bz2": bz2.BZ2File,
    ".zst": _zstd,
}
