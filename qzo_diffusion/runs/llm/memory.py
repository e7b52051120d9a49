"""Estimate the memory of a language run from configs and headers alone.

The factors of a forward pass fit decoders with a gated feed-forward. The total is an upper
estimate, since a batch is rarely as long as the longest text.
"""

from pathlib import Path
from typing import Any

import torch

from qzo_diffusion.config.llm import FIRST_ORDER, LlmConfig
from qzo_diffusion.diffusion import memory
from qzo_diffusion.diffusion.memory import LIBRARIES, MemoryPlan, ModelSize, Phase
from qzo_diffusion.llm.causal_lm import WORDS_AT_ONCE
from qzo_diffusion.llm.stored import empty_causal_lm, stored_method
from qzo_diffusion.quant.gguf_header import is_gguf
from qzo_diffusion.quant.weights import read_entries
from qzo_diffusion.runs import build

CHARACTERS = 3  # the fewest in a token of English
HIDDEN_STATES, FEED_FORWARDS = 8, 3  # tensors of all tokens at the peak of a block
UNQUANTIZED = ("mezo", "quzo-lora")


def memory_plan(
    config: LlmConfig, folder: Path, device: torch.device, dtype: torch.dtype, longest: int
) -> str:
    """Return the phases of a run in GB, as lines for the plan.

    Args:
        longest: the number of characters of the longest text.
    """
    if config.method in FIRST_ORDER:
        return f"memory    not planned for method {config.method}, which keeps activations"
    if is_gguf(folder):
        return f"memory    weights {folder.stat().st_size / 1e9:.2f} GB in the file, and a forward"
    phases = _phases(config, folder, device, dtype, longest)
    return MemoryPlan(phases, device.type, memory.available_bytes(device)).describe()


def _phases(
    config: LlmConfig, folder: Path, device: torch.device, dtype: torch.dtype, longest: int
) -> list[Phase]:
    entries, model = read_entries(folder), empty_causal_lm(folder, dtype)
    size = ModelSize.of(model, build.quantization(config.quant), dtype)
    as_stored = stored_method(folder) is not None or config.method in UNQUANTIZED
    weights = memory.stored_bytes(entries, dtype) if as_stored else size.weights
    if stored_method(folder) is not None:
        weights = float(sum(entry.nbytes for entry in entries.values()))
    base = {"libraries": LIBRARIES[device.type], "weights": weights}
    reading = memory.reading_bytes(entries, dtype, device.type, size.largest)
    level, optimizer, bits = (
        config.qzo.parametrization,
        config.train.optimizer,
        config.train.state_bits,
    )
    state = 0.0 if optimizer == "feedback" else memory.trained_bytes(size, level, optimizer, bits)
    forward = {
        "forward": _forward(config, model.config, longest, dtype) + size.largest * dtype.itemsize,
        "overrides": memory.override_bytes(
            size, "codes" if config.trains_codes else level, device.type
        ),
        "trained": state,
    }
    return [Phase("load", base | {"reading": reading}), Phase("train", base | forward)]


def _forward(config: LlmConfig, model: Any, longest: int, dtype: torch.dtype) -> float:
    """Return the bytes of hidden states of a forward pass, and of logits of one piece of the
    vocabulary.
    """
    wanted = config.data.max_tokens or longest // CHARACTERS
    tokens = min(wanted, getattr(model, "max_position_embeddings", wanted))
    rows = build.micro_batch_size(config, config.data.batch_size) * build.probes_at_once(config)
    wide = getattr(model, "intermediate_size", 4 * model.hidden_size)
    numbers = HIDDEN_STATES * model.hidden_size + FEED_FORWARDS * wide
    return rows * tokens * numbers * dtype.itemsize + 4.0 * rows * min(
        WORDS_AT_ONCE, model.vocab_size
    )
