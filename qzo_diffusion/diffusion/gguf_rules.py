"""What ComfyUI expects of a GGUF file of a family of pictures."""

from dataclasses import dataclass


@dataclass(frozen=True)
class GgufRules:
    """architecture: the text under `general.architecture`. kept: how the original names of tensors
    begin that ComfyUI-GGUF's tools never quantize.
    """

    architecture: str
    kept: tuple[str, ...]


SD3 = GgufRules(
    "sd3",
    ("final_layer.", "context_embedder.", "t_embedder.", "y_embedder.", "x_embedder.", "pos_embed"),
)
