"""The number formats that devices lack."""

import torch
from torch import Tensor

WITHOUT_FLOAT64 = {"mps"}  # Apple's GPUs


def where_float64_is(tensor: Tensor) -> Tensor:
    """The tensor on its own device, or on the CPU where that device has no float64."""
    return tensor.cpu() if tensor.device.type in WITHOUT_FLOAT64 else tensor


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device computes in bfloat16 itself. GPUs before Ampere, such as the T4, do not:
    torch emulates it there, slowly.
    """
    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        one = torch.ones(1, dtype=torch.bfloat16, device=device)
        return bool((one + one).float().item() == 2)
    except (RuntimeError, TypeError):
        return False
