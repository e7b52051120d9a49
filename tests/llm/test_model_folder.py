"""Language models that lack weights, or are something else, are told before they are loaded."""

import json
import shutil

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

from qzo_diffusion.cli import main
from qzo_diffusion.config.files import make_config
from qzo_diffusion.config.llm import LlmConfig
from qzo_diffusion.core.errors import ModelError
from qzo_diffusion.llm.causal_lm import load_causal_lm
from qzo_diffusion.llm.model_folder import check_model_folder
from qzo_diffusion.quant.gguf_header import is_gguf
from qzo_diffusion.runs.llm.methods import load_base
from tests.conftest import failing
from tests.llm.gguf_files import write_gguf
from tests.tiny_llama import save_tiny_llama, tiny_llama, write_sentences

CPU = torch.device("cpu")
ALL_METHODS = ["qzo", "mezo", "quzo", "quzo-lora", "fo-scales", "qlora"]


@pytest.fixture
def folder(tmp_path):
    return save_tiny_llama(tmp_path / "model")


def change(folder, **values):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def retold(folder, edit):
    """Its weights after `edit` changed the dictionary of them."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, {"format": "pt"})


def drop(inside):
    def edit(tensors):
        for name in [name for name in tensors if inside in name]:
            del tensors[name]

    return edit


def load(folder, method):
    config = make_config({"model": str(folder), "method": method, "task": "sst2"}, LlmConfig)
    return load_base(config, folder, CPU, torch.float32)


@pytest.mark.parametrize("method", ALL_METHODS)
def test_weights_that_are_missing_are_refused_by_every_method(folder, method):
    retold(folder, drop("layers.1.mlp"))
    with pytest.raises(ModelError, match="3 tensors of the model are not in its files"):
        load(folder, method)


@pytest.mark.parametrize("method", ["qzo", "mezo"])
def test_no_run_folder_is_left_for_a_model_that_lacks_weights(folder, tmp_path, capsys, method):
    retold(folder, drop("norm"))
    data = write_sentences(tmp_path / "data")
    command = ["llm", "train", "--task", "sst2", "--model", str(folder), "--data-dir", str(data)]
    code = main([*command, "--method", method, "--output-dir", str(tmp_path / "run")])
    assert "not in its files" in failing(capsys, code)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", ["mezo", "quzo-lora"])
def test_weights_of_another_shape_are_refused(folder, method):
    name = "model.layers.0.mlp.up_proj.weight"
    retold(folder, lambda tensors: tensors.update({name: torch.zeros(64, 64)}))
    with pytest.raises(ModelError, match="up_proj"):
        load(folder, method)


@pytest.mark.parametrize("method", ["qzo", "mezo", "quzo-lora"])
def test_a_scale_beside_a_weight_of_other_bits_is_refused(folder, method):
    name = "model.layers.0.mlp.up_proj.weight_scale"
    retold(folder, lambda tensors: tensors.update({name: torch.ones(1)}))
    with pytest.raises(ModelError, match="up_proj"):
        load(folder, method)


@pytest.mark.parametrize("method", ["mezo", "quzo-lora"])
def test_fp8_weights_are_multiplied_for_methods_that_read_whole_models(folder, method):
    name = "model.layers.0.mlp.up_proj"
    scale = torch.tensor(0.25)
    weight = torch.ones(128, 64).to(torch.float8_e4m3fn)
    retold(folder, lambda t: t.update({f"{name}.weight": weight, f"{name}.weight_scale": scale}))
    model = load_causal_lm(folder, torch.float32).model
    assert torch.equal(model.get_submodule(name).weight, torch.full((128, 64), 0.25))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    load(folder, method)


def test_more_layers_than_the_config_has_are_refused(folder):
    change(folder, num_hidden_layers=1)
    for method in ("qzo", "mezo"):
        with pytest.raises(ModelError, match="a layer that the model's config does not have"):
            load(folder, method)


def test_a_tied_head_need_not_be_in_the_files(folder):
    assert not any("lm_head" in name for name in load_file(folder / "model.safetensors"))
    assert load(folder, "mezo").codes == "unquantized"


@pytest.mark.parametrize("method", ["qzo", "mezo"])
def test_a_file_of_a_variant_is_read(folder, method):
    (folder / "model.safetensors").rename(folder / "model.fp16.safetensors")
    load(folder, method)


def write_part(path, monkeypatch, skipped="blk.1", count=2):
    """One part of a file that llama.cpp split in two."""
    add, begin = gguf.GGUFWriter.add_tensor, gguf.GGUFWriter.write_header_to_file

    def add_some(writer, name, *arguments, **options):
        if not name.startswith(skipped):
            add(writer, name, *arguments, **options)

    def begin_part(writer, *arguments, **options):
        writer.add_uint16("split.no", 0)
        writer.add_uint16("split.count", count)
        begin(writer, *arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(gguf.GGUFWriter, "add_tensor", add_some)
        patched.setattr(gguf.GGUFWriter, "write_header_to_file", begin_part)
        write_gguf(path, tiny_llama())
    return path


def test_a_part_of_a_split_file_names_the_merge(tmp_path, monkeypatch):
    part = write_part(tmp_path / "m-00001-of-00002.gguf", monkeypatch)
    with pytest.raises(ModelError, match=r"part 1 of 2[\s\S]*llama-gguf-split --merge"):
        check_model_folder(part)


def test_a_file_in_one_part_that_lacks_tensors_is_refused(tmp_path, monkeypatch):
    part = write_part(tmp_path / "m.gguf", monkeypatch, count=1)
    with pytest.raises(ModelError, match="tensors of the model are not in its files"):
        load_causal_lm(part, torch.float32)


def test_a_gguf_file_may_be_called_anything(tmp_path):
    write_gguf(tmp_path / "blob", tiny_llama())
    (tmp_path / "MODEL.GGUF").symlink_to(tmp_path / "blob")
    for name in ("blob", "MODEL.GGUF"):
        assert is_gguf(tmp_path / name)
        check_model_folder(tmp_path / name)


def test_a_gguf_file_of_pictures_is_named(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "sd3.gguf", "sd3")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ModelError, match=r"a diffusion model \(sd3\)"):
        check_model_folder(tmp_path / "sd3.gguf")


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"model_type": "gpt2"}, "Conv1D"),
        ({"model_type": "openai-gpt"}, "Conv1D"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "an encoder and a decoder"),
        ({"model_type": "", "_class_name": "FluxTransformer2DModel"}, "FluxTransformer2DModel"),
        ({"num_hidden_layers": 10**7}, "num_hidden_layers = 10000000"),
        ({"max_position_embeddings": 2**60}, "max_position_embeddings"),
    ],
)
def test_a_folder_of_another_kind_is_named(folder, values, told):
    change(folder, **values)
    with pytest.raises(ModelError, match=told):
        check_model_folder(folder)


def test_folders_without_a_model_say_what_they_are(folder, tmp_path):
    pipeline = shutil.copytree(folder, tmp_path / "pipeline")
    (pipeline / "model_index.json").write_text("{}")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    for place, told in (
        (pipeline, "a pipeline that makes pictures"),
        (adapter, "a LoRA"),
        (folder, "pickles only"),
    ):
        with pytest.raises(ModelError, match=told):
            check_model_folder(place)
