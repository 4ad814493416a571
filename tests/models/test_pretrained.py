import json
import os
import pickle
import stat

import pytest
import torch
from safetensors.torch import load_file, save_file

from dilated_attention_pytorch import InvalidInput
from dilated_attention_pytorch.models import LongNet, LongNetEncoder, LongNetLM, pretrained

SMALL = {"dim_feedforward": 48, "segment_lengths": (8, 24), "dilation_rates": (1, 3)}


def language_model(seed=0, **options):
    torch.manual_seed(seed)
    return LongNetLM(17, 32, 4, 0, 2, **{**SMALL, **options})


def tokens():
    return torch.randint(17, (2, 30), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def folder(tmp_path):
    language_model().save_pretrained(tmp_path / "run" / "model")
    return tmp_path / "run" / "model"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_language_models_come_back(tmp_path, dtype, tie_embeddings):
    model = language_model(dtype=dtype, tie_embeddings=tie_embeddings, dropout=0.3)
    model.save_pretrained(tmp_path)
    state = torch.get_rng_state()
    other = LongNetLM.from_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    assert not other.training
    assert other.config == model.config
    assert other.embedding.weight.dtype == dtype
    assert torch.equal(other(tokens()), model.eval()(tokens()))
    assert all(p.requires_grad for p in other.parameters())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_encoders_and_pairs_come_back(tmp_path):
    x = torch.randn(2, 30, 32)
    for model in (LongNetEncoder(32, 4, 2, **SMALL), LongNet(32, 4, 1, 2, cross_attention="longnet", **SMALL)):
        model.save_pretrained(tmp_path)
        assert torch.equal(type(model).from_pretrained(tmp_path)(x), model(x))


def test_dtype_and_device_may_be_chosen(folder):
    assert LongNetLM.from_pretrained(folder, dtype=torch.float64)(tokens()).dtype == torch.float64
    assert LongNetLM.from_pretrained(folder, device="meta").embedding.weight.is_meta


def test_a_loaded_model_does_not_hang_on_the_file(folder):
    model = LongNetLM.from_pretrained(folder)
    before = model(tokens())
    path = folder / "model.safetensors"
    path.write_bytes(bytes(path.stat().st_size))
    assert torch.equal(model(tokens()), before)


def test_files_are_readable_as_any_other(folder):
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


def test_saving_that_fails_leaves_the_old_files_whole(folder, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def half_written(tensors, path, metadata):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(pretrained, "save_file", half_written)
    with pytest.raises(KeyboardInterrupt):
        language_model(seed=1).save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


class Trap:
    """Unpickling this makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def weights(change):
    """A folder whose weights went through ``change(tensors)``; the metadata stays."""

    def apply(folder):
        path = folder / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return apply


def config(**changes):
    """A folder with another config, and weights that do not say which was theirs."""

    def apply(folder):
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
        weights(lambda _: None)(folder)

    return apply


def text(content):
    return lambda folder: (folder / "config.json").write_bytes(content)


def cut(name, keep):
    def apply(folder):
        path = folder / name
        path.write_bytes(path.read_bytes()[:keep])

    return apply


def as_folder(name):
    def apply(folder):
        (folder / name).unlink()
        (folder / name).mkdir()

    return apply


def other_weights(folder):
    """The weights of another save with equal shapes beside this save's config."""
    before = (folder / "config.json").read_bytes()
    language_model(position="none").save_pretrained(folder)
    (folder / "config.json").write_bytes(before)


def pickled(folder):
    trap = folder / "model.safetensors"
    trap.write_bytes(pickle.dumps(Trap(folder / "sprung")))
    torch.save({"x": Trap(folder / "sprung")}, folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("damage", "file"),
    [
        (lambda f: (f / "config.json").unlink(), "config.json"),
        (lambda f: (f / "model.safetensors").unlink(), "model.safetensors"),
        (as_folder("config.json"), "config.json"),
        (as_folder("model.safetensors"), "model.safetensors"),
        (cut("config.json", 40), "config.json"),
        (cut("model.safetensors", 0), "model.safetensors"),
        (cut("model.safetensors", 5), "model.safetensors"),
        (cut("model.safetensors", 300), "model.safetensors"),
        (cut("model.safetensors", -1), "model.safetensors"),
        (text(b"\xff\xfe"), "config.json"),
        (text(b"[1]"), "config.json"),
        (text(b"[" * 100_000), "config.json"),
        (text(b" " * 2**21), "config.json"),
        (config(model="LongNet"), "config.json"),
        (config(format_version=9), "config.json"),
        (config(num_layers=10**9), "model.safetensors"),
        (config(num_layers=3), "model.safetensors"),
        (config(num_layers=1), "model.safetensors"),
        (config(num_layers=2**31), "config.json"),
        (config(num_tokens=16), "model.safetensors"),
        (config(d_model=2**30, nhead=1, dim_feedforward=2**30), "model.safetensors"),
        (config(d_model=2**31 - 1, nhead=1, dim_feedforward=2**31 - 1, position="none"), "model.safetensors"),
        (config(tie_embeddings=False), "model.safetensors"),
        (config(activation="__import__('os')"), "config.json"),
        (weights(lambda t: t.pop("decoder.norm.bias")), "model.safetensors"),
        (weights(lambda t: t.update(extra=torch.zeros(1))), "model.safetensors"),
        (weights(lambda t: t.update({"decoder.norm.bias": torch.zeros(31)})), "model.safetensors"),
        (weights(lambda t: t.update({"decoder.norm.bias": torch.zeros(32).half()})), "model.safetensors"),
        (weights(lambda t: t.update({k: x.long() for k, x in t.items()})), "model.safetensors"),
        (other_weights, "model.safetensors"),
        (pickled, "model.safetensors"),
    ],
)
def test_damaged_and_hostile_folders_raise_and_name_the_file(folder, damage, file):
    LongNetLM.from_pretrained(folder)
    damage(folder)
    with pytest.raises(InvalidInput, match=file):
        LongNetLM.from_pretrained(folder)
    assert not (folder / "sprung").exists()


def test_no_folder_and_the_folder_of_another_model(tmp_path, folder):
    with pytest.raises(InvalidInput, match="nowhere"):
        LongNetLM.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(InvalidInput, match="LongNetEncoder"):
        LongNetEncoder.from_pretrained(folder)
