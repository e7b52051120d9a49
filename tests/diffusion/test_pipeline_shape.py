"""Damaged, incomplete and foreign parts of a pipeline are refused before any work."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from qzo_diffusion.core.errors import ModelError
from qzo_diffusion.diffusion.families.sd3 import SD3
from qzo_diffusion.diffusion.families.sd3_layout import SD3_LAYOUT
from qzo_diffusion.diffusion.pipeline_shape import check_shape, read_shape
from qzo_diffusion.diffusion.transformer import find_transformer
from qzo_diffusion.quant.weights import Pending, write_tensors
from qzo_diffusion.resources import tiny_model
from tests.conftest import failing


@pytest.fixture
def model(pipeline, tmp_path):
    """A copy of a small model that may be damaged."""
    return shutil.copytree(pipeline, tmp_path / "model")


def check(folder):
    shape = read_shape(folder, SD3, folder / "transformer")
    check_shape(shape, folder)
    return shape


def weights(folder, part):
    return next((folder / part).glob("*.safetensors"))


def without(folder, part, inside):
    file = weights(folder, part)
    kept = {name: one for name, one in load_file(file).items() if inside not in name}
    assert len(kept) < len(load_file(file))
    save_file(kept, file, {"format": "pt"})


def changed(folder, file, **values):
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_the_embedded_model_fits_together():
    assert check(tiny_model()).native_resolution == 64


@pytest.mark.parametrize(
    "file",
    [
        "vae/config.json",
        "transformer/config.json",
        "text_encoder_2/config.json",
        "text_encoder_3/config.json",
        "scheduler/scheduler_config.json",
        "tokenizer/tokenizer.json",
    ],
)
@pytest.mark.parametrize(
    "content", [None, "", '{"a":', "[1]", "\xff\xfe", "[" * 10**5, '{"a": 1, "a": 2}']
)
def test_a_config_that_is_absent_or_damaged_is_refused(model, file, content):
    if file.startswith("tokenizer") and content in ("[1]", '{"a": 1, "a": 2}'):
        content = "{}"
    (model / file).unlink()
    if content is not None:
        (model / file).write_bytes(content.encode("latin-1"))
    with pytest.raises(ModelError):
        check(model)


@pytest.mark.parametrize(
    ("file", "values", "told"),
    [
        ("vae/config.json", {"shift_factor": None}, "shift_factor = None"),
        ("vae/config.json", {"scaling_factor": "1.5"}, "scaling_factor = '1.5'"),
        ("vae/config.json", {"scaling_factor": 0}, "scaling_factor = 0"),
        ("vae/config.json", {"block_out_channels": []}, "block_out_channels"),
        ("vae/config.json", {"_class_name": "AutoencoderTiny"}, "AutoencoderTiny"),
        ("vae/config.json", {"norm_num_groups": 7}, "diffusers refuses"),
        ("vae/config.json", {"layers_per_block": 2**30}, "layers_per_block = 1073741824"),
        ("transformer/config.json", {"_class_name": "FluxTransformer2DModel"}, "FLUX.1"),
        ("transformer/config.json", {"num_layers": 10**9}, "num_layers = 1000000000"),
        ("transformer/config.json", {"num_layers": "many"}, "diffusers refuses"),
        ("transformer/config.json", {"num_attention_heads": 0}, "refuse|shape"),
        ("text_encoder/config.json", {"num_hidden_layers": 1}, "a layer that the model's config"),
        ("text_encoder/config.json", {"max_position_embeddings": 10**12}, "max_position"),
        ("text_encoder_3/config.json", {"d_model": "wide"}, "refused by transformers"),
        ("scheduler/scheduler_config.json", {"_class_name": "DDIMScheduler"}, "DDIMScheduler"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": "x"}, "is refused"),
    ],
)
def test_a_config_of_another_model_is_refused(model, file, values, told):
    changed(model, file, **values)
    with pytest.raises(ModelError, match=told):
        check(model)


@pytest.mark.parametrize(
    ("part", "inside"),
    [
        ("vae", "decoder.up_blocks.1"),
        ("transformer", "norm_out"),
        ("text_encoder", "text_projection"),
        ("text_encoder_3", "SelfAttention.k"),
    ],
)
def test_tensors_that_are_missing_are_told_before_any_work(model, part, inside):
    without(model, part, inside)
    with pytest.raises(ModelError, match="tensors of the model are not in its files"):
        check(model)


def test_parts_of_two_models_are_refused(model):
    changed(model, "text_encoder/config.json", projection_dim=16)
    file = weights(model, "text_encoder")
    tensors = load_file(file)
    tensors["text_projection.weight"] = tensors["text_projection.weight"][:16].clone()
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ModelError, match="pooled prompts of 48 numbers"):
        check(model)


def test_a_transformer_from_elsewhere_keeps_the_resolution_of_the_folder(tmp_path):
    """The original layout does not state one."""
    folder = tiny_model()
    found = find_transformer(folder / "transformer")
    pending = {
        name: Pending(entry.dtype, entry.shape, entry.read) for name, entry in found.entries.items()
    }
    write_tensors(tmp_path / "one.safetensors", SD3_LAYOUT.to_original(pending, found.config), {})
    shape = read_shape(folder, SD3, tmp_path / "one.safetensors")
    check_shape(shape, folder)
    assert shape.native_resolution == 64


@pytest.mark.parametrize("variant", ["fp16", "bf16"])
def test_files_of_a_variant_are_read(model, variant):
    for file in list(model.glob("*/*.safetensors")):
        file.rename(file.with_suffix(f".{variant}.safetensors"))
    check(model)


def test_an_index_of_a_variant_is_read(model):
    """As `save_pretrained(variant="fp16", max_shard_size=...)` writes it."""
    file = weights(model, "vae")
    tensors, place = load_file(file), {}
    for number, names in enumerate([list(tensors)[::2], list(tensors)[1::2]], 1):
        shard = f"diffusion_pytorch_model.fp16-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in names}, file.with_name(shard))
        place |= dict.fromkeys(names, shard)
    file.unlink()
    index = file.with_name("diffusion_pytorch_model.safetensors.index.fp16.json")
    index.write_text(json.dumps({"weight_map": place}))
    check(model)


def test_the_command_refuses_before_a_run_folder_exists(train, model, tmp_path, capsys):
    changed(model, "vae/config.json", shift_factor=None)
    assert "shift_factor" in failing(capsys, train("--model", str(model)))
    assert not (tmp_path / "run").exists()


def test_t5_that_is_absent_may_be_left_out(train, model, capsys):
    for file in (model / "text_encoder_3").glob("*"):
        file.unlink()
    error = failing(capsys, train("--model", str(model), "--dry-run"))
    assert "text.t5=none" in error
    capsys.readouterr()
    assert train("--model", str(model), "--dry-run", "text.t5=none") == 0


def test_a_pipeline_of_another_family_is_named(model, train, capsys):
    changed(model, "model_index.json", _class_name="SanaPipeline")
    error = failing(capsys, train("--model", str(model)))
    assert "a pipeline of Sana" in error
    assert "Stable Diffusion 3 and 3.5" in error
