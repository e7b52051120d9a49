"""What the node needs of ComfyUI: its model object, and quantized linears of its loaders, in a
network with the names of Stability AI's layout.
"""

import torch
import torch.nn.functional as F
from torch import nn

from qzo_diffusion.diffusion.families.sd3_layout import SD3_LAYOUT, layout_of
from qzo_diffusion.diffusion.original_layout import PREFIX
from qzo_diffusion.quant.bnb import quantized_layer
from qzo_diffusion.quant.weights import Pending


class ModelPatcher:
    """The methods of ComfyUI's `ModelPatcher` that a node calls; clones share the model."""

    def __init__(self, model, options=None):
        self.model, self.model_options = model, dict(options or {})

    def clone(self):
        return ModelPatcher(self.model, self.model_options)

    def set_model_unet_function_wrapper(self, wrapper):
        self.model_options["model_function_wrapper"] = wrapper

    @torch.no_grad()
    def predict(self, x, sigma, **conditions):
        """What a sampler does at a noise level; `sigma` [B]."""
        call = {"input": x, "timestep": sigma, "c": conditions, "cond_or_uncond": [0]}
        wrapper = self.model_options.get("model_function_wrapper")
        if wrapper is None:
            return self.model.apply_model(x, sigma, **conditions)
        return wrapper(self.model.apply_model, call)


class BaseModel:
    def __init__(self, network):
        self.diffusion_model = network

    def apply_model(self, x, t, **conditions):
        return self.diffusion_model(x, t, **conditions)


class Nf4Linear(nn.Module):
    """A linear of the NF4 loader: it has a `Params4bit` and no sizes of its own."""

    def __init__(self, weight, bias):
        super().__init__()
        made = quantized_layer(weight, None, "nf4", 64)
        self.weight, self.bias = made.weight, bias

    def forward(self, x):
        import bitsandbytes

        state = self.weight.quant_state
        return bitsandbytes.matmul_4bit(x, self.weight.t(), bias=self.bias, quant_state=state)

    def dequantized(self):
        import bitsandbytes

        state = self.weight.quant_state
        return bitsandbytes.functional.dequantize_4bit(self.weight.data, state)


class GGMLTensor(torch.Tensor):
    """The raw bytes of a GGUF tensor; it says that it has the shape of its weight."""

    @property
    def shape(self):
        return self.tensor_shape


class GgufLinear(nn.Module):
    """A linear of ComfyUI-GGUF."""

    def __init__(self, weight, bias, kind="Q4_0"):
        super().__init__()
        import gguf

        of_kind = gguf.GGMLQuantizationType[kind]
        data = torch.from_numpy(gguf.quants.quantize(weight.numpy(), of_kind))
        self.weight = data.as_subclass(GGMLTensor)
        self.weight.tensor_type, self.weight.tensor_shape = of_kind, torch.Size(weight.shape)
        self.bias = bias

    def dequantized(self):
        import gguf

        raw = self.weight.as_subclass(torch.Tensor).numpy()
        return torch.from_numpy(gguf.quants.dequantize(raw, self.weight.tensor_type))

    def forward(self, x):
        return F.linear(x, self.dequantized(), self.bias)


class Rows(nn.Module):
    """One of diffusers' linears: some outputs of a joint one."""

    def __init__(self, joint, at, count, swapped):
        super().__init__()
        self._joint, self._at, self._count, self._swapped = [joint], at, count, swapped

    def forward(self, x):
        whole = self._joint[0](x)
        if self._swapped:
            whole = torch.cat(whole.chunk(2, -1)[::-1], -1)
        return whole.chunk(self._count, -1)[self._at]


class Network(nn.Module):
    """`model`, of diffusers, with its quantizable linears in the layers of ComfyUI."""

    def __init__(self, model, names, linear):
        """names: of the linears to put into layers of the class `linear`."""
        super().__init__()
        self._model = [model]  # hidden, so that only ComfyUI's names are found
        tensors = SD3_LAYOUT.to_original(
            {name: Pending.of(one) for name, one in model.state_dict().items()}, model.config
        )
        for original, pieces in layout_of(model.config).items():
            layer, _, kind = original.rpartition(".")
            parts = [piece.removesuffix(".weight") for piece in pieces.names]
            if kind != "weight" or not set(parts) <= set(names):
                continue
            joint = linear(
                *(tensors[f"{PREFIX}{layer}.{part}"].make() for part in ("weight", "bias"))
            )
            self._put(layer, joint)
            for at, part in enumerate(parts):
                parent, _, child = part.rpartition(".")
                rows = Rows(joint, at, len(parts), pieces.swapped)
                setattr(model.get_submodule(parent), child, rows)

    def _put(self, name, module):
        here, (*parents, last) = self, name.split(".")
        for parent in parents:
            if not hasattr(here, parent):
                here.add_module(parent, nn.Module())
            here = getattr(here, parent)
        here.add_module(last, module)

    def forward(self, x, sigma, context, y):
        return self._model[0](
            hidden_states=x,
            timestep=1000 * sigma,
            encoder_hidden_states=context,
            pooled_projections=y,
        ).sample
