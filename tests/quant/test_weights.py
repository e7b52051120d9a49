"""Reading and writing safetensors one tensor at a time: the same bytes as the library, whatever is
damaged or cut off.
"""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from qzo_diffusion.core.errors import ModelError, OutputError
from qzo_diffusion.quant.entries import DTYPES, joined
from qzo_diffusion.quant.header import read_header
from qzo_diffusion.quant.weights import (
    Pending,
    compare_tensors,
    read_entries,
    weight_files,
    write_tensors,
)

SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)


def tensor_of(dtype, shape, seed):
    words = torch.randint(0, 100, shape, generator=torch.Generator().manual_seed(seed))
    return words.to(torch.float32).to(dtype)


@given(st.lists(st.tuples(st.sampled_from(sorted(DTYPES)), SHAPES), min_size=1, max_size=6))
def test_files_are_those_of_the_library_and_back(tmp_path_factory, kinds):
    folder = tmp_path_factory.mktemp("files")
    tensors = {f"t{i}": tensor_of(DTYPES[name], shape, i) for i, (name, shape) in enumerate(kinds)}
    pending = {name: Pending.of(tensor) for name, tensor in tensors.items()}
    write_tensors(folder / "ours", pending, {"key": "value"})
    compare_tensors(folder / "ours", pending)
    save_file(tensors, folder / "theirs")
    read = load_file(folder / "ours")
    entries = read_entries(folder / "theirs")
    assert read.keys() == entries.keys() == tensors.keys()
    for name, tensor in tensors.items():
        for back in (read[name], entries[name].read()):
            assert back.dtype == tensor.dtype
            assert torch.equal(back.float(), tensor.float())
    assert read_header(folder / "ours")[1] == {"format": "pt", "key": "value"}


def test_rows_can_be_read_alone_and_put_together(tmp_path):
    weight = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    save_file({"w": weight}, tmp_path / "file.safetensors")
    entry = read_entries(tmp_path / "file.safetensors")["w"]
    assert torch.equal(entry.rows(2, 5).read(), weight[2:5])
    assert torch.equal(
        joined([entry.rows(3, 6), entry.rows(0, 3)]).read(), torch.cat([weight[3:], weight[:3]])
    )


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.arange(100.0), "b": torch.arange(7)}, path)
    return path


@given(st.data())
def test_whatever_is_cut_off_or_changed_in_the_header_is_told(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("cut") / "model.safetensors"
    save_file({"a": torch.arange(100.0), "b": torch.arange(7)}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(ModelError, match="damaged"):
        read_header(path)


@pytest.mark.parametrize(
    "header",
    [
        [],
        {"a": {"dtype": "F33", "shape": [1], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}},
        {"a": 5},
        {"a": {"shape": [1]}},
    ],
)
def test_a_header_that_makes_no_sense_is_told(tmp_path, header):
    text = json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * 4)
    with pytest.raises(ModelError, match="damaged"):
        read_header(path)


def test_a_file_that_shrinks_after_its_header_was_read_is_told(file):
    entries = read_entries(file)
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(ModelError, match="ends at byte"):
        entries["a"].read()


def test_a_missing_shard_is_named(tmp_path):
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"a": torch.ones(2)}, tmp_path / "model-1.safetensors")
    with pytest.raises(ModelError, match=r"lacks the file model-2\.safetensors"):
        weight_files(tmp_path)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd"])
def test_an_index_never_leads_out_of_its_folder(tmp_path, name):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ModelError, match="out of its folder"):
        weight_files(tmp_path)


def test_the_plain_name_wins_over_variants_and_two_unknown_ones_are_refused(tmp_path):
    for name in ("x.fp16.safetensors", "y.safetensors"):
        save_file({"a": torch.ones(2)}, tmp_path / name)
    with pytest.raises(
        ModelError, match=r"2 safetensors files \(x.fp16.safetensors, y.safetensors\) and no index"
    ):
        weight_files(tmp_path)
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    assert weight_files(tmp_path) == [tmp_path / "model.safetensors"]


def test_a_bit_that_flips_after_writing_is_found(file):
    pending = {"a": Pending.of(torch.arange(100.0)), "b": Pending.of(torch.arange(7))}
    compare_tensors(file, pending)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(OutputError, match="not what was written"):
        compare_tensors(file, pending)
