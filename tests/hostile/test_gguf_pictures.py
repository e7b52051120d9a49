"""GGUF files of pictures with damaged headers: refused with exit code 2, whatever was damaged, and
before memory beyond the file's size and 100 MB is taken.
"""

import struct
import tracemalloc

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qzo_diffusion.cli import main
from qzo_diffusion.core.errors import ModelError
from qzo_diffusion.diffusion.transformer import find_transformer
from qzo_diffusion.quant.gguf_header import read_gguf_header
from tests.conftest import failing
from tests.gguf_pictures import write_gguf
from tests.small_models import sd3_transformer

MEMORY = 100_000_000
EXTREMES = [0, 1, 31, 2**31 - 1, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A true file, its bytes and where its data begins."""
    file = tmp_path_factory.mktemp("gguf") / "whole.gguf"
    write_gguf(file, sd3_transformer(layers=2, width=1))
    return file, file.read_bytes(), read_gguf_header(file).data


def used(file):
    """Read everything that the file holds; return whether it is refused."""
    tracemalloc.start()
    try:
        for entry in find_transformer(file).entries.values():
            assert entry.nbytes <= file.stat().st_size
            if entry.blocks:
                entry.read_blocks()
        return False
    except ModelError:
        return True
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < file.stat().st_size + MEMORY


def forged(folder, content):
    file = folder / "forged.gguf"
    file.write_bytes(content)
    return file


def test_the_whole_file_is_read(whole):
    assert not used(whole[0])


@given(st.floats(0, 1, exclude_max=True))
@settings(max_examples=25)
def test_a_file_that_ends_early_is_refused(whole, tmp_path_factory, share):
    _, content, _ = whole
    short = content[: int(share * (len(content) - 32))]  # the end may be padding
    assert used(forged(tmp_path_factory.mktemp("cut"), short))


@given(
    st.lists(
        st.tuples(st.floats(0, 1), st.sampled_from(["I", "Q"]), st.sampled_from(EXTREMES)),
        min_size=1,
        max_size=3,
    ),
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=4),
)
@example([(8 / 4000, "Q", 2**63)], [])  # the number of tensors
@example([(16 / 4000, "Q", 2**40)], [])  # the number of keys
@settings(max_examples=80)
def test_lying_numbers_in_the_header_end_in_a_message(whole, tmp_path_factory, numbers, flips):
    _, content, data = whole
    changed = bytearray(content)
    for share, letter, value in numbers:
        size = struct.calcsize(letter)
        at = int(share * (data - size))
        changed[at : at + size] = struct.pack(f"<{letter}", value % 256**size)
    for share, byte in flips:
        changed[int(share * (data - 1))] = byte
    used(forged(tmp_path_factory.mktemp("lies"), bytes(changed)))


def place_of(content, name):
    """Where the number of dimensions of a tensor stands."""
    raw = name.encode()
    return content.index(struct.pack("<Q", len(raw)) + raw) + 8 + len(raw)


NAME = "joint_blocks.0.x_block.mlp.fc1.weight"
# Behind the name: dimensions u32, two sizes u64, type u32, offset u64.
LIES = {
    "too many dimensions": (0, "I", 2**31),
    "a huge size": (4, "Q", 2**62),
    "another size": (12, "Q", 64),
    "an unknown type": (20, "I", 999),
    "a type that is not read": (20, "I", 16),  # IQ2_XXS
    "bytes of another tensor": (24, "Q", 0),
    "beyond the end": (24, "Q", 2**60),
    "not a multiple of the alignment": (24, "Q", 33),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_about_one_tensor_is_refused(whole, tmp_path, lie):
    _, content, _ = whole
    offset, letter, value = LIES[lie]
    at = place_of(content, NAME) + offset
    packed = struct.pack(f"<{letter}", value)
    changed = content[:at] + packed + content[at + len(packed) :]
    file = forged(tmp_path, changed)
    if lie == "another size":  # it may be true, but is not the model's
        from qzo_diffusion.diffusion.transformer import empty_transformer
        from qzo_diffusion.quant.fits import check_fits

        found = find_transformer(file)
        with pytest.raises(ModelError, match="has the shape"):
            check_fits(empty_transformer(found.config), found.entries)
    else:
        assert used(file)


def test_names_of_thousands_of_layers_are_refused(tmp_path):
    def string(text):
        return struct.pack("<Q", len(text)) + text.encode()

    names = [f"joint_blocks.{index}.x_block.attn.qkv.weight" for index in range(20_000)]
    # what else the config is read from, so that only their number tells
    names += ["x_embedder.proj.weight", "pos_embed", "final_layer.linear.weight"]
    names += ["context_embedder.weight", "y_embedder.mlp.0.weight"]
    dimensions = struct.pack("<I4Q", 4, 1, 1, 1, 8)
    infos = [
        string(name) + dimensions + struct.pack("<IQ", 0, 32 * index)
        for index, name in enumerate(names)
    ]
    head = b"GGUF" + struct.pack("<IQQ", 3, len(names), 0) + b"".join(infos)
    content = head + bytes(-len(head) % 32) + bytes(32 * len(names))
    file = forged(tmp_path, content)
    assert used(file)
    with pytest.raises(ModelError, match="a number of layers up to"):
        find_transformer(file)


@pytest.mark.parametrize("damage", ["cut", "type", "count", "empty"])
def test_the_command_says_so_and_ends_with_2(whole, tmp_path, capsys, pipeline, damage, images):
    _, content, _ = whole
    at = place_of(content, NAME)
    changed = {
        "cut": content[:-4000],
        "type": content[: at + 20] + struct.pack("<I", 999) + content[at + 24 :],
        "count": content[:8] + struct.pack("<Q", 2**60) + content[16:],
        "empty": b"",
    }[damage]
    file = forged(tmp_path, changed)
    arguments = ["train", "--model", pipeline, "--transformer", file, "--style-dir", images]
    code = main([str(part) for part in [*arguments, "--output-dir", tmp_path / "run", "--dry-run"]])
    error = failing(capsys, code)
    assert "forged.gguf" in error
    assert not (tmp_path / "run").exists()
