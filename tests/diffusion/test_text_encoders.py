"""One encoder at a time gives what diffusers' whole pipeline gives; T5 in 4 bits stays close, and
may be left out.
"""

import gc
import shutil
import weakref

import pytest
import torch

from qzo_diffusion.config.files import make_config
from qzo_diffusion.core.errors import ModelError
from qzo_diffusion.diffusion import text_encoders
from qzo_diffusion.diffusion.cache import TensorCache
from qzo_diffusion.diffusion.families.sd3 import CLIP_L, SD3, T5
from qzo_diffusion.diffusion.prompt_encoder import PromptEncoder
from qzo_diffusion.quant.load import handles_of, quantize_
from qzo_diffusion.quant.stream import Quantization
from qzo_diffusion.resources import tiny_model
from qzo_diffusion.runs.style import pipeline as parts

CPU = torch.device("cpu")
PROMPTS = ["red apple", "", "a rocket over the sea, flat style"]


@pytest.fixture(scope="module")
def pipeline():
    from diffusers import StableDiffusion3Pipeline

    return StableDiffusion3Pipeline.from_pretrained(tiny_model(), dtype=torch.float32)


@torch.no_grad()  # with gradients torch chooses another attention kernel
def pipeline_states(pipeline, prompt, length):
    options = {"device": CPU, "do_classifier_free_guidance": False, "max_sequence_length": length}
    embeds, _, pooled, _ = pipeline.encode_prompt(prompt, None, None, **options)
    return embeds[0], pooled[0]


def encoder(tmp_path, **options):
    return PromptEncoder(
        tiny_model(), TensorCache(tmp_path), family=SD3, device=CPU, dtype=torch.float32, **options
    )


@pytest.mark.parametrize("length", [None, 8])
def test_prompts_are_those_of_the_whole_pipeline(pipeline, tmp_path, length):
    encoded = encoder(tmp_path, t5_tokens=length).encode(PROMPTS)
    for prompt in PROMPTS:
        embeds, pooled = pipeline_states(
            pipeline, prompt, length or min(256, pipeline.tokenizer_3.model_max_length)
        )
        assert torch.equal(encoded[prompt].embeds, embeds)
        assert torch.equal(encoded[prompt].pooled, pooled)


def test_without_t5_its_place_is_zeros(tmp_path):
    full = encoder(tmp_path, t5_tokens=9).encode(PROMPTS)
    without = encoder(tmp_path, t5_tokens=9, t5="none").encode(PROMPTS)
    for prompt in PROMPTS:
        assert torch.equal(without[prompt].pooled, full[prompt].pooled)
        assert without[prompt].embeds.shape == full[prompt].embeds.shape
        assert torch.equal(without[prompt].embeds[:-9], full[prompt].embeds[:-9])
        assert without[prompt].embeds[-9:].abs().max() == 0 < full[prompt].embeds[-9:].abs().max()


def test_a_pipeline_without_t5_needs_no_setting(tmp_path):
    folder = shutil.copytree(
        tiny_model(),
        tmp_path / "model",
        ignore=shutil.ignore_patterns("text_encoder_3", "tokenizer_3"),
    )
    config = make_config({"data": {"cache_dir": str(tmp_path / "cache")}})
    assert parts.t5_mode(config, folder, SD3) == "none"
    encoded = parts.prompt_encoder(config, folder, CPU, torch.float32).encode(["red apple"])[
        "red apple"
    ]
    clip = text_encoders.load_tokenizer(folder, CLIP_L).model_max_length
    assert encoded.embeds.shape == (clip + 256, 192)


def test_no_two_encoders_are_in_memory_at_once(tmp_path):
    alive: list[weakref.ref] = []

    def load(part):
        gc.collect()
        assert [one for one in alive if one() is not None] == []
        kind = SD3.texts.classes[part]
        options = {"dtype": torch.float32, "device": CPU}
        made = text_encoders.load_text_encoder(tiny_model(), part, kind, **options)
        alive.append(weakref.ref(made))
        return made

    encoder(tmp_path, load=load).encode(PROMPTS)
    assert len(alive) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_t5_in_4_bits_computes_with_its_quantized_weights(dtype):
    """Also in `wo`, where transformers casts activations to the weight's dtype: bytes, if nothing
    prevented it.
    """
    tokenizer = text_encoders.load_tokenizer(tiny_model(), T5)
    options = {"dtype": dtype, "device": CPU}
    packed = text_encoders.load_text_encoder(
        tiny_model(), T5, "T5EncoderModel", quantization=Quantization(), **options
    )
    plain = text_encoders.load_text_encoder(tiny_model(), T5, "T5EncoderModel", **options)
    twin = text_encoders.load_text_encoder(tiny_model(), T5, "T5EncoderModel", **options)
    count = quantize_(twin)
    dequantized = {handle.name: handle.dequantized() for handle in handles_of(twin)}
    assert len(dequantized) == count
    for name, weight in dequantized.items():
        plain.get_submodule(name).weight.data = weight
    wanted = text_encoders.t5_states(plain, tokenizer, PROMPTS[:1], 16)[0].float()
    got = text_encoders.t5_states(packed, tokenizer, PROMPTS[:1], 16)[0].float()
    # The same weights through two kernels: a handful of roundings of the dtype in each of a few
    # layers.
    unit = {torch.float32: 2**-24, torch.bfloat16: 2**-9}[dtype]
    assert (got - wanted).norm() / wanted.norm() < 32 * unit


def test_large_t5_is_quantized_by_itself_and_cached_apart(tmp_path, monkeypatch):
    config = make_config({"data": {"cache_dir": str(tmp_path)}})
    assert parts.t5_mode(config, tiny_model(), SD3) == "full"
    full = parts.prompt_encoder(config, tiny_model(), CPU, torch.float32).encode(PROMPTS)
    monkeypatch.setattr(parts, "LARGE_T5", 1)
    assert parts.t5_mode(config, tiny_model(), SD3) == "nf4"
    packed = parts.prompt_encoder(config, tiny_model(), CPU, torch.float32).encode(PROMPTS)
    difference = (full["red apple"].embeds - packed["red apple"].embeds).norm() / full[
        "red apple"
    ].embeds.norm()
    assert 0 < difference < 0.2


def test_an_encoder_that_is_damaged_is_told(tmp_path):
    folder = shutil.copytree(tiny_model(), tmp_path / "model")
    (folder / "text_encoder" / "config.json").write_text("[]")
    with pytest.raises(ModelError, match="holds a list, not an object"):
        text_encoders.load_text_encoder(
            folder, CLIP_L, SD3.texts.classes[CLIP_L], dtype=torch.float32, device=CPU
        )
    shutil.rmtree(folder / "tokenizer")
    with pytest.raises(ModelError, match="tokenizer of text_encoder"):
        text_encoders.load_tokenizer(folder, "text_encoder")
