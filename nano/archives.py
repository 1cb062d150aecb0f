"""Pictures by their names, below an image root and in the zips and tars that data sets ship.

`find(folder, name)` -> a path, the bytes of an archive's member, or None.
"""

import os
import re
import tarfile
import zipfile
from bisect import bisect_right
from collections import defaultdict
from functools import lru_cache
from io import BufferedReader, RawIOBase
from itertools import accumulate
from pathlib import Path

MOST_BYTES = 64 << 20  # Ours: a larger picture is not read.
ARCHIVE = re.compile(r"(.+\.(?:zip|tar))(?:\.gz|\.?part[-.]?\w+|\.\d+)?")  # or a part of one


class Unreadable(ValueError):
    """A picture that is there by its name, and cannot be read or fetched."""


class Parts(RawIOBase):
    """image.zip.part-aa, -ab, ...: a file that was cut into several, read as if it were whole."""

    def __init__(self, paths: list[Path]):
        self.files = [open(path, "rb") for path in paths]
        self.ends, self.at = list(accumulate(path.stat().st_size for path in paths)), 0

    def readable(self):
        return True

    seekable = readable

    def seek(self, offset, whence=0):
        self.at = offset + (0, self.at, self.ends[-1])[whence]
        return self.at

    def readinto(self, buffer):
        k = min(bisect_right(self.ends, self.at), len(self.ends) - 1)
        self.files[k].seek(self.at - (self.ends[k - 1] if k else 0))
        read = self.files[k].readinto(buffer)
        self.at += read
        return read


@lru_cache(maxsize=8)
def members(folder: Path, deep: bool) -> dict[str, list[tuple]]:
    """The last part of a name -> all (whole name, size, a function that reads it).

    They are in the archives of the folder; with `deep` also in those below it, and plain files.
    """
    found, archives = defaultdict(list), defaultdict(list)
    for top, _, names in os.walk(folder):
        for name in sorted(names):
            if archive := ARCHIVE.fullmatch(name):
                archives[f"{top}/{archive[1]}"].append(Path(top, name))
            elif deep:
                found[name].append((f"{top}/{name}", 0, lambda path: path))
        if not deep:
            break
    for path, parts in archives.items():
        parts = [part for part in parts if str(part) == path] or parts
        try:
            file = BufferedReader(Parts(parts))
            if path.endswith(".zip"):
                z = zipfile.ZipFile(file)
                rows = [(info.filename, info.file_size, z.read) for info in z.infolist()]
            else:
                tar = tarfile.open(fileobj=file)
                rows = [
                    (
                        info.name,
                        info.size,
                        lambda _, tar=tar, info=info: tar.extractfile(info).read(),
                    )
                    for info in tar
                    if info.isfile()
                ]
        except (zipfile.BadZipFile, tarfile.TarError, OSError) as error:
            size = f"{sum(part.stat().st_size for part in parts):,} bytes"
            kind = f"broken {path[-3:]} of {size}, half downloaded?"
            raise ValueError(f"{path}: {kind} ({error})") from error
        for row in rows:
            found[Path(row[0]).name].append(row)
    return found


def find(folder: Path, name: str, deep: bool = False) -> str | bytes | None:
    """The picture whose name ends as `name` does; None if there is none, or several alike.

    Unreadable if it is damaged or too large.
    """
    rows, asked = members(folder, deep).get(Path(name).name, []), Path(name).parts[::-1]
    if len(rows) > 1:
        tails = [len(os.path.commonprefix([Path(row[0]).parts[::-1], asked])) for row in rows]
        rows = [row for row, tail in zip(rows, tails) if tail == max(tails) > 1]
    if len(rows) != 1:
        return None
    path, size, read = rows[0]
    if size > MOST_BYTES:
        raise Unreadable(f"{path}: {size:,} bytes, at most {MOST_BYTES:,} are read")
    try:
        return read(path)
    except Exception as error:  # zipfile and zlib raise many kinds.
        raise Unreadable(f"{path}: {error}") from error
