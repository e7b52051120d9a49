"""A GGUF file is tuned in its own blocks, and what is saved is the same file with other factors."""

import json

import numpy as np
import pytest
import torch

from qzo_diffusion.cli import main
from qzo_diffusion.config.files import make_config
from qzo_diffusion.config.llm import LlmConfig
from qzo_diffusion.core.errors import ModelError
from qzo_diffusion.llm import gguf_file
from qzo_diffusion.llm.causal_lm import load_causal_lm
from qzo_diffusion.quant.gguf import FACTORS, GgufLinear
from qzo_diffusion.quant.load import codes_fingerprint, find_scales, quantize_
from qzo_diffusion.runs.llm.plan import make_plan
from qzo_diffusion.runs.tuned import load_scales
from tests.conftest import failing
from tests.tiny_llama import tiny_llama, write_sentences

gguf = pytest.importorskip(
    "gguf", reason="the package gguf is not installed: pip install 'qzo-diffusion[gguf]'"
)
from tests.llm.gguf_files import write_gguf  # noqa: E402

SIZES = gguf.GGML_QUANT_SIZES


def blocks_of(kind, rows=4, columns=3):
    """Any bytes are codes; the factors are numbers of a weight's size, of both signs, one of them
    zero.
    """
    size, count = SIZES[gguf.GGMLQuantizationType[kind]]
    generator = np.random.default_rng(0)
    data = generator.integers(0, 256, (rows, columns, count), dtype=np.uint8)
    for place in FACTORS[kind]:
        factors = (
            generator.uniform(0.01, 0.1, (rows, columns, 1))
            * generator.choice([-1, 1], (rows, columns, 1))
        ).astype("<f2")
        factors[0, 0] = 0
        data[..., place : place + 2] = factors.view(np.uint8)
    return data.reshape(rows, -1), size * columns


def weight_of(data, kind):
    return torch.from_numpy(gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind]))


@pytest.mark.parametrize("kind", FACTORS)
def test_every_type_is_read_as_its_own_package_reads_it_and_is_linear_in_the_scales(kind):
    data, width = blocks_of(kind)
    layer = GgufLinear(torch.from_numpy(data), kind, torch.arange(4), None)
    assert (layer.in_features, layer.out_features, layer.scales.shape) == (width, 4, (4, 3))
    torch.testing.assert_close(layer.dequantized(), weight_of(data, kind), rtol=1e-6, atol=1e-7)
    before = layer.dequantized()
    gains = torch.tensor([0.5, 1.0, 2.0])  # exact
    layer.scales = layer.scales * gains
    assert torch.equal(
        layer.dequantized(), (before.view(4, 3, -1) * gains.view(1, 3, 1)).flatten(1)
    )


@pytest.mark.parametrize("kind", FACTORS)
def test_what_is_stored_has_other_factors_and_nothing_else(kind):
    data, _ = blocks_of(kind)
    rows = torch.tensor([2, 0, 3, 1])  # of the file
    layer = GgufLinear(torch.from_numpy(data)[rows], kind, rows, None)
    assert np.array_equal(layer.bytes_to_store(layer.scales).numpy(), data)
    layer.scales = layer.scales * torch.tensor([0.5, 1.0, 2.0])
    stored = layer.bytes_to_store(layer.scales).numpy()
    torch.testing.assert_close(
        weight_of(stored, kind)[rows], layer.dequantized(), rtol=1e-6, atol=1e-7
    )
    changed = (stored != data).reshape(4, 3, -1).any((0, 1)).nonzero()[0]
    assert set(changed) <= {place + byte for place in FACTORS[kind] for byte in (0, 1)}


def logits(lm):
    with torch.no_grad():
        return lm.model(input_ids=torch.arange(12).view(1, -1)).logits


@pytest.fixture
def file(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", tiny_llama())
    return tmp_path / "tiny.gguf"


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_a_file_is_read_tuned_and_saved(tmp_path, kind):
    plain, file = tiny_llama(), tmp_path / "model.gguf"
    for name, weight in write_gguf(file, plain, kind).items():
        plain.model.get_submodule(name).weight.data = weight
    lm = load_causal_lm(file, torch.float32)
    # Two layers; logits of about 1 from sums of up to 128 terms in fp32.
    torch.testing.assert_close(logits(lm), logits(plain), rtol=1e-4, atol=1e-4)
    assert lm.encode(" It was great") == plain.encode(" It was great")

    scales, codes, before = find_scales(lm.model), codes_fingerprint(lm.model), logits(lm)
    assert len(scales) == 14
    for index, name in enumerate(scales):
        scales[name].mul_(2.0 ** (index % 2))  # which fp16 holds
    tuned = logits(lm)
    assert not torch.allclose(tuned, before, atol=0.1)
    (tmp_path / "saved").mkdir()
    gguf_file.save_gguf(file, tmp_path / "saved", lm.model, scales.tensors())
    again = load_causal_lm(tmp_path / "saved" / "model.gguf", torch.float32)
    torch.testing.assert_close(logits(again), tuned, rtol=1e-5, atol=1e-5)
    assert codes_fingerprint(lm.model) == codes
    assert (tmp_path / "saved" / "model.gguf").stat().st_size == file.stat().st_size


def test_a_run_is_evaluated_and_exported_as_a_file(file, tmp_path, capsys):
    data = write_sentences(tmp_path / "sentences")
    small = [
        "data.batch_size=4",
        "data.train_examples=16",
        "data.validation_examples=8",
        "compute.dtype=float32",
        "train.lr=0.1",
    ]
    train = [
        "llm",
        "train",
        "--task",
        "sst2",
        "--model",
        str(file),
        "--data-dir",
        str(data),
        "--max-steps",
        "6",
        *small,
    ]
    assert main([*train, "--output-dir", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    assert main(["llm", "evaluate", "--run", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    export = [
        "export",
        "--run",
        str(tmp_path / "run"),
        "--format",
        "native",
        "--output-dir",
        str(tmp_path / "out"),
        "--json",
    ]
    assert main(export) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["lm_eval"].endswith(
        f"pretrained={tmp_path / 'out'},gguf_file=tiny.gguf --tasks sst2"
    )
    lm = load_causal_lm(file, torch.float32)
    before, scales = logits(lm), find_scales(lm.model)
    for name, tuned in load_scales(tmp_path / "run")[0].items():
        scales[name].copy_(tuned)
    moved = (logits(lm) - before).abs().max()
    exported = logits(load_causal_lm(tmp_path / "out" / "tiny.gguf", torch.float32))
    # fp16 in the file: half a unit in the last of 11 bits of every factor, over two layers.
    assert (exported - logits(lm)).abs().max() < 0.05 * moved
    again = [
        "llm",
        "evaluate",
        "--task",
        "sst2",
        "--model",
        str(tmp_path / "out" / "tiny.gguf"),
        "--data-dir",
        str(data),
        *small,
    ]
    assert main(again) == 0


def test_a_file_that_is_none_or_has_no_blocks_is_refused(tmp_path, capsys):
    data = str(write_sentences(tmp_path / "sentences"))
    (tmp_path / "damaged.gguf").write_bytes(b"GGUF and no more")
    code = main(
        [
            "llm",
            "evaluate",
            "--task",
            "sst2",
            "--model",
            str(tmp_path / "damaged.gguf"),
            "--data-dir",
            data,
        ]
    )
    assert "damaged.gguf is damaged" in failing(capsys, code)
    write_gguf(tmp_path / "half.gguf", tiny_llama(), "F16")
    code = main(
        [
            "llm",
            "evaluate",
            "--task",
            "sst2",
            "--model",
            str(tmp_path / "half.gguf"),
            "--data-dir",
            data,
        ]
    )
    assert "without a quantized layer" in failing(capsys, code)


ABSOLUTE = ["qzo.units=absolute", "qzo.parametrization=dense", "qzo.unquantized=all"]


@pytest.mark.parametrize(
    ("more", "said"),
    [(["--method", "qlora"], "peft knows no other"), (ABSOLUTE, "qzo.unquantized=none")],
)
def test_what_a_file_can_not_hold_is_refused(file, tmp_path, capsys, more, said):
    data, run = write_sentences(tmp_path / "sentences"), tmp_path / "run"
    small = [
        "data.batch_size=4",
        "data.train_examples=16",
        "data.validation_examples=8",
        "--output-dir",
        str(run),
    ]
    code = main(
        [
            "llm",
            "train",
            "--task",
            "sst2",
            "--model",
            str(file),
            "--data-dir",
            str(data),
            *small,
            *more,
        ]
    )
    assert said in failing(capsys, code)


def test_rows_in_an_unknown_order_are_refused(file, monkeypatch):
    monkeypatch.setattr(gguf_file, "_interleaved", lambda rows, heads: torch.arange(rows))
    with pytest.raises(ModelError, match=r"q_proj, which is not blk\.0\.attn_q\.weight"):
        load_causal_lm(file, torch.float32)


def test_a_file_keeps_its_own_quantization(file):
    lm = load_causal_lm(file, torch.bfloat16)
    before = codes_fingerprint(lm.model)
    with pytest.raises(ModelError):
        quantize_(lm.model, skip=["lm_head"])
    assert codes_fingerprint(lm.model) == before


def test_layers_in_which_transformers_keeps_blocks_itself_are_refused():
    """They may hold copies of the factors."""
    theirs = type("GgufLinear", (torch.nn.Linear,), {})
    with pytest.raises(ModelError, match="another program"):
        find_scales(torch.nn.Sequential(theirs(4, 4)))


def test_a_run_finds_its_file_from_anywhere(tmp_path, monkeypatch):
    write_gguf(tmp_path / "model.gguf", tiny_llama())
    write_sentences(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    data = {"dir": "data", "train_examples": 4, "validation_examples": 4}
    plan = make_plan(make_config({"model": "model.gguf", "data": data}, LlmConfig))
    assert plan.config.model == str(tmp_path / "model.gguf")
