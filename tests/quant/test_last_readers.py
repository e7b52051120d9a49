"""Layers whose inputs nothing reads after them: their factors may be written over the input, and no
forward may notice.
"""

import pytest
import torch

from qzo_diffusion.core.noise import directions_of_step
from qzo_diffusion.core.parametrize import parametrize
from qzo_diffusion.quant.choose import last_readers
from qzo_diffusion.quant.load import find_scales, quantize_
from tests.small_models import causal_lm, sd3_inputs, sd3_transformer

# Three blocks, the last without a feed-forward of texts; two of medium's have attention to pictures
# alone. What joint attention gives is copied anyway: pictures and texts are two pieces of it.
OVERWRITTEN = {
    "large": 5,
    "medium": 7,
    "sd3": 5,
    "llama": 4,
    "qwen2_tied": 4,
    "opt": 0,
    "gpt_neox": 0,
}


def model_and_inputs(kind):
    if kind in ("large", "medium", "sd3"):
        model = sd3_transformer(kind)
        return model, sd3_inputs(model)
    return causal_lm(kind), {"input_ids": torch.arange(24).view(2, 12)}


def probed(model, inputs, overwriting):
    """The prediction with a direction for every example, and how many layers had their factors
    written over the input.
    """
    scales = find_scales(model)
    names = last_readers(scales) if overwriting else ()
    theta = parametrize(scales, "separable", last_readers=names)
    given, replaced, hooks = {}, [], []
    for name in scales:
        module = model.get_submodule(name)
        hooks.append(
            module.register_forward_pre_hook(
                lambda _, args, name=name: given.update({name: args[0].data_ptr()})
            )
        )
    with (
        torch.no_grad(),
        scales.override(*theta.probes(directions_of_step(0, 0, 2, "rademacher"), [0.1])),
    ):
        for name in scales:
            module = model.get_submodule(name)
            seen = module.register_forward_pre_hook(
                lambda _, args, name=name: (
                    replaced.append(name) if args[0].data_ptr() != given[name] else None
                )
            )
            hooks.append(seen)
        prediction = model(**inputs)[0]
    for hook in hooks:
        hook.remove()
    return prediction, len(scales) - len(replaced)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", OVERWRITTEN)
def test_a_forward_gives_the_same_bits_whether_inputs_are_overwritten(kind, dtype):
    model, inputs = model_and_inputs(kind)
    quantize_(
        model,
        skip=[
            "lm_head",
            "embed_out",
            "proj_out",
            "norm_out",
            "context_embedder",
            "time_text_embed",
        ],
    )
    model.to(dtype)
    inputs = {
        name: one.to(dtype) if one.is_floating_point() and name != "timestep" else one
        for name, one in inputs.items()
    }
    apart, none = probed(model, inputs, overwriting=False)
    together, some = probed(model, inputs, overwriting=True)
    assert torch.equal(apart, together)
    assert (none, some) == (0, OVERWRITTEN[kind])
