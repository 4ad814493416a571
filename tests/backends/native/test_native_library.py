"""Where the C kernel comes from: built once into a private folder; a sentence says what is wrong if it cannot be."""

import ctypes
import os
import stat
import sys
import threading

import numpy as np
import pytest

from dilated_attention_pytorch.backends.native import library, structs

FAST = "portable"  # the build that takes the least time


def file_of(folder):
    (path,) = folder.glob("native-*.so")
    return path


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache") / "native"
    assert isinstance(library.find_or_build(FAST, folder), ctypes.CDLL)
    return folder


@pytest.fixture
def copy(built, tmp_path):
    """A folder of our own with a library that is already built."""
    folder = tmp_path / "native"
    assert library.prepare_folder(folder) is None
    (folder / file_of(built).name).write_bytes(file_of(built).read_bytes())
    return folder


def forbid_builds(monkeypatch):
    def build(*_):
        raise AssertionError("it was built again")

    monkeypatch.setattr(library.Compiler, "build", build)


def test_the_folder_and_the_file_belong_to_the_user_alone(built):
    assert stat.S_IMODE(built.stat().st_mode) == 0o700
    assert stat.S_IMODE(file_of(built).stat().st_mode) == 0o700
    assert len(list(built.iterdir())) == 1, "nothing is left of the build"


def test_a_built_library_is_found_again(copy, monkeypatch):
    forbid_builds(monkeypatch)
    assert isinstance(library.find_or_build(FAST, copy), ctypes.CDLL)


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_library_is_built_again(copy, damage, monkeypatch):
    path, builds = file_of(copy), []
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if damage == "cut" else whole[:-1] + bytes([whole[-1] ^ 1]))

    def build(self, vector, folder, recipe):
        builds.append(recipe)
        path.write_bytes(whole)
        return path

    monkeypatch.setattr(library.Compiler, "build", build)
    assert isinstance(library.find_or_build(FAST, copy), ctypes.CDLL)
    assert len(builds) == 1


def test_several_builders_at_once_are_harmless(tmp_path):
    folder, found = tmp_path / "native", []
    library.prepare_folder(folder)
    compiler = library.find_compiler()
    assert isinstance(compiler, library.Compiler)
    threads = [threading.Thread(target=lambda: found.append(compiler.build(FAST, folder, "0" * 16))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1, "equal builds have equal names"
    assert isinstance(library._open_whole(found[0]), ctypes.CDLL)
    assert [path.suffix for path in folder.iterdir()] == [".so"]


def test_the_recipe_depends_on_all_that_decides_the_build(tmp_path, monkeypatch):
    compiler = library.Compiler(("gcc",), "gcc 12")
    recipes = {
        compiler.recipe("portable", "sse2"),
        compiler.recipe("avx2", "sse2"),
        compiler.recipe("portable", "avx2"),
        library.Compiler(("gcc",), "gcc 13").recipe("portable", "sse2"),
        library.Compiler(("gcc", "-g"), "gcc 12").recipe("portable", "sse2"),
    }
    (tmp_path / "native.c").write_text("int x;")
    monkeypatch.setattr(library, "SOURCE", tmp_path)
    recipes.add(compiler.recipe("portable", "sse2"))
    assert len(recipes) == 6


def test_no_compiler_is_a_reason_that_says_how_to_get_one(tmp_path, monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = library.find_or_build(FAST, tmp_path / "native")
    assert found == "no C compiler found: install gcc or clang, or set CC; until then use backend='sdpa'"
    monkeypatch.setenv("CC", "nowhere-cc")
    assert "'nowhere-cc'" in library.find_or_build(FAST, tmp_path / "native")
    assert not (tmp_path / "native").exists()


def test_a_failed_build_is_a_reason_with_the_compilers_words(tmp_path, monkeypatch):
    script = tmp_path / "cc"
    script.write_text(
        '#!/bin/sh\ntest "$1" = --version && echo cc 1 && exit 0\necho "x.c:1: error: no luck" >&2\nexit 1\n'
    )
    script.chmod(0o700)
    monkeypatch.setenv("CC", str(script))
    found = library.find_or_build(FAST, tmp_path / "native")
    assert isinstance(found, str)
    assert "x.c:1: error: no luck" in found
    assert "use backend='sdpa'" in found
    assert list((tmp_path / "native").iterdir()) == []


def test_long_errors_are_shortened():
    assert library._short("note\n" + "error: " + "x" * 500).startswith("error: xxx")
    assert len(library._short("error: " + "x" * 500)) == 200
    assert library._short("") == "no message"


def test_a_folder_that_others_reach_into_is_refused(tmp_path, monkeypatch):
    folder = tmp_path / "native"
    folder.mkdir(mode=0o700)
    folder.chmod(0o777)
    assert "has mode 777, expected 700" in library.prepare_folder(folder)
    folder.chmod(0o700)
    assert library.prepare_folder(folder) is None
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert "belongs to user" in library.find_or_build(FAST, folder)


def test_a_link_or_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert "is not a folder" in library.prepare_folder(tmp_path / "link")
    (tmp_path / "file").write_text("")
    assert library.prepare_folder(tmp_path / "file") is not None
    assert "cannot be written" in library.prepare_folder(tmp_path / "file" / "native")


def test_a_cpu_without_the_asked_vectors_is_a_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(library, "cpu_flags", lambda: "fpu sse2")
    assert "this CPU has no avx2 fma" in library.find_or_build("avx2", tmp_path / "native")


def test_windows_is_a_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    assert "POSIX threads" in library.find_or_build(FAST, tmp_path / "native")


def test_a_prebuilt_library_comes_first(built, tmp_path, monkeypatch):
    forbid_builds(monkeypatch)
    machine = os.uname().machine
    (tmp_path / f"{machine}-portable.so").write_bytes(file_of(built).read_bytes())
    monkeypatch.setattr(library, "PREBUILT", tmp_path)
    monkeypatch.setenv("CC", "nowhere-cc")
    assert isinstance(library.find_or_build("auto", tmp_path / "unused"), ctypes.CDLL)
    assert not (tmp_path / "unused").exists()


def test_a_library_of_another_abi_is_refused(built, monkeypatch):
    built_with = structs.ABI
    monkeypatch.setattr(structs, "ABI", 99)
    assert f"it has ABI {built_with}, expected 99" in library._open(file_of(built))


def test_the_answer_is_kept(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(library, "_loaded", {})
    monkeypatch.setattr(library, "find_or_build", lambda vector, folder: asked.append((vector, folder)) or "no")
    monkeypatch.setattr(library.platformdirs, "user_cache_path", lambda name: tmp_path / name)
    assert library.load("avx2") == library.load("avx2") == "no"
    assert asked == [("avx2", tmp_path / "dilated-attention-pytorch" / "native")]
    assert library.cache_folder() == asked[0][1]


def test_nothing_is_built_at_import(fresh_interpreters):
    script = (
        "import subprocess\n"
        "def refuse(*a, **k): raise AssertionError('a process was started')\n"
        "subprocess.Popen.__init__ = refuse\n"
        "import dilated_attention_pytorch.backends.native.backend\n"
    )
    fresh_interpreters.run(script)


@pytest.mark.parametrize("vector", ["auto", "portable"])
def test_powers_and_logarithms_of_two(vector, built):
    loaded = library.load("auto") if vector == "auto" else library.find_or_build(FAST, built)
    x = np.concatenate([np.linspace(-120, 1, 20001), [0.0, -200.0, -1e30, -np.inf, np.nan]]).astype(np.float32)
    power, log = np.empty_like(x), np.empty_like(x)
    loaded.da_exp2_log2(*(ctypes.c_void_p(a.ctypes.data) for a in (x, power, log)), ctypes.c_int64(len(x)))
    expected = np.exp2(x[:20001].astype(np.float64))
    assert np.max(np.abs(power[:20001] / expected - 1)) < 1.5e-7
    assert power[20001:-1].tolist() == [1.0, 0.0, 0.0, 0.0]
    assert np.isnan(power[-1])
    y = np.geomspace(1e-3, 1e6, 20001).astype(np.float32)
    power, log = np.empty_like(y), np.empty_like(y)
    loaded.da_exp2_log2(*(ctypes.c_void_p(a.ctypes.data) for a in (y, power, log)), ctypes.c_int64(len(y)))
    true = np.log2(y.astype(np.float64))
    assert np.max(np.abs(log - true) / np.maximum(1, np.abs(true))) < 2e-7
