"""BOF4 and BOF4-S (arXiv 2505.06653): codebooks, signs of scales, errors beside NF4's."""

import pytest
import torch

from qzo_diffusion.config.files import make_config
from qzo_diffusion.config.llm import LlmConfig
from qzo_diffusion.config.style import Config
from qzo_diffusion.core.errors import ConfigError
from qzo_diffusion.quant.bof4 import codebook
from qzo_diffusion.quant.reference import dequantize_blockwise, quantize_blockwise

# BOF4-S for blocks of 32 and the mean squared error, as published
# fmt: off
PUBLISHED = (
    -0.8732797503, -0.6907446384, -0.5437039137, -0.4173701704, -0.3038933575, -0.1986017823,
    -0.0981557220, 0, 0.0925938413, 0.1870480031, 0.2855197489, 0.3907126188, 0.5062831640,
    0.6379748583, 0.7956376672, 1,
)
# fmt: on


def normal(blocks, blocksize, seed=0):
    return torch.randn(blocks, blocksize, generator=torch.Generator().manual_seed(seed)).double()


def relative_error(weight, quant_type, blocksize):
    codes, scales = quantize_blockwise(weight, quant_type, blocksize)
    back = dequantize_blockwise(codes, scales, quant_type, blocksize)
    return ((back - weight).square().sum() / weight.square().sum()).item()


def test_the_codebook_is_the_published_one():
    worst = max(abs(a - b) for a, b in zip(codebook(32, True), PUBLISHED, strict=True))
    assert worst < 1e-3


def test_entries_are_fixed_where_the_paper_fixes_them():
    for blocksize in (32, 64):
        unsigned, signed = codebook(blocksize, False), codebook(blocksize, True)
        assert unsigned[0] == -1
        assert signed[0] > -1
        assert all(one[7] == 0 and one[-1] == 1 for one in (unsigned, signed))
        assert all(list(one) == sorted(set(one)) and len(one) == 16 for one in (unsigned, signed))


@pytest.mark.parametrize("signed", [False, True])
def test_entries_are_the_weighted_means_of_drawn_blocks(signed):
    """Σ m² x / Σ m² over the samples that are nearest to an entry, m the block's largest."""
    weight = normal(20_000, 64)
    largest = weight.gather(1, weight.abs().argmax(1, keepdim=True))
    x = weight / (largest if signed else largest.abs())
    entries = torch.tensor(codebook(64, signed), dtype=torch.float64)
    nearest = torch.bucketize(x, (entries[1:] + entries[:-1]) / 2)
    m2 = largest.square().expand_as(x).flatten()
    sums = torch.zeros(2, 16, dtype=torch.float64)
    sums[0].index_add_(0, nearest.flatten(), m2 * x.flatten())
    sums[1].index_add_(0, nearest.flatten(), m2)
    free = (entries != 0) & (entries.abs() != 1)
    assert ((sums[0] / sums[1] - entries)[free].abs() < 2e-3).all()


@pytest.mark.parametrize("blocksize", [32, 64])
def test_errors_are_ordered_as_in_the_paper(blocksize):
    weight = normal(512, 512)
    error = {kind: relative_error(weight, kind, blocksize) for kind in ("nf4", "bof4", "bof4s")}
    assert error["bof4s"] < error["bof4"] < error["nf4"]


def test_the_largest_weight_of_a_block_is_kept_with_its_sign():
    weight = normal(16, 64)
    codes, scales = quantize_blockwise(weight, "bof4s", 64)
    largest = weight.gather(1, weight.abs().argmax(1, keepdim=True)).squeeze(1)
    assert torch.equal(scales, largest)
    assert (scales < 0).any()
    assert (scales > 0).any()
    back = dequantize_blockwise(codes, scales, "bof4s", 64)
    assert torch.equal(back.abs().amax(1), weight.abs().amax(1))
    assert not quantize_blockwise(torch.zeros(2, 64), "bof4s", 64)[1].any()


@pytest.mark.parametrize("kind", [Config, LlmConfig])
def test_the_type_alone_chooses_its_backend(kind):
    config = make_config({"quant": {"type": "bof4s"}}, kind)
    assert config.quant.backend == "reference"
    with pytest.raises(ConfigError, match="type: nf4, fp4"):
        make_config({"quant": {"type": "bof4", "backend": "bnb"}}, kind)
