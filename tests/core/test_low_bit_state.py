"""States of few bits a number: their maps, their size, and that runs resume and replay."""

import numpy as np
import pytest
import torch

from qzo_diffusion.core.journal import JournalWriter, read_journal, replay_
from qzo_diffusion.core.journal_format import StepEntry
from qzo_diffusion.core.low_bit_maps import (
    DynamicMap,
    LogarithmicMap,
    dynamic_levels,
    pack,
    steady_beta,
    unpack,
)
from qzo_diffusion.core.noise import directions_of_step
from qzo_diffusion.core.optimizer import Adam, Update, make_optimizer
from qzo_diffusion.core.parametrize import parametrize
from qzo_diffusion.core.remembered import BLOCK
from qzo_diffusion.core.scales import ScaleSet
from tests.core.replay_worker import Layer
from tests.quantized import scaled_network

FEW = [8, 4, 3, 2]
SHAPES = {"even": 8192, "odd": 4995, "short": 7}


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", FEW)
@pytest.mark.parametrize("count", [1, 7, 128, 1003])
def test_packed_codes_come_back(bits, count):
    codes = (random(count).mul(1000).long() % 2**bits).to(torch.uint8)
    packed = pack(codes, bits)
    assert packed.numel() <= bits * (count + 7) // 8
    assert torch.equal(unpack(packed, bits, count), codes)


@pytest.mark.parametrize("bits", FEW)
@pytest.mark.parametrize("signed", [True, False])
def test_levels_of_the_dynamic_map_come_back_and_others_go_to_the_nearest(bits, signed):
    levels = dynamic_levels(bits, signed)
    assert len(levels) == 2**bits
    assert (levels.diff() > 0).all()
    assert {0.0, 1.0} <= set(levels.tolist())
    form, unit = DynamicMap(bits, signed), torch.tensor([[0.25], [-8.0 if signed else 8.0]])
    assert torch.equal(form.decode(*form.encode(levels * unit)), levels * unit)
    between = random(2, BLOCK) if signed else random(2, BLOCK).abs()
    codes, units = form.encode(between)
    distances = (between / units).unsqueeze(-1) - levels
    assert torch.equal(codes.long(), distances.abs().argmin(-1))


@pytest.mark.parametrize("bits", FEW)
def test_the_number_of_largest_magnitude_stays_as_it_is(bits):
    blocks = random(3, BLOCK, seed=bits)
    form = DynamicMap(bits, signed=True)
    place = blocks.abs().argmax(1, keepdim=True)
    assert torch.equal(form.decode(*form.encode(blocks)).gather(1, place), blocks.gather(1, place))


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_exponents_are_right_on_average_within_standard_errors(bits):
    blocks, form, draws = random(1, BLOCK).square(), LogarithmicMap(bits), 4000
    codes, figures = form.encode(blocks.expand(draws, -1), "draws")
    codes, base = codes.double(), figures[0, 1].double()
    places = (blocks / blocks.max()).double().log() / base.log()
    expected = places.clamp(0, 2**bits - 1)[0]
    error = codes.std(0) / draws**0.5
    assert ((codes.mean(0) - expected).abs() <= 4.5 * error + 4 / draws).all()  # of 128 means
    assert (error > 0).sum() > BLOCK / 2  # they are not rounded to nearest


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_averages_of_squares_reach_from_their_quantile_to_the_largest(bits):
    blocks = random(5, BLOCK).square()
    form = LogarithmicMap(bits)
    kept = form.decode(*form.encode(blocks, "key"))
    assert torch.equal(kept.amax(1), blocks.amax(1))
    lowest = blocks.sort(1).values[:, 12]
    assert torch.allclose(kept.amin(1), lowest, rtol=1e-5)
    assert len(kept[0].unique()) == 2**bits
    for plain in (torch.zeros(1, BLOCK), torch.full((1, BLOCK), 0.3)):
        assert torch.equal(form.decode(*form.encode(plain, "key")), plain)


def test_fewer_bits_have_less_momentum():
    """0.8 with 4 bits is the pair that the others follow from: 4 times r(4) / r(3) = 2, and so
    on."""
    assert [steady_beta(0.9, bits) for bits in (32, 8)] == [0.9, 0.9]
    assert [steady_beta(0.9, bits) for bits in (4, 3)] == pytest.approx([0.8, 2 / 3])
    assert steady_beta(0.9, 2) == pytest.approx(108 / 218, abs=1e-3)
    assert steady_beta(0.3, 2) == 0.3


def layers():
    words = np.random.Philox(key=3)
    return ScaleSet([Layer(name, count, 1, words) for name, count in SHAPES.items()])


def steps_of(count, seed=5):
    """Updates along two directions with scalars that vary; their second moments are tensors."""
    return [
        Update(directions_of_step(seed, step, 2, "rademacher"), (0.3 + step, 0.7 - step), 0.01)
        for step in range(count)
    ]


def trained(optimizer, updates, theta=None):
    theta = parametrize(layers(), "dense") if theta is None else theta
    for update in updates:
        optimizer.step_(theta, update)
    return theta


def same(first, second):
    assert first.keys() == second.keys()
    return all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.parametrize("name", ["momentum", "adam"])
@pytest.mark.parametrize("bits", FEW)
def test_memory_is_that_of_the_bits(name, bits):
    sizes = []
    for width in (32, bits):
        optimizer = make_optimizer(name, state_bits=width)
        trained(optimizer, steps_of(2))
        sizes.append(sum(tensor.nbytes for tensor in optimizer.state().values()))
    assert sizes[1] <= (bits / 32 + 0.05) * sizes[0]


@pytest.mark.parametrize("name", ["momentum", "adam"])
@pytest.mark.parametrize("bits", FEW)
def test_a_loaded_state_continues_as_if_never_stopped(name, bits):
    updates = steps_of(6)
    whole = make_optimizer(name, state_bits=bits)
    expected = trained(whole, updates)
    first, second = (make_optimizer(name, state_bits=bits) for _ in range(2))
    theta = trained(first, updates[:3])
    second.load_state_(first.state())
    trained(second, updates[3:], theta)
    assert same(theta.state(), expected.state())
    assert same(second.state(), whole.state())


@pytest.mark.parametrize("name", ["momentum", "adam"])
@pytest.mark.parametrize("bits", FEW)
def test_a_replay_gives_every_step_bit_for_bit(tmp_path, name, bits):
    """Also where the seed of a run was changed on the way."""
    writer = JournalWriter.create(tmp_path / "journal.qzo", {"directions": "rademacher"})
    updates = steps_of(3) + steps_of(5, seed=6)[3:]
    for step, one in enumerate(updates):
        seed = one.directions[0].seed
        writer.append(
            StepEntry(step, seed, one.lr, 1e-2, 1.0, one.projected_grad, skipped=step == 2)
        )
    writer.close()
    done = updates[:2] + updates[3:]
    expected = trained(make_optimizer(name, state_bits=bits), done)
    theta = parametrize(layers(), "dense")
    again = make_optimizer(name, state_bits=bits)
    assert replay_(read_journal(tmp_path / "journal.qzo"), theta, again) == 5
    assert same(theta.state(), expected.state())
    exact = trained(make_optimizer(name), done)
    assert not torch.equal(theta.state()["odd"], exact.state()["odd"])


def test_the_seed_of_its_directions_rounds_a_step():
    """Adam of two bits, with equal amounts along equal directions."""
    found = []
    for seed in (5, 6):
        adam = Adam(state_bits=2)
        for step in range(3):
            adam._change("odd", random(4995, seed=step), random(4995, seed=step) ** 2, 0.1, seed)
        found.append(adam.state()["second.odd"])
    assert not torch.equal(*found)


@pytest.mark.parametrize(("seed", "equal"), [(0, True), (1, False)])
def test_a_known_gradient_is_rounded_by_the_runs_seed(seed, equal):
    gradient = {name: random(*layers()[name].shape, seed=1) for name in SHAPES}
    found = []
    for one in (0, seed):
        theta, adam = parametrize(layers(), "dense"), Adam(state_bits=2, seed=one)
        for step in range(3):
            adam.descend_(theta, {name: g * (step + 1) for name, g in gradient.items()}, 0.01)
        found.append(theta.state()["odd"].clone())
    assert torch.equal(*found) is equal


@pytest.mark.parametrize(("written", "read"), [(8, 32), (4, 8), (8, 4), (3, 2), (2, 3)])
def test_a_state_of_other_bits_is_refused(written, read):
    """Their codes would be taken for others."""
    wrote, reads = (make_optimizer("adam", state_bits=bits) for bits in (written, read))
    trained(wrote, steps_of(1))
    with pytest.raises(ValueError, match=f"not {read}"):
        reads.load_state_(wrote.state())


@pytest.mark.parametrize("bits", FEW)
def test_few_numbers_stay_as_they_are(bits):
    """A layer's one number has nothing to share a unit with."""
    _, scales = scaled_network()
    results = []
    for width in (32, bits):
        theta = parametrize(scales, "layer")
        adam = Adam(beta1=0.3, state_bits=width)  # low enough for any bits
        for update in steps_of(3):
            adam.step_(theta, update)
        results.append(theta.state())
    assert same(*results)
