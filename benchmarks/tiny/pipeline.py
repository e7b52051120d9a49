"""The embedded model's parts put together: the trainable denoiser with its text encoders, and the
diffusers pipeline.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, StableDiffusion3Pipeline
from torch import Tensor, nn
from transformers import CLIPTokenizer, T5TokenizerFast

from benchmarks.tiny.architecture import (
    CLIP_G_WIDTH,
    CLIP_L_WIDTH,
    PROMPT_TOKENS,
    T5_WIDTH,
    build_clip,
    build_scheduler,
    build_t5,
    build_transformer,
)
from benchmarks.tiny.vocabulary import build_clip_tokenizer, build_t5_tokenizer


class TextToVelocity(nn.Module):
    """Transformer and text encoders, trained as one: prompts as ids -> velocity.

    captions: all that it will be taught; its tokenizers know their words."""

    def __init__(self, captions: list[str]) -> None:
        super().__init__()
        self.clip_tokenizer: CLIPTokenizer = build_clip_tokenizer(captions)
        self.t5_tokenizer: T5TokenizerFast = build_t5_tokenizer(captions)
        ids = {
            "vocabulary": len(self.clip_tokenizer),
            "bos": self.clip_tokenizer.bos_token_id,
            "eos": self.clip_tokenizer.eos_token_id,
        }
        self.text_encoder = build_clip(CLIP_L_WIDTH, 1, 2, "quick_gelu", **ids)
        self.text_encoder_2 = build_clip(CLIP_G_WIDTH, 2, 2, "gelu", **ids)
        self.text_encoder_3 = build_t5(len(self.t5_tokenizer))
        self.transformer = build_transformer()
        # a buffer of sines, never trained
        self.transformer.pos_embed.pos_embed.requires_grad_(False)

    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """CLIP and T5 ids [B, PROMPT_TOKENS], as the pipeline makes them."""
        options = {
            "padding": "max_length",
            "max_length": PROMPT_TOKENS,
            "truncation": True,
            "return_tensors": "pt",
        }
        return (
            self.clip_tokenizer(list(prompts), **options).input_ids,
            self.t5_tokenizer(list(prompts), **options).input_ids,
        )

    def encode(self, clip_ids: Tensor, t5_ids: Tensor) -> tuple[Tensor, Tensor]:
        """What StableDiffusion3Pipeline.encode_prompt returns for one prompt: embeddings and pooled
        embedding.
        """
        outputs = [
            encoder(clip_ids, output_hidden_states=True)
            for encoder in (self.text_encoder, self.text_encoder_2)
        ]
        clip = torch.cat([out.hidden_states[-2] for out in outputs], dim=-1)
        pooled = torch.cat([out.text_embeds for out in outputs], dim=-1)
        t5 = self.text_encoder_3(t5_ids)[0]
        return torch.cat([F.pad(clip, (0, T5_WIDTH - clip.shape[-1])), t5], dim=-2), pooled

    def forward(self, noisy: Tensor, sigma: Tensor, clip_ids: Tensor, t5_ids: Tensor) -> Tensor:
        embeddings, pooled = self.encode(clip_ids, t5_ids)
        return self.transformer(
            hidden_states=noisy,
            timestep=1000 * sigma,
            encoder_hidden_states=embeddings,
            pooled_projections=pooled,
            return_dict=False,
        )[0]


def scaled_latents(vae: AutoencoderKL, images: Tensor, batch: int = 32) -> Tensor:
    """Latents [N, 16, 8, 8] of uint8 images [N, 3, 64, 64] in the units that the denoiser sees."""
    with torch.no_grad():
        parts = [
            vae.encode(part.float() / 127.5 - 1).latent_dist.mean for part in images.split(batch)
        ]
    return (torch.cat(parts) - vae.config.shift_factor) * vae.config.scaling_factor


def assemble(vae: AutoencoderKL, model: TextToVelocity, shift: float) -> StableDiffusion3Pipeline:
    return StableDiffusion3Pipeline(
        transformer=model.transformer,
        scheduler=build_scheduler(shift),
        vae=vae,
        text_encoder=model.text_encoder,
        tokenizer=model.clip_tokenizer,
        text_encoder_2=model.text_encoder_2,
        tokenizer_2=model.clip_tokenizer,
        text_encoder_3=model.text_encoder_3,
        tokenizer_3=model.t5_tokenizer,
    )
