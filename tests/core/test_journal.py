"""The journal: small, exact, and never believed when a bit of it is wrong."""

import itertools
import math
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qzo_diffusion.core.errors import JournalError, OutputError
from qzo_diffusion.core.journal import JournalWriter, read_journal, replay_
from qzo_diffusion.core.journal_format import MOST_SCALARS, NoteEntry, StepEntry
from qzo_diffusion.core.noise import directions_of_step
from qzo_diffusion.core.optimizer import Update, make_optimizer
from qzo_diffusion.core.parametrize import parametrize
from tests.quantized import estimated, inputs, scaled_network, squared_output

HEADER = {"model": "tiny", "seed": 3, "directions": "rademacher"}


def step(index, grads=(0.5,), skipped=False):
    return StepEntry(
        index,
        seed=3,
        lr=1e-3 / (index + 1),
        eps=1e-2,
        loss=0.1 * index,
        projected_grad=tuple(grads),
        skipped=skipped,
    )


def write(path, entries):
    writer = JournalWriter.create(path, HEADER)
    for entry in entries:
        writer.append(entry)
    writer.close()
    return path


@pytest.fixture
def path(tmp_path):
    return tmp_path / "journal.qzo"


ENTRIES = [
    step(0),
    step(1, (0.1, -0.2)),
    NoteEntry("resume", {"step": 2}),
    step(2, skipped=True),
    NoteEntry("resume", {"changes": ["rows"]}),
]


def test_the_largest_step_is_read_and_a_larger_one_has_no_room(path):
    largest = step(0, tuple(map(float, range(MOST_SCALARS))))
    assert read_journal(write(path, [largest])).steps == [largest]
    with pytest.raises(JournalError, match="the room in a record"):
        write(path.with_name("other"), [step(0, (0.0,) * (MOST_SCALARS + 1))])


def test_what_was_written_is_read(path):
    journal = read_journal(write(path, ENTRIES))
    assert journal.header == HEADER
    assert list(journal.entries) == ENTRIES
    assert journal.steps_done == 3
    assert journal.torn_bytes == 0


def test_nan_and_infinite_losses_survive(path):
    entry = StepEntry(0, 3, 1e-3, 1e-2, math.nan, (math.inf,), skipped=True)
    (read,) = read_journal(write(path, [entry])).entries
    assert math.isnan(read.loss)
    assert read.projected_grad == (math.inf,)


@pytest.mark.parametrize("directions", [1, 4])
def test_a_step_takes_at_most_56_bytes_and_8_a_direction(path, directions):
    sizes = [
        write(path.with_name(f"{n}"), [step(i, (0.1,) * directions) for i in range(n)])
        .stat()
        .st_size
        for n in (10, 110)
    ]
    assert (sizes[1] - sizes[0]) / 100 <= 56 + 8 * directions


def test_ten_thousand_steps_fit_into_640_kb(path):
    assert write(path, [step(i) for i in range(10_000)]).stat().st_size <= 640_000


def test_each_record_is_in_the_file_when_append_returns(path):
    writer = JournalWriter.create(path, HEADER)
    for index in range(3):
        writer.append(step(index))
        assert read_journal(path).steps_done == index + 1
    writer.close()


def test_reopened_journals_go_on_with_the_same_chain(path, tmp_path):
    whole = write(tmp_path / "whole", ENTRIES)
    write(path, ENTRIES[:2])
    writer, journal = JournalWriter.reopen(path)
    assert journal.chain == writer.chain
    for entry in ENTRIES[2:]:
        writer.append(entry)
    writer.close()
    assert path.read_bytes() == whole.read_bytes()


def test_an_existing_journal_is_not_overwritten(path):
    write(path, ENTRIES)
    with pytest.raises(OutputError):
        JournalWriter.create(path, HEADER)
    assert read_journal(path).steps_done == 3


def test_two_writers_at_once_are_refused(path):
    writer = JournalWriter.create(path, HEADER)
    with pytest.raises(OutputError, match="another process"):
        JournalWriter.reopen(path)
    writer.close()
    JournalWriter.reopen(path)[0].close()


def test_a_tail_torn_anywhere_in_the_last_record_is_cut_off_and_told(path):
    data = write(path, ENTRIES[:2]).read_bytes()
    sizes = read_journal(path).sizes
    for length in range(sizes[0] + 1, sizes[1]):
        path.write_bytes(data[:length])
        journal = read_journal(path)
        assert (journal.steps_done, journal.torn_bytes) == (1, length - sizes[0])
    writer, journal = JournalWriter.reopen(path)
    writer.append(ENTRIES[1])
    writer.close()
    assert path.read_bytes() == data


def test_every_single_bit_flip_is_found(path):
    data = write(path, ENTRIES).read_bytes()
    for position in range(len(data)):
        for bit in range(8):
            damaged = bytearray(data)
            damaged[position] ^= 1 << bit
            path.write_bytes(damaged)
            with pytest.raises(JournalError):
                read_journal(path)


def test_damage_is_named_with_its_record_and_place(path):
    data = bytearray(write(path, ENTRIES).read_bytes())
    start = read_journal(path).sizes[0]
    data[start + 20] ^= 1
    path.write_bytes(data)
    with pytest.raises(JournalError, match=f"record 2, at byte {start}"):
        read_journal(path)


def test_swapped_doubled_and_missing_records_are_found(path):
    data = write(path, [step(index) for index in range(4)]).read_bytes()
    journal = read_journal(path)
    bounds = [journal.header_size, *journal.sizes]
    parts = [data[a:b] for a, b in itertools.pairwise(bounds)]
    head = data[: journal.header_size]
    for order in ([1, 0, 2, 3], [0, 0, 1, 2, 3], [0, 2, 3], [1, 2, 3]):
        path.write_bytes(head + b"".join(parts[index] for index in order))
        with pytest.raises(JournalError):
            read_journal(path)


def test_a_record_of_another_journal_is_found(path, tmp_path):
    other = write(tmp_path / "other", [step(0, (9.0,)), step(1)])
    journal = read_journal(write(path, [step(0), step(1)]))
    data = path.read_bytes()
    path.write_bytes(data[: journal.sizes[0]] + other.read_bytes()[read_journal(other).sizes[0] :])
    with pytest.raises(JournalError):
        read_journal(path)


@given(st.binary(max_size=200))
def test_any_bytes_give_a_journal_error_and_nothing_else(data):
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "journal.qzo"
        path.write_bytes(b"QZOJRNL1" + data)
        with pytest.raises(JournalError):
            read_journal(path)


def test_other_files_and_missing_ones_are_refused(path):
    with pytest.raises(JournalError, match="can't be read"):
        read_journal(path)
    path.write_bytes(b"PK\x03\x04 something else")
    with pytest.raises(JournalError, match="does not begin like a journal"):
        read_journal(path)


def test_a_full_disk_leaves_the_journal_at_its_last_step(path, monkeypatch):
    import os

    writer = JournalWriter.create(path, HEADER)
    writer.append(step(0))
    real = os.pwrite

    def full(descriptor, data, offset):
        real(descriptor, data[:7], offset)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OutputError, match="No space left"):
        writer.append(step(1))
    monkeypatch.undo()
    assert read_journal(path).torn_bytes == 0
    writer.append(step(1))
    writer.close()
    assert read_journal(path).steps_done == 2


def test_a_newer_format_is_told(path):
    import zlib

    write(path, [])
    data = bytearray(path.read_bytes())
    data[9] = 2
    struct.pack_into("<I", data, 12, zlib.crc32(bytes(data[8:12]), zlib.crc32(b"")))
    path.write_bytes(data)
    with pytest.raises(JournalError, match="format 2"):
        read_journal(path)


def trained(path, optimizer_name, level, directions, distribution="rademacher"):
    """A short run with its journal; returns copies of the trained numbers after each step."""
    model, scales = scaled_network()
    theta, optimizer = parametrize(scales, level), make_optimizer(optimizer_name)
    writer = JournalWriter.create(path, HEADER | {"directions": distribution})
    states = [copies(theta)]
    for index in range(5):
        found = estimated(
            squared_output(model),
            [inputs(seed=index)],
            theta,
            directions_of_step(3, index, directions, distribution),
            eps=1e-2,
        )
        skipped = index == 2
        if not skipped:
            optimizer.step_(theta, Update(found.directions, found.projected_grad, 0.05))
        writer.append(StepEntry(index, 3, 0.05, 1e-2, found.loss, found.projected_grad, skipped))
        states.append(copies(theta))
    writer.close()
    return states


def copies(theta):
    return {name: tensor.clone() for name, tensor in theta.state().items()}


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
@pytest.mark.parametrize("level", ["dense", "layer"])
@pytest.mark.parametrize(
    ("directions", "distribution"), [(1, "rademacher"), (3, "rademacher"), (1, "gaussian")]
)
def test_replay_gives_the_numbers_of_every_step_bit_for_bit(
    path, optimizer, level, directions, distribution
):
    states = trained(path, optimizer, level, directions, distribution)
    journal = read_journal(path)
    for to_step, expected in enumerate(states):
        _, scales = scaled_network()
        theta = parametrize(scales, level)
        assert replay_(journal, theta, make_optimizer(optimizer), to_step=to_step) == to_step
        assert all(torch.equal(expected[name], tensor) for name, tensor in theta.state().items())


def test_replay_can_go_on_from_a_step(path):
    states = trained(path, "sgd", "layer", 1)
    _, scales = scaled_network()
    theta = parametrize(scales, "layer")
    theta.load_state_(states[2])
    assert replay_(read_journal(path), theta, make_optimizer("sgd"), first_step=2) == 5
    assert all(torch.equal(states[-1][name], tensor) for name, tensor in theta.state().items())
