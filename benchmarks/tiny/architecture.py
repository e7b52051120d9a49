"""The parts of the embedded model: SD3.5's own shape, under 40 MB in bf16.

Every linear layer that is quantized takes a multiple of 256 numbers, so that block formats of 256
(K-quants) fit; `context_embedder`, which takes the text's 192, is none of them.
"""

from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

# CLIP and T5 each; at 64 px there are only 16 image tokens, so text must be short
PROMPT_TOKENS = 16
PATCH, LATENT_CHANNELS = 8, 16
LATENT_SHIFT, LATENT_SCALE = 0.0609, 1.5305  # Stable Diffusion 3.5's own units
CLIP_L_WIDTH, CLIP_G_WIDTH, T5_WIDTH = 64, 128, 192


def build_vae() -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 64, 64, 128),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        shift_factor=LATENT_SHIFT,
        scaling_factor=LATENT_SCALE,
        norm_num_groups=8,  # never one channel per group: instance norm forgets flat colours
        sample_size=64,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def build_transformer() -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=4,
        attention_head_dim=64,
        num_attention_heads=4,
        joint_attention_dim=T5_WIDTH,
        caption_projection_dim=256,
        pooled_projection_dim=CLIP_L_WIDTH + CLIP_G_WIDTH,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
    )


def build_clip(
    width: int, heads: int, layers: int, act: str, vocabulary: int, bos: int, eos: int
) -> CLIPTextModelWithProjection:
    """`eos` must not be 2: transformers then looks for the highest id instead of the end of the
    sentence.
    """
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=PROMPT_TOKENS,
        hidden_act=act,
        bos_token_id=bos,
        eos_token_id=eos,
        pad_token_id=eos,
    )
    return CLIPTextModelWithProjection(config)


def build_t5(vocabulary: int) -> T5EncoderModel:
    config = T5Config(
        vocab_size=vocabulary,
        pad_token_id=0,
        eos_token_id=1,
        d_model=T5_WIDTH,
        d_kv=64,
        d_ff=256,
        num_layers=1,
        num_heads=3,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        tie_word_embeddings=False,
    )
    return T5EncoderModel(config)


def build_scheduler(shift: float = 3.0) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift)
