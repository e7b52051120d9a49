"""Tuned factors in a copy of a GGUF file: how they are rounded, and that nothing else changes."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from qzo_diffusion.core.errors import OutputError
from qzo_diffusion.quant import gguf as blocks
from qzo_diffusion.quant import gguf_write
from qzo_diffusion.quant.entries import Entry, Span
from qzo_diffusion.quant.gguf import FACTORS, GgufLinear, dequantized, to_nearest
from qzo_diffusion.quant.gguf_kquants import quantize_k
from qzo_diffusion.quant.gguf_write import STEP, Kept, dithered, write_tuned
from tests.gguf_pictures import random_blocks

ROWS, BLOCKS = 6, 40


def layer_of(kind: str = "Q4_0") -> GgufLinear:
    size, _ = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    data = random_blocks((ROWS, BLOCKS * size), kind, np.random.default_rng(3))
    return GgufLinear(torch.from_numpy(data), kind, None, None)


def kept(layer, gains, rounding):
    found = Kept()
    scales = layer.stored_scales() * gains
    found.add(layer, scales, layer.bytes_to_store(scales, rounding))
    return found.facts()


def test_nearest_loses_a_gain_below_half_a_step_and_dithering_keeps_it():
    """A factor's step is 2^-11 to 2^-10 of itself, so a gain of 2^-13 is below half of any."""
    layer, gain = layer_of(), torch.full((ROWS, 1), 1 + 2.0**-13)
    assert kept(layer, gain, to_nearest)["change_kept"] == 0.0
    facts = kept(layer, gain, dithered)
    # the mean over a row is off by at most a step over its blocks, of gains a quarter of a step
    assert abs(facts["row_change_kept"] - 1) < 2 * STEP / BLOCKS / 2.0**-13 + 0.05
    assert 0.05 < facts["factors_changed"] < 0.3


def test_dithering_keeps_the_mean_gain_of_each_row():
    layer = layer_of()
    generator = torch.Generator().manual_seed(0)
    gains = torch.exp(torch.randn(ROWS, BLOCKS, generator=generator) * 1e-2)
    factors = layer.factor(0).float()
    found = dithered(factors, gains).float() / factors
    # the error of a row is what the last block carries away and the first began with
    assert ((found - gains).mean(1).abs() <= 2 * STEP / BLOCKS).all()
    assert ((found - gains).abs() <= 2.1 * STEP + STEP).all()


def test_rows_without_a_change_and_blocks_of_zeros_stay():
    layer = layer_of()
    factors, gains = layer.factor(0).float(), torch.ones(ROWS, BLOCKS)
    factors[2, 5], gains[2] = 0.0, 1.01
    stored = dithered(factors, gains)
    assert torch.equal(stored[[0, 1, 3, 4, 5]].float(), factors[[0, 1, 3, 4, 5]])
    assert stored[2, 5] == 0


def test_tiny_factors_carry_nothing_to_their_neighbours():
    """Below fp16's normal range a step may be half of a number."""
    factors = torch.tensor([[1e-7, 0.01, 0.01]]).half().float()
    stored = dithered(factors, torch.full((1, 3), 1.2))
    assert ((stored.float() / factors)[0, 1:] - 1.2).abs().max() < 3 * STEP


def written(tmp_path: Path, kind: str, gains):
    """A file whose rows 4.. lie before rows ..3, with other bytes before, between and after."""
    layer = layer_of(kind)
    raw = layer.codes.numpy().tobytes()
    half = len(raw) // 2
    source, target = tmp_path / "a.gguf", tmp_path / "b.gguf"
    source.write_bytes(b"head" + raw[half:] + b"between" + raw[:half] + b"end")
    spans = (Span(source, 4 + half + 7, half), Span(source, 4, half))
    entry = Entry(torch.uint8, (ROWS, layer.in_features), spans, blocks=kind)
    assert torch.equal(entry.read_blocks(), layer.codes)
    facts = write_tuned(source, target, {"x": (entry, layer, layer.stored_scales() * gains)})
    return layer, entry, source, target, facts.facts()


@pytest.mark.parametrize("kind", FACTORS)
def test_only_factors_differ_and_a_copy_without_a_change_has_the_same_bytes(tmp_path, kind):
    _, _, source, target, facts = written(tmp_path, kind, 1.0)
    assert source.read_bytes() == target.read_bytes()
    assert facts["change_kept"] is None
    layer, entry, source, target, facts = written(tmp_path, kind, 1.25)
    spans = tuple(Span(target, span.start, span.size) for span in entry.spans)
    read = Entry(entry.dtype, entry.shape, spans, blocks=kind).read_blocks()
    changed = (read != layer.codes).view(ROWS, BLOCKS, -1).any(0).any(0).nonzero().flatten()
    assert set(changed.tolist()) <= {place + byte for place in FACTORS[kind] for byte in (0, 1)}
    weights = dequantized(read, kind), 1.25 * dequantized(layer.codes, kind)
    # a factor and, where there is one, a minimum's factor, each to half a step
    largest = weights[1].view(ROWS, BLOCKS, -1).abs().amax(2, keepdim=True)
    off = (weights[0] - weights[1]).view(ROWS, BLOCKS, -1).abs()
    assert (off <= 4 * STEP * largest).all()
    assert facts["change_kept"] == pytest.approx(1, abs=1e-2)


def test_a_copy_that_reads_back_different_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(
        gguf_write.shutil,
        "copyfile",
        lambda a, b: b.write_bytes(a.read_bytes().replace(b"between", b"BETWEEN")),
    )
    with pytest.raises(OutputError, match="not what was written"):
        written(tmp_path, "Q4_0", 1.0)


def test_a_layer_is_dequantized_some_rows_at_a_time(monkeypatch):
    layer = layer_of("Q4_1")
    whole, parts = layer.dequantized(), []

    def counted(codes, kind):
        parts.append(len(codes))
        return dequantized(codes, kind)

    monkeypatch.setattr(blocks, "AT_ONCE", 2 * layer.in_features)
    monkeypatch.setattr(blocks, "dequantized", counted)
    assert torch.equal(layer.dequantized(), whole)
    assert parts == [2] * (ROWS // 2)
    assert layer.dequantized(torch.bfloat16).dtype == torch.bfloat16
    layer.scales = layer.scales.clone().requires_grad_()
    layer.dequantized().square().sum().backward()
    # a weight is linear in its scale: d(w^2)/ds = 2 w^2 / s
    by_block = whole.view(ROWS, BLOCKS, -1).square().sum(2)
    torch.testing.assert_close(layer.scales.grad, 2 * by_block / layer.stored_scales())


@pytest.mark.parametrize(("kind", "bits"), [("Q4_K", 4), ("Q5_K", 5)])
def test_blocks_of_256_are_quantized_as_well_as_their_bits_allow(kind, bits):
    """Of normal weights the codes of a part span about 4 sigma in 2^bits - 1 steps, and an error is
    uniform within a step; scales of 6 bits add a tenth. The package gguf reads the bytes."""
    weight = torch.randn(8, 512, generator=torch.Generator().manual_seed(1))
    codes = quantize_k(weight, kind)
    of_kind = gguf.GGMLQuantizationType[kind]
    read = torch.from_numpy(gguf.quants.dequantize(codes.numpy(), of_kind))
    error = (read - weight).square().mean().sqrt()
    assert error < 1.25 * 4.2 / (2**bits - 1) / 12**0.5
    zeros = torch.zeros(1, 256)
    assert torch.equal(dequantized(quantize_k(zeros, kind), kind), zeros)
