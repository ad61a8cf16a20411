"""Files are what the safetensors library reads and writes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from app import tensorfile
from app.payload import Tensors
from certs.errors import ModelError


@pytest.fixture
def base(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    path = tmp_path / "base.safetensors"
    save_file(
        {
            "frozen.w": torch.randn(5, 3, generator=generator).to(torch.bfloat16),
            "frozen.odd": torch.randn(3, generator=generator).to(torch.bfloat16),
            "train.bf16": torch.randn(7, generator=generator).to(torch.bfloat16),
            "train.f16": torch.randn(2, 2, generator=generator).to(torch.float16),
            "train.f32": torch.randn(4, generator=generator),
            "train.scalar": torch.tensor(2.5),
            "steps": torch.tensor([3], dtype=torch.int64),
        },
        path,
        metadata={"format": "pt", "made": "here"},
    )
    return path


def test_narrow_floats_widen_without_loss(base: Path) -> None:
    names = ["train.bf16", "train.f16", "train.f32", "train.scalar"]
    stored = load_file(base)
    for name, array in tensorfile.read(base, names).items():
        assert array.dtype == np.float32
        assert np.array_equal(array, stored[name].float().numpy())


def test_replaced_tensors_are_float32_and_all_others_keep_their_bits(
    base: Path, tmp_path: Path
) -> None:
    new: Tensors = {
        "train.bf16": np.arange(7, dtype=np.float32),
        "train.scalar": np.array(9.0, np.float32),
    }
    target = tmp_path / "new.safetensors"
    tensorfile.write(target, new, base=base, drop=["steps"])
    before, after = load_file(base), load_file(target)
    assert after.keys() == before.keys() - {"steps"}
    for name, tensor in after.items():
        if name in new:
            assert tensor.dtype == torch.float32
            assert np.array_equal(tensor.numpy(), new[name])
        else:
            assert tensor.dtype == before[name].dtype
            assert torch.equal(tensor, before[name])
    assert tensorfile.entries(target)[1] == {"format": "pt", "made": "here"}


def test_every_tensor_starts_aligned_to_its_type(base: Path, tmp_path: Path) -> None:
    target = tmp_path / "new.safetensors"
    tensorfile.write(target, {"a": np.zeros(3, np.float32)}, base=base)
    for entry in tensorfile.entries(target)[0].values():
        size = {"F32": 4, "I64": 8}.get(entry.dtype, 2)
        assert entry.start % size == 0


def test_a_file_of_its_own(tmp_path: Path) -> None:
    target = tmp_path / "new.safetensors"
    tensorfile.write(target, {"action.mean": np.arange(6, dtype=np.float32)})
    assert load_file(target)["action.mean"].tolist() == [0, 1, 2, 3, 4, 5]


def test_what_is_not_a_tensor_file_is_refused(base: Path, tmp_path: Path) -> None:
    whole = base.read_bytes()
    bad = tmp_path / "bad.safetensors"
    for content in (
        b"",
        b"hello, this is text",
        whole[:-1],
        whole[:40],
        b"\x02" + b"\0" * 7 + b"[]",
    ):
        bad.write_bytes(content)
        with pytest.raises(ModelError, match=r"bad\.safetensors is not a complete"):
            tensorfile.entries(bad)
    with pytest.raises(ModelError, match="holds no"):
        tensorfile.entries(tmp_path / "none.safetensors")
    with pytest.raises(ModelError, match="no tensor absent"):
        tensorfile.read(base, ["absent"])
    with pytest.raises(ModelError, match="stored as I64"):
        tensorfile.read(base, ["steps"])


def test_lazy_tensors_are_read_at_each_access(base: Path) -> None:
    names = ["train.bf16", "train.f32", "train.scalar"]
    lazy = tensorfile.Lazy(base, names)
    assert list(lazy) == names
    assert lazy.shapes == {"train.bf16": (7,), "train.f32": (4,), "train.scalar": ()}
    assert "steps" not in lazy
    stored = load_file(base)
    base.unlink()  # the open file outlives its name
    for name in names:
        assert np.array_equal(lazy[name], stored[name].float().numpy())
        assert lazy[name] is not lazy[name]


def test_tensors_can_be_put_in_any_order_and_none_may_be_forgotten(
    base: Path, tmp_path: Path
) -> None:
    target = tmp_path / "new.safetensors"
    writer = tensorfile.Writer(target, {"b": (2,), "a": (1, 2)}, base=base)
    writer.put("b", np.array([3, 4], np.float32))
    with pytest.raises(ValueError, match="shape"):
        writer.put("a", np.zeros(2, np.float32))
    writer.put("a", np.array([[1, 2]], np.float32))
    writer.close()
    after = load_file(target)
    assert (after["a"].tolist(), after["b"].tolist()) == ([[1, 2]], [3, 4])
    assert torch.equal(after["frozen.w"], load_file(base)["frozen.w"])
    with pytest.raises(ValueError, match="a was announced and not written"):
        tensorfile.Writer(target, {"a": (2,)}).close()
