"""Layouts of other quantizers are refused by name."""

import json

import pytest

from qzo_diffusion.core.errors import ModelError
from qzo_diffusion.diffusion.transformer import NOT_READ, find_transformer
from tests.small_models import sd3_transformer


def test_a_folder_of_a_quantizer_that_is_not_read_is_named(tmp_path):
    sd3_transformer().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    assert find_transformer(tmp_path).config["num_layers"] == 3
    for method in NOT_READ:
        file.write_text(json.dumps(config | {"quantization_config": {"quant_method": method}}))
        with pytest.raises(ModelError, match=f"that {method} quantized"):
            find_transformer(tmp_path)
