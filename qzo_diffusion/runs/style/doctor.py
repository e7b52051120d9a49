"""Check for `qzo-diffuse doctor` that everything for a run is here, and show what it will use."""

import os
import platform
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

from qzo_diffusion import devices, resources
from qzo_diffusion.runs.style.choose_model import choose_model

PACKAGES = (
    *("torch", "torchvision", "diffusers", "transformers", "bitsandbytes", "accelerate"),
    *("open_clip_torch", "safetensors", "numpy", "pillow"),
)
OPTIONAL = "bitsandbytes"  # without it the layers are those of the reference back-end
SMALLEST = "sd35_large_8gb"  # the preset for large models that needs the least memory


def examine() -> dict[str, Any]:
    """Return facts by name; `problems` lists the obstacles to a run."""
    problems: list[str] = []
    versions: dict[str, str] = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            if name != OPTIONAL:
                problems.append(f"the package {name} is not installed: pip install {name}")
    tiny = resources.tiny_model()
    if not (tiny / "transformer").is_dir():
        problems.append(f"the embedded model is missing from {tiny}: install the package again")
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions,
        "memory_gb": round(_memory_bytes() / 1e9, 1),
        "disk_free_gb": round(shutil.disk_usage(Path.cwd()).free / 1e9, 1),
    }
    if "torch" in versions:
        facts |= _torch_facts(problems)
    facts["problems"] = problems
    return facts


def _torch_facts(problems: list[str]) -> dict[str, Any]:
    import torch

    from qzo_diffusion.config.style import Config
    from qzo_diffusion.core.errors import ModelError
    from qzo_diffusion.quant.available import bitsandbytes_problem
    from qzo_diffusion.runs.style import pipeline
    from qzo_diffusion.runs.style.memory import memory_plan, resolve_rows_

    device = devices.choose_device("auto")
    facts: dict[str, Any] = {
        "device": "cpu" if device.type == "cpu" else devices.device_name(device),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "dtype": str(devices.choose_dtype("auto", device)).removeprefix("torch."),
    }
    if devices.others():
        facts["other devices"] = f"{', '.join(devices.others())} (compute.device; never run so far)"
    total = devices.total_bytes(device)
    if total is not None:
        facts["gpu_memory_gb"] = round(total / 1e9, 1)
    if told := devices.unseen_gpu():
        problems.append(told)
    problem = bitsandbytes_problem(device)
    if problem is not None:
        facts["back-end"] = f"reference; {problem}"
    try:
        folder, facts["model"] = choose_model("auto")
        config, runtime = (
            Config(),
            pipeline.Runtime(folder, device, devices.choose_dtype("auto", device)),
        )
        resolve_rows_(config, runtime)  # as a run does
        plan = memory_plan(config, runtime)
        facts["memory_plan"] = plan.facts()
        if not plan.fits:
            problems.append(
                f"a run with default settings does not fit; `train --preset {SMALLEST}` needs "
                f"least:\n{plan.describe()}"
            )
    except ModelError as error:
        problems.append(str(error))
    return facts


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0


def as_text(facts: dict[str, Any]) -> str:
    lines = []
    for key, value in facts.items():
        if key == "packages":
            lines += [f"{name:16} {version}" for name, version in value.items()]
        elif key == "memory_plan":
            for phase, parts in value["phases_gb"].items():
                lines.append(f"memory, {phase:8} {sum(parts.values()):.2f} GB")
        elif key != "problems":
            lines.append(f"{key:16} {value}")
    lines += [f"problem: {problem}" for problem in facts["problems"]] or [
        "everything that a run needs is here"
    ]
    return "\n".join(lines)
