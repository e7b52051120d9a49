"""Whether bitsandbytes can be used here."""

import torch


def bitsandbytes_problem(device: torch.device) -> str | None:
    """Why its layers can't be used on a device, in words; None where they can."""
    try:
        import bitsandbytes
    except Exception as error:  # a missing library of the system may raise anything
        return f"bitsandbytes can't be imported: {(str(error) or repr(error)).splitlines()[0]}"
    known = getattr(bitsandbytes, "supported_torch_devices", {"cpu", "cuda"})
    if device.type not in known:
        return f"bitsandbytes has no layers for {device.type}"
    return None
