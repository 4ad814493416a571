"""Import paths of 0.1 and 0.2: all import, lazily, from one table, and replace nothing."""

import importlib
import subprocess
import sys
import warnings
from importlib.machinery import PathFinder
from pathlib import Path

import pytest

import dilated_attention_pytorch
from dilated_attention_pytorch.old_paths import PACKAGE, TABLE, OldPaths, install

ROOT = Path(dilated_attention_pytorch.__file__).parent
OF_0_1 = {
    "dilated_attention": ["DilatedAttention", "MultiheadDilatedAttention"],
    "multihead_dilated_attention": ["MultiheadDilatedAttention"],
    "improved_dilated_attention": ["ImprovedDilatedAttention"],
    "improved_multihead_dilated_attention": ["ImprovedMultiheadDilatedAttention"],
    "ring_dilated_attention": ["RingDilatedAttention"],
    "ring_multihead_dilated_attention": ["RingMultiheadDilatedAttention"],
    "ring_distributed_dilated_attention": ["RingDistributedDilatedAttention"],
    "improved_distributed_dilated_attention": [
        "DistributedImprovedDilatedAttention",
        "DistributedImprovedMultiheadDilatedAttention",
    ],
    "distributed_dilated_attention": ["DistributedMultiheadDilatedAttention"],
    "block_sparse_ring_dilated_attention": ["BlockSparseRingDilatedAttention", "SparsePatternConfig"],
    "block_sparse_ring_multihead_dilated_attention": ["BlockSparseRingMultiheadDilatedAttention"],
    "block_sparse_ring_distributed_dilated_attention": ["BlockSparseRingDistributedDilatedAttention"],
    "sparse_pattern_utils": ["SparsePatternConfig", "local_window"],
    "transformer": ["DilatedTransformerDecoderLayer", "DilatedTransformerEncoderLayer"],
    "long_net": ["LongNet", "LongNetLM"],
}
OF_0_2 = {
    "core.base": ["BaseDilatedAttention", "BaseMultiheadDilatedAttention"],
    "core.config": ["DilatedAttentionConfig", "SparseAttentionConfig"],
    "core.validation": ["ValidationMixin"],
    "core.constants": ["GPU_TYPE", "HAS_SDPA"],
    "core.memory_pool": ["UnifiedMemoryPool", "get_global_memory_pool"],
    "core.attention_utils": ["optimize_attention_computation"],
    "core.factory": ["create_dilated_attention", "create_multihead_dilated_attention"],
    "utils": [],
    "utils.validation": ["ValidationMixin"],
    "utils.attention_utils": ["compute_alibi_bias", "standard_attention"],
    "utils.sparse_pattern_utils": ["SparsePatternConfig", "dilated_sparse"],
}


def forget() -> None:
    """No old module has been imported, as in a fresh interpreter."""
    for below in TABLE:
        sys.modules.pop(f"{PACKAGE}.{below}", None)
        parent, _, last = f"{PACKAGE}.{below}".rpartition(".")
        if parent in sys.modules:
            vars(sys.modules[parent]).pop(last, None)


@pytest.fixture(autouse=True)
def _fresh():
    forget()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield
    forget()


def test_one_finder_is_installed_behind_that_of_real_modules() -> None:
    install()
    assert [type(finder) for finder in sys.meta_path].count(OldPaths) == 1
    order = [finder if isinstance(finder, type) else type(finder) for finder in sys.meta_path]
    assert order.index(OldPaths) > order.index(PathFinder)  # real modules come first


@pytest.mark.parametrize(("below", "names"), [*OF_0_1.items(), *OF_0_2.items()])
def test_every_path_imports_with_its_names(below: str, names: list[str]) -> None:
    module = importlib.import_module(f"{PACKAGE}.{below}")
    for name in names:
        assert getattr(module, name) is not None
        assert name in dir(module)


@pytest.mark.parametrize("below", TABLE)
def test_every_row_gives_what_is_there_now(below: str) -> None:
    module = importlib.import_module(f"{PACKAGE}.{below}")
    for name, (home, today) in TABLE[below].names.items():
        assert getattr(module, name) is getattr(importlib.import_module(f"{PACKAGE}.{home}"), today)
    with pytest.raises(AttributeError, match="it has"):
        _ = module.Nonsense
    assert not hasattr(module, "__path__") or below == "utils"


@pytest.mark.parametrize("below", OF_0_1)
def test_paths_of_0_1_warn_and_name_the_new_one(below: str) -> None:
    with pytest.warns(DeprecationWarning, match=rf"{below} .* use from {PACKAGE}") as caught:
        module = importlib.import_module(f"{PACKAGE}.{below}")
    (text,) = [str(w.message) for w in caught if PACKAGE in str(w.message)]
    for line in text[text.index("use ") + 4 :].rstrip(".").split("; "):
        names: dict[str, object] = {}
        exec(line, names)  # the advice is an import that works
        assert all(getattr(module, name) is value for name, value in names.items() if name != "__builtins__")


def test_paths_of_0_2_do_not_warn_and_a_warning_points_at_the_import() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for below in OF_0_2:
            importlib.import_module(f"{PACKAGE}.{below}")
    with pytest.warns(DeprecationWarning, match="long_net") as caught:
        from dilated_attention_pytorch.long_net import LongNet  # noqa: F401
    assert caught[0].filename == __file__


def test_there_are_no_stub_files_and_no_path_has_a_public_name() -> None:
    for below in TABLE:
        parts = below.split(".")
        assert not ROOT.joinpath(*parts).is_dir()
        assert not ROOT.joinpath(*parts).with_suffix(".py").exists()
        parent = importlib.import_module(".".join([PACKAGE, *parts[:-1]]))
        assert parts[-1] not in getattr(parent, "__all__", ())


@pytest.mark.parametrize("names_first", [True, False])
def test_importing_replaces_no_public_name_in_either_order(names_first: bool) -> None:
    public = dilated_attention_pytorch.__all__
    before = {name: getattr(dilated_attention_pytorch, name) for name in public} if names_first else {}
    for below in TABLE:
        importlib.import_module(f"{PACKAGE}.{below}")
    after = {name: getattr(dilated_attention_pytorch, name) for name in public}
    assert all(after[name] is value for name, value in before.items())
    for name, value in after.items():
        assert not isinstance(value, type(sys)), name


def test_the_ways_to_import() -> None:
    import dilated_attention_pytorch.transformer as first

    from dilated_attention_pytorch import transformer as second
    from dilated_attention_pytorch.nn import DilatedTransformerEncoderLayer

    assert first is second is sys.modules[f"{PACKAGE}.transformer"] is dilated_attention_pytorch.transformer
    assert first.DilatedTransformerEncoderLayer is DilatedTransformerEncoderLayer
    names: dict[str, object] = {}
    exec(f"from {PACKAGE}.transformer import *", names)
    assert names["DilatedTransformerEncoderLayer"] is DilatedTransformerEncoderLayer
    with pytest.raises(ImportError):
        from dilated_attention_pytorch.transformer import Nonsense  # noqa: F401
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(f"{PACKAGE}.never_there")


def test_in_a_fresh_interpreter_old_paths_import_by_themselves_and_bring_little() -> None:
    script = (
        f"import sys, {PACKAGE}.ring_dilated_attention as old, {PACKAGE}.utils.validation;"
        f"late = [m for m in sys.modules if m.startswith(('{PACKAGE}.core.layers', '{PACKAGE}.models'))];"
        f"assert not late, late; import {PACKAGE}.core as core;"
        "print(old.RingDilatedAttention.__name__, core.memory_pool if hasattr(core, 'memory_pool') else '')"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["RingDilatedAttention"]
