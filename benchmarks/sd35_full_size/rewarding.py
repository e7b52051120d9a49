"""Stage reward: a step on a reward at full size, as Stable Diffusion 3.5 Large Turbo draws its
pictures: four sampling steps without guidance.
"""

import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.full_size.weights import status
from benchmarks.resident import reset_peak
from benchmarks.sd35_full_size.model import batch_of, import_everything, load_model

SIDE, DIRECTIONS = 256, 2
SHIFT = 3.0  # of the model's scheduler


def reward(folder: Path) -> dict[str, Any]:
    """Plain samplings of as many pictures first, then a step, in the same process."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler

    from qzo_diffusion.config.files import make_config, read_yaml
    from qzo_diffusion.core.probing import StepBatch
    from qzo_diffusion.diffusion.families.sd3 import SD3
    from qzo_diffusion.diffusion.pipeline_shape import known_shape
    from qzo_diffusion.resources import shipped
    from qzo_diffusion.rewards.drawing import Drawer
    from qzo_diffusion.rewards.objective import RewardObjective
    from qzo_diffusion.rewards.of_pixels import compressibility
    from qzo_diffusion.rewards.pictures import PictureBatch
    from qzo_diffusion.runs import build
    from qzo_diffusion.train.loop import Setup, train_step_

    import_everything()
    settings = read_yaml(shipped("configs") / "sd35_turbo_reward.yaml")
    settings["reward"]["scores"] = ["compressibility"]
    settings["train"] |= {"micro_batch_size": 1, "lr": 1e-9}
    settings["qzo"] = {"num_directions": DIRECTIONS}
    config = make_config(settings)
    model = load_model(folder, folder / "copies")
    known = known_shape(config.model)
    assert known is not None
    vae = AutoencoderKL.from_config(known.vae.config).eval().requires_grad_(False)
    drawer = Drawer(
        SD3,
        model,
        FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae,
        steps=config.reward.steps or 1,
        guidance=config.reward.guidance or 0.0,
        decoded_at_once=config.reward.decode_at_once,
        dtype=torch.bfloat16,
    )
    drawn = batch_of(model, SIDE)
    encoded = (drawn.prompt_embeds, drawn.pooled)
    batch = PictureBatch(drawn.noise, *encoded, *encoded, ("a picture",))
    objective = RewardObjective(drawer.pictures, compressibility)

    def sample() -> None:
        for _ in range(DIRECTIONS):
            objective(batch)

    objective(batch)
    reset_peak()
    started = time.perf_counter()
    sample()
    sampling, sampling_peak = time.perf_counter() - started, status("VmHWM")
    _, theta = build.scales_and_theta(config, model)
    whole = StepBatch([batch])
    setup = Setup(
        objective,
        lambda _: whole,
        theta,
        build.optimizer(config),
        build.probing(config),
        lambda _: 1e-9,
    )
    reset_peak()
    record = train_step_(setup, whole, 0)
    assert not record.skipped
    peak = status("VmHWM")
    return {
        "reward_step_seconds": round(record.seconds, 2),
        "reward_step_over_sampling": round(record.seconds / sampling, 4),
        "reward_step_peak_rss_gb": round(peak, 3),
        "reward_memory_over_sampling": round(peak / sampling_peak, 4),
        "pictures": DIRECTIONS,
        "sampling_steps": config.reward.steps,
    }
