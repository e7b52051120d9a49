"""A causal language model of transformers, read from a folder: it gives log-probabilities of chosen
tokens, and greedy answers.

Batches are padded on the right and need no mask: a position of a causal model never sees later
positions. The vocabulary is large (49,152 for SmolLM2, 128,256 for Llama 3). So logits are computed
only at the positions that a loss needs, and if possible only for its tokens. Both are fp32 for
every dtype of the model: a bfloat16 logit of 20 moves in steps of 0.125.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qzo_diffusion.core.errors import ModelError, QzoError
from qzo_diffusion.llm.gguf_file import load_gguf, source_of
from qzo_diffusion.llm.model_folder import check_model_folder
from qzo_diffusion.llm.prefix import Prefix, find_prefix
from qzo_diffusion.llm.stored import READ_HERE, empty_causal_lm, load_stored, stored_method
from qzo_diffusion.quant.entries import all_finite
from qzo_diffusion.quant.fits import check_loaded
from qzo_diffusion.quant.gguf_header import is_gguf
from qzo_diffusion.quant.stream import fill_
from qzo_diffusion.quant.weights import read_entries, weight_files

WORDS_AT_ONCE = 2**13  # rows of the vocabulary that are fp32 at the same time
OUTPUT_HEAD = "lm_head"
CHANGES_LOGITS = (
    "final_logit_softcapping",
    "logits_soft_cap",
    "logit_scale",
    "logits_scaling",
    "lm_head_multiplier",
)


class OutputHead(nn.Linear):
    """The model's last layer over the same weight. With `tokens` it computes the logits of those
    tokens alone.
    """

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias

    def forward(
        self, hidden: Tensor, tokens: Tensor | None = None, normalize: bool = False
    ) -> Tensor:
        """Map hidden [..., D] to logits [..., V].

        With tokens [..., C] it gives fp32 logits [..., C], or log-probabilities with `normalize`.
        """
        if tokens is None:
            return F.linear(hidden, self.weight, self.bias)
        wide = hidden.float()
        logits = (self.weight[tokens].float() @ wide.unsqueeze(-1)).squeeze(-1)
        if self.bias is not None:
            logits = logits + self.bias[tokens].float()
        return logits - self._log_normalizer(wide).unsqueeze(-1) if normalize else logits

    def _log_normalizer(self, hidden: Tensor) -> Tensor:
        parts = []
        for start in range(0, self.out_features, WORDS_AT_ONCE):
            words = slice(start, start + WORDS_AT_ONCE)
            bias = None if self.bias is None else self.bias[words].float()
            parts.append(torch.logsumexp(F.linear(hidden, self.weight[words].float(), bias), -1))
        return torch.logsumexp(torch.stack(parts), 0)


class CausalLm:
    """The model, its tokenizer, and the most tokens that it reads.

    `prefix` is the part of the model that no probe changes. It is set once the trained layers are
    known.

    Raises:
        ModelError: the last layer is not a plain linear, or its logits are changed after it.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.prefix: Prefix | None = None
        config = self.model.config
        head = self.model.get_output_embeddings()
        changed = [
            name for name in CHANGES_LOGITS if getattr(config, name, None) not in (None, 1, 1.0)
        ]
        if type(head) is not nn.Linear or changed:
            raise ModelError(
                f"{type(model).__name__} with {', '.join(changed) or type(head).__name__} at "
                "its end",
                "a model whose logits are those of a plain, unquantized linear layer",
                "use another model, or leave its last layer unquantized",
            )
        self.head = OutputHead(head)
        self.model.set_output_embeddings(self.head)
        self.model.generation_config = self._greedy()
        self.context: int = getattr(config, "max_position_embeddings", 2**31)

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    @property
    def bytes_of_token(self) -> int:
        """The bytes of a hidden state of one token."""
        return int(self.head.in_features * self.head.weight.dtype.itemsize)

    @property
    def vocabulary(self) -> int:
        """The number of tokens that have both an embedding and a logit."""
        return int(min(self.model.get_input_embeddings().num_embeddings, self.head.out_features))

    @property
    def padding(self) -> int:
        """A token for padding. Nothing reads it, but the model must have an embedding for it.

        Some tokenizers pad with an added token that the model has no embedding for.
        """
        wanted = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id)
        return next(
            (
                int(token)
                for token in wanted
                if token is not None and token < self.head.out_features
            ),
            0,
        )

    def _greedy(self) -> Any:
        """The model's own settings on where an answer ends, without those that change the choice of
        tokens.

        Penalties and beams would change greedy answers too.
        """
        from transformers import GenerationConfig

        given = self.model.generation_config
        return GenerationConfig(
            eos_token_id=getattr(given, "eos_token_id", None), pad_token_id=self.padding
        )

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text)["input_ids"]
        return ids

    def part_before_(self, trained: Iterable[str]) -> None:
        """Separate the blocks before the first of the trained layers, if the model allows it."""
        self.prefix = find_prefix(self.model, self.model.base_model, trained, self.device)

    def score(
        self,
        ids: Tensor,
        positions: Tensor,
        tokens: Tensor,
        *,
        normalize: bool = True,
        probes_per_forward: int = 1,
        hidden: Tensor | None = None,
    ) -> Tensor:
        """Return the log-probability of each of `tokens` after the text up to a position; fp32 [R,
        P].

        Args:
            ids: [R, T], padded on the right.
            positions: [R, P] or [R, 1], the last token that is read.
            tokens: [R, P].
            normalize: False gives logits. Their differences at one position are those of
                log-probabilities.
            probes_per_forward: how often `ids` holds the same rows: all of them, then all again.
            hidden: the output of `prefix` for these rows, if it is known.
        """
        last = self._last_hidden(ids, probes_per_forward, hidden)
        chosen = last.gather(1, positions.unsqueeze(-1).expand(-1, -1, last.shape[-1]))
        if positions.shape == tokens.shape:
            scores: Tensor = self.head(chosen, tokens.unsqueeze(-1), normalize).squeeze(-1)
        else:
            scores = self.head(chosen.squeeze(1), tokens, normalize)
        return scores

    def _last_hidden(self, ids: Tensor, probes_per_forward: int, hidden: Tensor | None) -> Tensor:
        if hidden is None and probes_per_forward > 1 and self.prefix is not None:
            hidden = self.prefix.before(ids[: len(ids) // probes_per_forward]).repeat(
                probes_per_forward, 1, 1
            )
        if hidden is not None:
            assert self.prefix is not None
            return self.prefix.after(ids, hidden)
        last: Tensor = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        return last

    @torch.no_grad()
    def answers(self, ids: Tensor, mask: Tensor, max_tokens: int, stop: str) -> list[str]:
        """Continue each prompt greedily, up to `stop`, or up to the model's last position.

        Args:
            ids: [B, T], padded on the left, with 1 in `mask` where there is text.
            max_tokens: the most tokens of an answer.
        """
        lengths = mask.sum(1)
        room = (self.context - lengths).clamp(1, max_tokens)
        texts = [""] * len(ids)
        for count in sorted(set(room.tolist())):
            # one by one, so that a longer prompt does not shorten the answer to another
            rows = (room == count).nonzero().flatten()
            width = int(lengths[rows].max())
            said = self._said(ids[rows, -width:], mask[rows, -width:], count, stop)
            for row, text in zip(rows.tolist(), said, strict=True):
                texts[row] = text
        return texts

    def _said(self, ids: Tensor, mask: Tensor, max_tokens: int, stop: str) -> list[str]:
        said = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_tokens,
            do_sample=False,
            stop_strings=[stop] if stop else None,
            tokenizer=self.tokenizer,
        )
        texts = self.tokenizer.batch_decode(said[:, ids.shape[1] :], skip_special_tokens=True)
        return [text.split(stop)[0].strip() if stop else text.strip() for text in texts]


def load_causal_lm(
    folder: Path, dtype: torch.dtype, read: Callable[[Path], Any] | None = None
) -> CausalLm:
    """Load the model of a local folder on the CPU. Quantized weights stay quantized.

    Args:
        read: replaces the way in which the model of the folder is built.

    Raises:
        ModelError: files are missing or damaged, or the model is not a causal LM.
    """
    check_model_folder(folder)
    try:
        tokenizer = load_tokenizer(folder)
        if read is not None:
            model = read(folder)
        elif is_gguf(folder):
            model = load_gguf(folder, dtype)
        elif stored_method(folder) in READ_HERE:
            model = load_stored(folder, dtype)
        else:
            model = _by_transformers(folder, dtype)
    except QzoError:
        raise
    except Exception as error:
        raise _damaged(folder, error) from error
    _check_finite(folder, model)
    model.requires_grad_(False)
    return CausalLm(model.eval(), tokenizer)


def _check_finite(folder: Path, model: Any) -> None:
    """Check that all weights and scales are finite; otherwise every loss would be NaN. Raises
    ModelError.
    """
    wrong = [
        name
        for name, tensor in model.state_dict().items()
        if isinstance(tensor, Tensor) and not tensor.is_meta and not all_finite(tensor)
    ]
    if wrong:
        raise ModelError(
            f"{folder}: {wrong[0]} holds numbers that are not finite",
            "a language model with finite weights",
            "download it again",
        )


def _by_transformers(folder: Path, dtype: torch.dtype) -> Any:
    """Load a folder by transformers. Raises ModelError for a missing tensor, which transformers
    would draw at random.
    """
    from transformers import AutoModelForCausalLM

    entries = read_entries(folder)
    if stored_method(folder) is None and any(entry.scale for entry in entries.values()):
        # transformers would drop the scales
        scaled = empty_causal_lm(folder, dtype)
        fill_(scaled, entries, None, dtype=dtype, device=torch.device("cpu"))
        return scaled
    names = [file.name.split(".") for file in weight_files(folder)]
    variant = names[0][1] if len(names[0]) == 3 else None  # model.fp16.safetensors
    model, facts = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=False,
        variant=variant,
        ignore_mismatched_sizes=True,  # refused below, by name
        output_loading_info=True,
    )
    check_loaded(model, facts)
    return model


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer of a local folder or GGUF file. Raises ModelError."""
    from transformers import AutoTokenizer

    try:
        source = (
            source_of(folder) if is_gguf(folder) else {"pretrained_model_name_or_path": str(folder)}
        )
        return AutoTokenizer.from_pretrained(
            **source, local_files_only=True, trust_remote_code=False
        )
    except QzoError:
        raise
    except Exception as error:
        raise _damaged(folder, error) from error


def _damaged(folder: Path, error: Exception) -> ModelError:
    """Turn any error that a library raises for a damaged file into a ModelError."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return ModelError(
        f"{folder} can't be loaded: {reason}", "a causal language model", "download it again"
    )


def padded(
    rows: Sequence[Sequence[int]], filler: int, left: bool = False, width: int = 0
) -> Tensor:
    """Return rows of tokens as int64 [R, longest or `width`]."""
    width = max(width, *map(len, rows))
    full = [
        [filler] * (width - len(row)) + list(row)
        if left
        else [*row, *[filler] * (width - len(row))]
        for row in rows
    ]
    return torch.tensor(full, dtype=torch.int64)
