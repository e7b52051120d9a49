"""Models of every architecture that is loaded, small and random, as their libraries save them."""

import torch


def sd3_transformer(kind: str = "large", *, layers: int = 3, seed: int = 0, width: int = 2):
    """The shape of Stable Diffusion 3.5 Large (also Large-Turbo's), Medium (dual attention) or 3.0
    (no norms of q and k).

    Args:
        width: of the hidden states, in heads of 64.
    """
    from diffusers import SD3Transformer2DModel

    settings = {} if kind == "sd3" else {"qk_norm": "rms_norm"}
    if kind == "medium":
        settings["dual_attention_layers"] = (0, 1)
    model = SD3Transformer2DModel(
        sample_size=16,
        num_layers=layers,
        attention_head_dim=64,
        num_attention_heads=width,
        joint_attention_dim=64,
        caption_projection_dim=64 * width,
        pooled_projection_dim=64,
        out_channels=16,
        pos_embed_max_size=12,
        **settings,
    )
    return randomized(model, seed)


def causal_lm(kind: str, seed: int = 0):
    import transformers

    small = {
        "vocab_size": 96,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "pad_token_id": 0,
    }
    if kind == "llama":
        config = transformers.LlamaConfig(**small, intermediate_size=128)
    elif kind == "qwen2_tied":
        config = transformers.Qwen2Config(
            **small, num_key_value_heads=2, intermediate_size=128, tie_word_embeddings=True
        )
    elif kind == "opt":
        config = transformers.OPTConfig(
            **small, ffn_dim=128, word_embed_proj_dim=64, max_position_embeddings=64
        )
    else:
        config = transformers.GPTNeoXConfig(**small, intermediate_size=128)
    return randomized(transformers.AutoModelForCausalLM.from_config(config), seed)


def t5_encoder(seed: int = 0):
    import transformers

    config = transformers.T5Config(
        vocab_size=96,
        d_model=64,
        d_kv=32,
        d_ff=128,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    return randomized(transformers.T5EncoderModel(config), seed)


def randomized(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    return model.eval().requires_grad_(False)


def sd3_inputs(model, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    return {
        "hidden_states": torch.randn(2, config.in_channels, 8, 8, generator=generator),
        "encoder_hidden_states": torch.randn(2, 7, config.joint_attention_dim, generator=generator),
        "pooled_projections": torch.randn(2, config.pooled_projection_dim, generator=generator),
        "timestep": torch.tensor([100.0, 700.0]),
    }
