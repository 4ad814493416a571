"""The shared object: compiled by the system's compiler on first use into a private folder, then loaded by ctypes.

Nothing happens at import. Whatever is in the way is told as one sentence with the way out, never raised.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import platformdirs
import torch

from dilated_attention_pytorch.backends.native.structs import check_layout

SOURCE = Path(__file__).parent / "source"
PREBUILT = Path(__file__).parent / "prebuilt"
"""A wheel may carry ``<machine>-<vector>.so`` here; the best one that the CPU can run is taken before any compiler."""
VECTORS = ("avx512", "avx2", "portable")
COMPILE_SECONDS = 300
NO_NATIVE = "use backend='sdpa'"

_CPU_NEEDS = {
    "avx512": ("avx512f", "avx512bw", "avx512dq", "avx512vl", "fma", "avx2"),
    "avx2": ("avx2", "fma"),
    "portable": (),
}
_FLAGS = {
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mprefer-vector-width=512"),
    "avx2": ("-mavx2", "-mfma"),
    "portable": ("-DDA_PORTABLE",),
}
_loaded: dict[tuple[str, str | None], ctypes.CDLL | str] = {}
_lock = threading.Lock()


def cache_folder() -> Path:
    """Where built libraries lie: a folder of the user's own cache."""
    return platformdirs.user_cache_path("dilated-attention-pytorch") / "native"


def load(vector: str = "auto") -> ctypes.CDLL | str:
    """The library, built if need be, or the reason why there is none; the answer is kept for the process.

    ``vector`` is "auto" (what this CPU has), or one of `VECTORS`.
    """
    key = (vector, os.environ.get("CC"))
    with _lock:
        if key not in _loaded:
            _loaded[key] = find_or_build(vector, cache_folder())
        return _loaded[key]


@cache
def thread_team() -> int | None:
    """The address of GOMP_parallel in the OpenMP library that PyTorch brought along, or None where it brought another.

    Its threads wait actively for a while after each of PyTorch's operators, so threads of our own would share cores
    with them; the same team works without that.
    """
    if torch.backends.openmp.is_available():
        team = getattr(ctypes.CDLL(None), "GOMP_parallel", None)
        if team is not None:
            return ctypes.cast(team, ctypes.c_void_p).value
    return None


def find_or_build(vector: str, folder: Path) -> ctypes.CDLL | str:
    """The library from the package, from ``folder``, or built into it; otherwise the reason why not."""
    if sys.platform == "win32" or sys.byteorder != "little":
        return f"the C kernel needs POSIX threads and a little-endian CPU, this is {platform.platform()}; {NO_NATIVE}"
    flags = cpu_flags()
    missing = [f for f in _CPU_NEEDS.get(vector, ()) if flags is not None and f not in flags.split()]
    if missing or (vector in ("avx512", "avx2") and not _is_x86()):
        return f"this CPU has no {' '.join(missing) or vector}; leave vector='auto', or {NO_NATIVE}"
    prebuilt = _prebuilt(vector, flags)
    if prebuilt is not None:
        return prebuilt
    compiler = find_compiler()
    if isinstance(compiler, str):
        return compiler
    refused = prepare_folder(folder)
    if refused is not None:
        return refused
    recipe = compiler.recipe(vector, flags)
    for path in sorted(folder.glob(f"native-{recipe}-*.so")):
        library = _open_whole(path)
        if isinstance(library, ctypes.CDLL):
            return library
        path.unlink(missing_ok=True)  # cut short or not ours: build it again
    built = compiler.build(vector, folder, recipe)
    return built if isinstance(built, str) else _open_whole(built)


def _is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")


def cpu_flags() -> str | None:
    """The CPU's features as the system lists them, or None where it does not."""
    try:
        text = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return None
    lines = (line.partition(":") for line in text.splitlines())
    return next((value.strip() for name, _, value in lines if name.strip() in ("flags", "Features")), None)


def _prebuilt(vector: str, flags: str | None) -> ctypes.CDLL | None:
    for name in VECTORS if vector == "auto" else (vector,):
        path = PREBUILT / f"{platform.machine()}-{name}.so"
        runs = not _CPU_NEEDS[name] or (flags is not None and set(_CPU_NEEDS[name]) <= set(flags.split()))
        if runs and path.exists():
            library = _open(path)
            if isinstance(library, ctypes.CDLL):
                return library
    return None


def prepare_folder(folder: Path) -> str | None:
    """The folder exists and only this user can reach into it; otherwise the reason why it is not used."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        found = os.lstat(folder)
        if not stat.S_ISDIR(found.st_mode):
            return f"the cache folder {folder} is not a folder; remove it, or {NO_NATIVE}"
        if found.st_uid != os.getuid():
            return f"the cache folder {folder} belongs to user {found.st_uid}, expected {os.getuid()}; remove it"
        if stat.S_IMODE(found.st_mode) != 0o700:
            mode = stat.S_IMODE(found.st_mode)
            return f"the cache folder {folder} has mode {mode:o}, expected 700: others may write; chmod 700 it"
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return f"the cache folder {folder} cannot be written ({error.strerror}); make it writable, or {NO_NATIVE}"


@dataclass(frozen=True)
class Compiler:
    """A C compiler: its command and what it says of itself."""

    command: tuple[str, ...]
    version: str

    def flags(self, vector: str) -> tuple[str, ...]:
        """What it is called with."""
        target = _FLAGS.get(vector, ("-march=native", "-mprefer-vector-width=512") if _is_x86() else ("-mcpu=native",))
        return ("-std=gnu11", "-O3", "-fPIC", "-shared", "-fvisibility=hidden", "-pthread", *target)

    def recipe(self, vector: str, cpu: str | None) -> str:
        """A hash of everything that decides what is built: sources, flags, compiler and CPU."""
        parts = [self.version, *self.command, *self.flags(vector), cpu or platform.processor(), platform.machine()]
        digest = hashlib.sha256("\0".join(parts).encode())
        for path in sorted(SOURCE.iterdir()):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
        return digest.hexdigest()[:16]

    def build(self, vector: str, folder: Path, recipe: str) -> Path | str:
        """The path of a library built aside and moved into place, or why it could not be built.

        Its name ends in a hash of its bytes, by which a file that was cut short is known. Several builders at once are
        harmless: each moves a whole file.
        """
        handle, name = tempfile.mkstemp(suffix=".part", dir=folder)
        os.close(handle)
        part = Path(name)
        command = [*self.command, *self.flags(vector), "-o", name, str(SOURCE / "native.c"), "-lm"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_SECONDS, check=False)
            if done.returncode != 0:
                return f"{self.command[0]} could not build the C kernel: {_short(done.stderr)}; mend it, or {NO_NATIVE}"
            path = folder / f"native-{recipe}-{_digest(part)}.so"
            part.chmod(0o700)
            os.replace(part, path)
            return path
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"{self.command[0]} could not build the C kernel: {error}; mend it, or {NO_NATIVE}"
        finally:
            part.unlink(missing_ok=True)


def find_compiler() -> Compiler | str:
    """The compiler that CC names, or cc, gcc or clang from the path; otherwise the reason why there is none."""
    given = os.environ.get("CC")
    for name in [given] if given else ["cc", "gcc", "clang"]:
        command = shlex.split(name)
        found = shutil.which(command[0]) if command else None
        if found is None:
            continue
        try:
            said = subprocess.run([found, "--version"], capture_output=True, text=True, timeout=60, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"the C compiler {found} does not run ({error}); set CC to one that does, or {NO_NATIVE}"
        return Compiler((found, *command[1:]), said.stdout.partition("\n")[0])
    if given:
        return f"the C compiler that CC names ({given!r}) is not found; set CC to one that is, or {NO_NATIVE}"
    return f"no C compiler found: install gcc or clang, or set CC; until then {NO_NATIVE}"


def _short(text: str) -> str:
    """The first line that speaks of an error, at most 200 characters."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    line = next((line for line in lines if "error" in line.lower()), lines[0] if lines else "no message")
    return line if len(line) <= 200 else line[:197] + "..."


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _open_whole(path: Path) -> ctypes.CDLL | str:
    """The library, if the file is what its name says."""
    try:
        whole = path.stem.endswith(_digest(path))
    except OSError as error:
        return f"the built C kernel {path} cannot be read ({error.strerror}); {NO_NATIVE}"
    return _open(path) if whole else f"the built C kernel {path} is not whole; remove it"


def _open(path: Path) -> ctypes.CDLL | str:
    try:
        library = ctypes.CDLL(str(path))
        wrong = check_layout(library)
    except (OSError, AttributeError) as error:
        return f"the C kernel {path} cannot be loaded ({error}); remove it, or {NO_NATIVE}"
    if wrong is not None:
        return f"the C kernel {path} is of another version: {wrong}; remove it, or {NO_NATIVE}"
    for name in ("da_forward", "da_backward"):
        function = getattr(library, name)
        function.argtypes, function.restype = [ctypes.c_void_p], ctypes.c_int
    return library
