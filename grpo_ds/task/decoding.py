"""Bytes of a file as text: UTF-8 only, and what to do about everything else.

Another encoding is never guessed: a wrong guess changes letters, and the model would learn them.
"""

import shlex
from pathlib import Path

from grpo_ds.errors import DataError

EXPORT = "Export it as JSON, CSV or Parquet first."
FOREIGN = {  # first bytes of a file that is not UTF-8 text -> its kind, what to do
    b"\xff\xfe\0\0": ("text in UTF-32", "Save it as UTF-8 (for instance: iconv -f UTF-32 -t UTF-8)."),
    b"\xff\xfe": ("text in UTF-16", "Save it as UTF-8 (for instance: iconv -f UTF-16 -t UTF-8)."),
    b"\xfe\xff": ("text in UTF-16", "Save it as UTF-8 (for instance: iconv -f UTF-16 -t UTF-8)."),
    b"\x1f\x8b": ("a gzip archive", "Unpack it first."),
    b"BZh": ("a bzip2 archive", "Unpack it first."),
    b"\xfd7zXZ": ("an xz archive", "Unpack it first."),
    b"\x28\xb5\x2f\xfd": ("a zstd archive", "Unpack it first."),
    b"PK\x03\x04": ("a zip archive or an office document", "Unpack it first, or save the table as CSV in UTF-8."),
    b"ARROW1": ("an Arrow table", EXPORT),
    b"SQLite format 3": ("an SQLite database", EXPORT),
    b"%PDF-": ("a PDF document", EXPORT),
}
AROUND = 12  # bytes on each side of the first one that is not UTF-8, shown as Windows-1252


def decode(name: str, content: bytes) -> str:
    """Decode UTF-8 and turn every line end into a line feed: in JSON, carriage returns occur only between values."""
    for beginning, (kind, remedy) in FOREIGN.items():
        if content.startswith(beginning):
            raise DataError(f"{name} is not UTF-8 text: it begins like {kind}.\n{remedy}")
    if b"\0" in content:
        raise DataError(
            f"{name} is not UTF-8 text: NUL byte at offset {content.index(0)}, as in UTF-16 and in binary files.\n"
            "Save it as UTF-8 (for instance: iconv -f UTF-16LE -t UTF-8)."
        )
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise _not_utf8(name, error.object, error.start) from None


def _not_utf8(name: str, content: bytes, offset: int) -> DataError:
    """Return the error for a file in another encoding, with the command that converts one of Windows."""
    line = content.count(b"\n", 0, offset) + 1
    shown = content[max(0, offset - AROUND) : offset + AROUND].decode("cp1252", "replace")
    piece = " ".join("".join(letter for letter in shown if letter.isprintable() or letter.isspace()).split())
    new = str(Path(name).with_suffix(f".utf8{Path(name).suffix}"))
    return DataError(
        f"{name} is not UTF-8 text: byte 0x{content[offset]:02x} at offset {offset}, line {line}.\n"
        f"Save it as UTF-8. If {piece!r} reads well, it is in Windows-1252, as office programs write CSV:\n"
        f"  iconv -f CP1252 -t UTF-8 {shlex.quote(name)} > {shlex.quote(new)}\n"
        "If not, name its encoding there instead (iconv -l lists them), or unpack it if it is an archive."
    )
