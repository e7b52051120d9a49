"""Stable Diffusion 3.5 as configs and headers of full size, with not one weight."""

import json

import torch

CPU = torch.device("cpu")


BASE = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "attention_head_dim": 64,
    "qk_norm": "rms_norm",
}


BASE |= {"joint_attention_dim": 4096, "pooled_projection_dim": 2048}


LARGE = BASE | {
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "pos_embed_max_size": 192,
}


MEDIUM = BASE | {
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 384,
}


MEDIUM |= {"dual_attention_layers": list(range(13))}


CLIP_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
}


CLIP_G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
}


T5 = {
    "model_type": "t5",
    "d_model": 4096,
    "d_ff": 10240,
    "d_kv": 64,
    "num_heads": 64,
    "num_layers": 24,
    "vocab_size": 32128,
}
TWICE = {
    "sd3.5_large.safetensors",
    "text_encoders/clip_g.safetensors",
    "text_encoders/t5xxl_fp16.safetensors",
}


def hollow(folder, config, make_empty, stem="model"):
    """A part as it is on disk, of the right length and with no content: a file of holes takes no
    room.
    """
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    header, end = {}, 0
    for name, tensor in make_empty().state_dict().items():
        size = tensor.numel() * 2
        header[name] = {
            "dtype": "BF16",
            "shape": list(tensor.shape),
            "data_offsets": [end, end + size],
        }
        end += size
    text = json.dumps(header).encode()
    with (folder / f"{stem}.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
