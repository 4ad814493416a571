"""Text as bytes: where it comes from, what is held out, and which windows a step sees.

The default text is the Python standard library's own source, which every machine has. Whole packages are held out,
chosen by a hash of their name, because files of one package resemble each other: a split by file would test memory.
Documents are joined in order of their path, each ended by a NUL byte, into one file for training and one held out.
Both are read through memory maps, and their names carry a digest of their content, so a stale or damaged copy is
never used.
"""

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dilated_attention_pytorch.errors import InvalidInput

Bytes = npt.NDArray[np.uint8]

END_OF_DOCUMENT = b"\x00"
HELD_OUT_SHARE = 0.1
# Tests quote the modules that they test, and not every system ships them.
TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})
# Written by scripts: character tables, and the build settings of this machine.
GENERATED = frozenset({"encodings", "sysconfigdata"})


@dataclass(frozen=True)
class Source:
    """One text file: `path` on disk, `name` inside the text, and the `group` that is held out or trained on as a
    whole."""

    path: Path
    name: str
    group: str


@dataclass(frozen=True)
class Corpus:
    """Bytes to train on and bytes held out; `digest` names both, `origin` says in words where they came from."""

    train: Bytes
    held_out: Bytes
    digest: str
    origin: str


def standard_library() -> list[Source]:
    """The Python standard library's sources, without tests, installed packages and generated tables.

    A module and its pure-Python twin (`decimal`, `_pydecimal`) share one group.
    Raises InvalidInput where Python was installed without its sources.

    >>> groups = {source.group for source in standard_library()}
    >>> "json" in groups, "site-packages" in groups, "test" in groups
    (True, False, False)
    """
    root = Path(sysconfig.get_path("stdlib"))
    sources = []
    for path in _files(root, TEST_FOLDERS.union(("site-packages", "dist-packages", "lib-dynload"))):
        parts = path.relative_to(root).parts
        group = parts[0].removesuffix(".py").removeprefix("_py").lstrip("_")
        if path.suffix == ".py" and group.split("_")[0] not in GENERATED:
            sources.append(Source(path, "/".join(parts), group))
    if not sources:
        raise InvalidInput(f"no Python sources in {root}, the standard library of this Python; pass --data PATH")
    return sources


def folder_sources(root: Path) -> list[Source]:
    """The text files below `root`, hidden ones and links left out; the group is the first name below the folder.

    Folders that hold nothing but one folder are passed through first. A file counts as text when it is valid UTF-8
    without NUL bytes. Raises InvalidInput when there is none.
    """
    files = [path for path in _files(root, frozenset()) if _is_text(path)]
    if not files:
        raise InvalidInput(f"no text files in {root}: expected files of UTF-8 text without NUL bytes below it")
    top = Path(os.path.commonpath([path.parent for path in files]))
    return [Source(path, path.relative_to(top).as_posix(), path.relative_to(top).parts[0]) for path in files]


def _files(root: Path, skipped: frozenset[str]) -> list[Path]:
    """Plain files below `root` in order of path; no links, nothing hidden, no folder named in `skipped`."""
    found = []
    for folder, names, files in os.walk(root):
        here = Path(folder)
        names[:] = [n for n in names if not n.startswith(".") and n not in skipped and n != "__pycache__"]
        paths = [here / name for name in files if not name.startswith(".")]
        found += [path for path in paths if path.is_file() and not path.is_symlink()]
    return sorted(found)


def _is_text(path: Path) -> bool:
    """Whether the file is UTF-8 without NUL bytes. An unreadable file raises: leaving it out would be silent."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InvalidInput(f"cannot read {path}: {error.strerror}") from error
    if b"\x00" in data:
        return False
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def held_out_groups(sizes: dict[str, int]) -> set[str]:
    """The groups to hold out: in order of the SHA-256 of their names until a tenth of all bytes is reached.

    `sizes` gives the bytes of each group. Large groups, above a quarter of that tenth, are trained on, so that
    several kinds of text are held out; they are taken, smallest first, only when the others do not suffice. One group
    is always trained on.

    >>> sorted(held_out_groups({"a": 20, "b": 20, "c": 900, "d": 20, "e": 20, "f": 20}))
    ['a', 'b', 'd', 'e', 'f']
    """
    goal = HELD_OUT_SHARE * sum(sizes.values())
    hashed = sorted(sizes, key=lambda name: hashlib.sha256(name.encode()).digest())
    small = [name for name in hashed if sizes[name] <= goal / 4]
    large = sorted(sizes.keys() - set(small), key=lambda name: (sizes[name], name))
    chosen: set[str] = set()
    held = 0
    for name in [*small, *large]:
        if held >= goal or len(chosen) == len(sizes) - 1:
            break
        chosen.add(name)
        held += sizes[name]
    return chosen


def write_corpus(data: Path | None, folder: Path, window: int) -> Corpus:
    """Text written below `folder` as `train-<digest>.bin` and `held_out-<digest>.bin`, opened as memory maps.

    `data` is a file (its last tenth is held out), a folder, or None for the standard library. `window` is the number
    of bytes that one training example reads. Raises InvalidInput when `data` does not exist, holds no text, or too
    little.
    """
    if data is None:
        origin, pieces = (
            f"the standard library of Python {sysconfig.get_python_version()}",
            _grouped(standard_library()),
        )
    elif data.is_dir():
        sources = folder_sources(data)
        one_file = len(sources) == 1
        origin, pieces = f"the folder {data.name}", _one_file(sources[0].path) if one_file else _grouped(sources)
    elif data.is_file():
        origin, pieces = f"the file {data.name}", _one_file(data)
    else:
        raise InvalidInput(f"--data {data} does not exist; expected a text file or a folder of text files")
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = {split: folder / f"{split}.unfinished" for split in ("train", "held_out")}
    with unfinished["train"].open("wb") as train, unfinished["held_out"].open("wb") as held_out:
        for is_held_out, piece in pieces:
            (held_out if is_held_out else train).write(piece)
        for file in (train, held_out):
            file.flush()
            os.fsync(file.fileno())
    sizes = {split: path.stat().st_size for split, path in unfinished.items()}
    # Held out: one window and some targets behind it, so that at least a few comparisons can be made.
    if sizes["train"] < 2 * window or sizes["held_out"] < window + 1024:
        for path in unfinished.values():
            path.unlink()
        raise InvalidInput(
            f"too little text: {origin} gives {sizes['train']:,} bytes to train on and {sizes['held_out']:,} held out; "
            f"windows of {window:,} bytes need at least {2 * window:,} and {window + 1024:,}. Give more text, or a "
            "smaller window (--set window=...)"
        )
    digest = _digest(unfinished["train"], unfinished["held_out"])
    for split, path in unfinished.items():
        os.replace(path, folder / f"{split}-{digest}.bin")
    return open_corpus(folder, digest, origin)


def open_corpus(folder: Path, digest: str, origin: str) -> Corpus:
    """The corpus that `write_corpus` left in `folder`, checked against its digest.

    Raises InvalidInput when a file is missing or its content has changed.
    """
    paths = [folder / f"{split}-{digest}.bin" for split in ("train", "held_out")]
    for path in paths:
        if not path.is_file() or path.stat().st_size == 0:
            raise InvalidInput(f"{path} is missing or empty; the text of this run is gone, so it cannot be continued")
    found = _digest(*paths)
    if found != digest:
        raise InvalidInput(f"{folder}: the text has changed (digest {found}, expected {digest}); start a new run")
    train, held_out = (np.memmap(path, dtype=np.uint8, mode="r") for path in paths)
    return Corpus(train, held_out, digest, origin)


def _grouped(sources: list[Source]) -> Iterator[tuple[bool, bytes]]:
    sizes: dict[str, int] = {}
    for source in sources:
        sizes[source.group] = sizes.get(source.group, 0) + source.path.stat().st_size
    chosen = held_out_groups(sizes)
    for source in sources:
        data = source.path.read_bytes()
        if data.strip() and END_OF_DOCUMENT not in data:
            yield source.group in chosen, data + END_OF_DOCUMENT


def _one_file(path: Path) -> Iterator[tuple[bool, bytes]]:
    if not _is_text(path):
        raise InvalidInput(f"{path} is not text: expected UTF-8 without NUL bytes")
    data = path.read_bytes()
    cut = len(data) - int(len(data) * HELD_OUT_SHARE)
    yield False, data[:cut] + END_OF_DOCUMENT
    yield True, data[cut:] + END_OF_DOCUMENT


def _digest(*paths: Path) -> str:
    whole = hashlib.sha256()
    for path in paths:
        whole.update(path.stat().st_size.to_bytes(8, "little"))
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                whole.update(chunk)
    return whole.hexdigest()[:16]


@dataclass(frozen=True)
class Windows:
    """Every window of `length` bytes (and the byte after it) once per epoch, in an order that `seed` and the epoch
    fix.

    Position `n` of the endless sequence is window `order(n // count)[n % count]`, so a place in it is one integer and
    a run continues exactly where it stopped.

    >>> windows = Windows(np.arange(41, dtype=np.uint8), length=10, seed=0)
    >>> sorted(int(windows.at(n)[0]) for n in range(windows.count)), len(windows.at(0))
    ([0, 10, 20, 30], 11)
    """

    data: Bytes
    length: int
    seed: int

    @property
    def count(self) -> int:
        """Windows in one epoch."""
        return (len(self.data) - 1) // self.length

    def order(self, epoch: int) -> npt.NDArray[np.int64]:
        """The order of the windows in `epoch`. RandomState, because NumPy keeps its stream the same for ever."""
        return np.random.RandomState([self.seed, epoch]).permutation(self.count).astype(np.int64)

    def batch(self, position: int, size: int) -> Bytes:
        """Windows `position .. position + size - 1` of the endless sequence, as (size, length + 1) bytes."""
        order = {epoch: self.order(epoch) for epoch in {n // self.count for n in range(position, position + size)}}
        starts = [int(order[n // self.count][n % self.count]) * self.length for n in range(position, position + size)]
        return np.stack([self.data[start : start + self.length + 1] for start in starts])

    def at(self, position: int) -> Bytes:
        """The window at `position` of the endless sequence, `length + 1` bytes."""
        return np.asarray(self.batch(position, 1)[0])
