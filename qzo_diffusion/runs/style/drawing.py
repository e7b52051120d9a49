"""Everything that draws pictures of some texts: the encoded texts, the decoder, and the transformer
with the base's scales.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from qzo_diffusion.config.style import Config
from qzo_diffusion.core.scales import ScaleSet
from qzo_diffusion.diffusion.encoded_prompt import EncodedPrompt
from qzo_diffusion.diffusion.prompts import Prompt
from qzo_diffusion.diffusion.sampling import Sampler
from qzo_diffusion.diffusion.vae import drop_encoder_
from qzo_diffusion.runs.style import pipeline
from qzo_diffusion.runs.style.levels import for_samples
from qzo_diffusion.runs.style.memory import resolve_drawn_


@dataclass
class Drawing:
    """The parts of a model that make pictures, and the encoded texts.

    sampled: the transformer that samplers call; with `sample.tuned_between` it has the base's
    scales at other noise levels.
    """

    config: Config
    runtime: pipeline.Runtime
    encoded: dict[str, EncodedPrompt]
    vae: nn.Module
    transformer: nn.Module
    scales: ScaleSet
    sampled: nn.Module

    def sampler(self, prompts: Sequence[Prompt]) -> Sampler:
        """Return what draws these prompts, whose texts were encoded."""
        return pipeline.sampler(
            self.config, self.runtime, self.sampled, self.vae, prompts, self.encoded
        )


def load_drawing(config: Config, runtime: pipeline.Runtime, texts: Sequence[str]) -> Drawing:
    """Encode the texts, and the negative prompt of all; then load the rest.

    Raises:
        OutputError: the cache can't be written.
    """
    folder, device = runtime.folder, runtime.device
    resolve_drawn_(config, runtime, len(texts))
    pipeline.tensor_cache(config).check()
    encoder = pipeline.prompt_encoder(config, folder, device, runtime.dtype)
    encoded = encoder.encode([*texts, config.sample.negative_prompt])
    vae = pipeline.load_vae(config, folder, device)
    drop_encoder_(vae)
    transformer, scales = pipeline.load_scales(config, runtime)
    family = pipeline.family_of(config, folder)
    sampled = for_samples(config, family, transformer, scales)
    return Drawing(config, runtime, encoded, vae, transformer, scales, sampled)
