"""Models of human preference that are a CLIP with other weights: PickScore (arXiv 2305.01569) and
HPSv2 (arXiv 2306.09341), from a folder in transformers' format.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from qzo_diffusion.core.errors import ModelError

# name -> repository with safetensors, and whether the score is times the model's own logit scale
PREFERENCES = {
    "pickscore": ("yuvalkirstain/PickScore_v1", True),
    "hpsv2": ("adams-story/HPSv2-hf", False),
}
WEIGHTS = "model.safetensors"
AT_ONCE = 8  # pictures of a forward pass


class Preference:
    """The match of a picture and its prompt, by a CLIP that learnt what people prefer.

    Args:
        model, processor: `CLIPModel` and `CLIPProcessor` of transformers.
        scaled: whether the cosine is times the model's logit scale.
    """

    def __init__(self, model: Any, processor: Any, scaled: bool) -> None:
        self._model, self._processor = model.eval().requires_grad_(False), processor
        self._factor = float(model.logit_scale.exp()) if scaled else 1.0

    @classmethod
    def load(cls, folder: Path, scaled: bool, device: torch.device) -> "Preference":
        """Raises ModelError where the folder lacks something; pickles are not read."""
        from transformers import CLIPModel, CLIPProcessor

        try:
            options: dict[str, Any] = {"local_files_only": True}
            model = CLIPModel.from_pretrained(
                folder, use_safetensors=True, dtype=torch.float32, **options
            )
            processor = CLIPProcessor.from_pretrained(folder, **options)
        except Exception as error:  # transformers raises many kinds
            raise ModelError(
                f"{folder} can't be loaded: {str(error).splitlines()[0]}",
                "a CLIP of transformers with its processor, in safetensors",
                "download it again",
            ) from None
        return cls(model.to(device), processor, scaled)

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        found: list[float] = []
        for start in range(0, len(pictures), AT_ONCE):
            part = slice(start, start + AT_ONCE)
            inputs = self._processor(
                text=list(prompts[part]),
                images=[picture.convert("RGB") for picture in pictures[part]],
                return_tensors="pt",
                padding=True,
                truncation=True,
            ).to(self._model.device)
            out = self._model(**inputs)
            cosines = (out.image_embeds * out.text_embeds).sum(1)
            found += (self._factor * cosines.double()).tolist()
        return found
