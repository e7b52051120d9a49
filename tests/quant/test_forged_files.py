"""Headers that lie are refused: no traceback, no memory beyond the file's size and a limit."""

import json
import struct
import tracemalloc

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from qzo_diffusion.core.errors import ModelError
from qzo_diffusion.quant.config_file import read_config
from qzo_diffusion.quant.gguf_header import read_gguf_header
from qzo_diffusion.quant.header import ALWAYS, header_bytes, read_header
from qzo_diffusion.quant.json_file import read_object
from qzo_diffusion.quant.weights import read_entries, weight_files

MEMORY = 300 * 2**20  # bytes beyond a file's size
NUMBERS = st.one_of(
    st.integers(-4, 300),
    st.sampled_from([2**31, 2**53, 2**62, 2**63, 2**64, 10**30, -(2**63)]),
    st.sampled_from([None, True, 1.5, "4", [], {}]),
)


def refused_or_true(read, file):
    """Whether a file is refused; memory is bounded either way."""
    tracemalloc.start()
    try:
        read(file)
        return False
    except ModelError:
        return True
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < file.stat().st_size + MEMORY


def safetensors(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if length is None else length
    path.write_bytes(size.to_bytes(8, "little") + text + data)
    return path


def tensor(first, last, shape=(1,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [first, last]}


FORGED = {
    "overlap": ({"a": tensor(0, 4), "b": tensor(0, 4)}, 4),
    "half an overlap": ({"a": tensor(0, 8, (2,)), "b": tensor(4, 8)}, 8),
    "a hole": ({"a": tensor(0, 4), "b": tensor(8, 12)}, 12),
    "beyond the end": ({"a": tensor(0, 4), "b": tensor(4, 8)}, 4),
    "data without a tensor": ({"a": tensor(0, 4)}, 8),
    "negative": ({"a": tensor(-4, 0)}, 0),
    "backwards": ({"a": tensor(4, 0, (-1,))}, 4),
    "huge": ({"a": tensor(0, 4, (2**62, 2**62))}, 4),
    "huge and empty": ({"a": tensor(0, 0, (0, 2**63, 2**63))}, 0),
    "many dimensions": ({"a": tensor(0, 4, (1,) * 10**4)}, 4),
    "no numbers": ({"a": tensor("0", "4")}, 4),
    "fractions": ({"a": tensor(0.0, 4.0)}, 4),
    "metadata of numbers": ({"__metadata__": {"a": 1}, "a": tensor(0, 4)}, 4),
    "metadata of a list": ({"__metadata__": [1], "a": tensor(0, 4)}, 4),
    "another dtype": ({"a": tensor(0, 4, dtype=["F32"])}, 4),
    "name twice": (b'{"a":%b,"a":%b}' % ((json.dumps(tensor(0, 4)).encode(),) * 2), 4),
    "deep": (b'{"a":' + b"[" * 10**6, 0),
    "deep objects": (b'{"a":' * 10**5 + b"1" + b"}" * 10**5, 0),
    "a long number": (b'{"a":' + b"9" * 10**5 + b"}", 0),
    "not UTF-8": (b'{"\xff":1}', 0),
}


@pytest.mark.parametrize(("header", "size"), FORGED.values(), ids=FORGED.keys())
def test_a_forged_safetensors_header_is_refused(tmp_path, header, size):
    assert refused_or_true(read_header, safetensors(tmp_path / "f", header, bytes(size)))


@pytest.mark.parametrize("length", [0, 1, 2**31, 2**63, 2**64 - 1])
def test_a_forged_length_of_the_header_is_refused(tmp_path, length):
    assert refused_or_true(read_header, safetensors(tmp_path / "f", {}, b"", length))


@pytest.mark.parametrize("part", [b"[],", b'"ab",', b"1.5,", b"{},"])
def test_a_parsed_header_takes_no_more_memory_than_the_limit_allows(tmp_path, part):
    """Of the densest content; the limit of any header is what all of that would take."""
    text = b'{"a":[' + part * (600_000 // len(part)) + b"1]}"
    file = safetensors(tmp_path / "f", text)
    tracemalloc.start()
    with pytest.raises(ModelError):
        read_header(file)
    peak = tracemalloc.get_traced_memory()[1] / len(text)
    tracemalloc.stop()
    assert peak * ALWAYS < MEMORY


def test_a_header_beyond_the_limit_is_refused_unread(tmp_path):
    with (tmp_path / "f").open("wb") as file:
        file.write((ALWAYS + 1).to_bytes(8, "little"))
        file.truncate(ALWAYS + 100)  # a hole, which takes no room
    assert refused_or_true(header_bytes, tmp_path / "f")


@given(st.data())
@settings(max_examples=60)
def test_any_number_in_a_header_is_refused_or_true(tmp_path_factory, data):
    """Each number of a true header replaced by any other; what is accepted can be read."""
    file = tmp_path_factory.mktemp("forged") / "f"
    header = {"a": tensor(0, 8, (2, 1)), "b": tensor(8, 12)}
    place = header[data.draw(st.sampled_from("ab"))]
    key = data.draw(st.sampled_from(["shape", "data_offsets", "dtype"]))
    drawn = data.draw(st.lists(NUMBERS, max_size=4)) if key != "dtype" else data.draw(NUMBERS)
    place[key] = drawn
    safetensors(file, header, bytes(12))
    if not refused_or_true(read_header, file):
        for entry in read_header(file)[0].values():
            entry.read()


@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=8))
@settings(max_examples=150)
def test_random_bytes_in_a_safetensors_file_never_end_in_a_traceback(tmp_path_factory, flips):
    file = tmp_path_factory.mktemp("flipped") / "model.safetensors"
    save_file({"a.weight": torch.ones(3, 2), "b": torch.arange(5)}, file, {"format": "pt"})
    content = bytearray(file.read_bytes())
    for place, byte in flips:
        content[place % len(content)] = byte
    file.write_bytes(content)
    if not refused_or_true(read_entries, file):
        for entry in read_entries(file).values():
            entry.read()


def string(text):
    raw = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(raw)) + raw


def pair(name, kind, value):
    return string(name) + struct.pack("<I", kind) + value


def gguf(path, pairs=(), tensors=(), counts=None, data=bytes(64), version=3):
    counts = counts or (len(tensors), len(pairs))
    begin = b"GGUF" + struct.pack("<I", version) + struct.pack("<QQ", *counts)
    head = begin + b"".join(pairs) + b"".join(tensors)
    path.write_bytes(head + bytes(-len(head) % 32) + data)
    return path


def gguf_tensor(name="a", shape=(4,), kind=0, offset=0, dimensions=None):
    count = len(shape) if dimensions is None else dimensions
    sizes = struct.pack(f"<{len(shape)}Q", *shape)
    return string(name) + struct.pack("<I", count) + sizes + struct.pack("<IQ", kind, offset)


ARCHITECTURE = pair("general.architecture", 8, string("llama"))
ARRAY = 9
FORGED_GGUF = {
    "many tensors": {"counts": (2**60, 0)},
    "many keys": {"counts": (0, 2**60)},
    "more keys than there are": {"counts": (0, 3), "pairs": [ARCHITECTURE]},
    "a long name": {"pairs": [struct.pack("<Q", 2**40)]},
    "a long string": {"pairs": [string("a") + struct.pack("<IQ", 8, 2**63)]},
    "a long array": {"pairs": [pair("a", ARRAY, struct.pack("<IQ", 0, 2**62))]},
    "an array of many words": {"pairs": [pair("a", ARRAY, struct.pack("<IQ", 8, 2**40))]},
    "arrays inside arrays": {"pairs": [pair("a", ARRAY, struct.pack("<IQ", ARRAY, 1) * 1000)]},
    "an unknown type": {"pairs": [pair("a", 77, bytes(8))]},
    "a key twice": {"pairs": [ARCHITECTURE, ARCHITECTURE]},
    "an alignment of 0": {"pairs": [pair("general.alignment", 4, struct.pack("<I", 0))]},
    "an alignment of text": {"pairs": [pair("general.alignment", 8, string("x"))]},
    "a tensor twice": {"tensors": [gguf_tensor(), gguf_tensor(offset=32)]},
    "an overlap": {"tensors": [gguf_tensor("a", (16,)), gguf_tensor("b", offset=32)]},
    "beyond the end": {"tensors": [gguf_tensor(offset=2**40)]},
    "a huge tensor": {"tensors": [gguf_tensor(shape=(2**62, 2**62))]},
    "an empty tensor": {"tensors": [gguf_tensor(shape=(0, 4))]},
    "many dimensions": {"tensors": [gguf_tensor(dimensions=2**31)]},
    "half a block": {"tensors": [gguf_tensor(shape=(16,), kind=2)]},
    "an unknown kind": {"tensors": [gguf_tensor(kind=2**31)]},
    "an odd place": {"tensors": [gguf_tensor(offset=3)]},
    "version 1": {"version": 1},
    "the other byte order": {"version": 3 << 24},
}


@pytest.mark.parametrize("parts", FORGED_GGUF.values(), ids=FORGED_GGUF.keys())
def test_a_forged_gguf_header_is_refused(tmp_path, parts):
    assert refused_or_true(read_gguf_header, gguf(tmp_path / "f.gguf", **parts))


def test_a_true_gguf_header_is_read(tmp_path):
    tensors = [gguf_tensor("a", (8,)), gguf_tensor("b", (32,), kind=2, offset=32)]
    words = pair("words", ARRAY, struct.pack("<IQ", 8, 2) + string("x") + string(b"\xff"))
    header = read_gguf_header(gguf(tmp_path / "f.gguf", [ARCHITECTURE, words], tensors))
    assert header.values == {"general.architecture": "llama"}
    assert header.tensors["b"].shape == (32,)


@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=8))
@settings(max_examples=150)
def test_random_bytes_in_a_gguf_file_never_end_in_a_traceback(tmp_path_factory, flips):
    file = tmp_path_factory.mktemp("flipped") / "f.gguf"
    words = pair("words", ARRAY, struct.pack("<IQ", 8, 2) + string("x") + string("yz"))
    gguf(file, [ARCHITECTURE, words], [gguf_tensor("a", (8,)), gguf_tensor("b", offset=32)])
    content = bytearray(file.read_bytes())
    for place, byte in flips:
        content[place % len(content)] = byte
    file.write_bytes(content)
    refused_or_true(read_gguf_header, file)


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/passwd", "..", "a/b.safetensors", "..\\x", "a\0b", ""]
)
def test_an_index_never_leads_out_of_its_folder(tmp_path, name):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ModelError):
        weight_files(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        b"[" * 10**6,
        b'{"weight_map":' * 10**5,
        b'{"weight_map": {"a": 5}}',
        b'{"weight_map": {"a": ["x"]}}',
        b'{"weight_map": []}',
        b"{}",
        b'{"weight_map": {"a": "x", "a": "y"}}',
        b"\xff\xfe{",
    ],
)
def test_a_forged_index_is_refused(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_bytes(text)
    assert refused_or_true(
        lambda file: weight_files(file.parent), tmp_path / "model.safetensors.index.json"
    )


@example(b"[" * 10**6)
@example(b'{"num_layers": 1e999}')
@example(b'{"hidden_size": ' + b"9" * 5000 + b"}")
@given(st.binary(max_size=40))
def test_a_forged_config_is_refused_or_an_object(tmp_path_factory, text):
    file = tmp_path_factory.mktemp("config") / "config.json"
    file.write_bytes(text)
    if not refused_or_true(read_config, file):
        assert isinstance(read_object(file, "a config"), dict)


def test_a_json_file_that_is_too_long_is_not_read(tmp_path):
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(2**31)  # a hole, which takes no room
    assert refused_or_true(read_config, tmp_path / "config.json")


@pytest.mark.parametrize("key", ["n_layer", "num_hidden_layers"])
def test_a_count_of_layers_is_bound_by_tensors_and_a_width_of_heads_is_not(tmp_path, key):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"attention_head_dim": 128, key: 29}))
    assert read_config(file, 29)["attention_head_dim"] == 128
    with pytest.raises(ModelError, match=f"{key} = 29"):
        read_config(file, 28)
