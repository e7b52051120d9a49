"""What a run imports, which takes seconds; `tests/forked.py` forks processes that have it."""

import gc

import bitsandbytes  # noqa: F401
import diffusers
import transformers

import tests.runs.short_run
import tests.train.rank_worker  # noqa: F401

# Libraries that load their parts on first use.
PARTS = [
    diffusers.AutoencoderKL,
    diffusers.FlowMatchEulerDiscreteScheduler,
    diffusers.SD3Transformer2DModel,
    transformers.CLIPTextModelWithProjection,
    transformers.PreTrainedTokenizerFast,
    transformers.T5EncoderModel,
]
gc.freeze()
