"""Plan the runs of `qzo-diffuse llm`: a quantized language model on a task.

`runs.training` executes the plan.
"""

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qzo_diffusion import devices
from qzo_diffusion.config.files import with_whole_paths
from qzo_diffusion.config.llm import FIRST_ORDER, LlmConfig
from qzo_diffusion.core.errors import ConfigError, DataError
from qzo_diffusion.core.optimizer import Schedule
from qzo_diffusion.core.probing import Probing
from qzo_diffusion.evaluate.task_score import interval
from qzo_diffusion.llm.causal_lm import CausalLm
from qzo_diffusion.llm.data_files import data_folder
from qzo_diffusion.llm.model_folder import check_model_folder, check_weights
from qzo_diffusion.llm.objectives import mean_metric, objective
from qzo_diffusion.llm.task_file import TaskSpec, read_task, shipped_tasks
from qzo_diffusion.llm.tasks import Encoded, Example, encode
from qzo_diffusion.llm.vocabulary import check_vocabulary
from qzo_diffusion.quant.gguf_header import is_gguf
from qzo_diffusion.runs import build, provenance
from qzo_diffusion.runs.llm.batches import TextBatches, evaluation_batches
from qzo_diffusion.runs.llm.memory import memory_plan
from qzo_diffusion.runs.llm.methods import apply_, load_base
from qzo_diffusion.runs.llm.models import choose_lm
from qzo_diffusion.runs.llm.scores import Scores
from qzo_diffusion.runs.llm.splits import PARTS, Splits, read_splits
from qzo_diffusion.runs.locate import locate
from qzo_diffusion.runs.plan import Components
from qzo_diffusion.runs.provenance import journal_header
from qzo_diffusion.runs.tuned import load_scales
from qzo_diffusion.system.console import report
from qzo_diffusion.train.distributed import Ranks
from qzo_diffusion.train.run_folder import RunFolder
from qzo_diffusion.train.tracking import Tracker


@dataclass(frozen=True)
class LlmPlan:
    """`runs.plan.Plan` of a language model on a task.

    former: the folder of the run that goes on; None for a new one.
    """

    config: LlmConfig
    model_folder: Path
    device: torch.device
    dtype: torch.dtype
    spec: TaskSpec
    splits: Splits
    former: Path | None = None

    thing = "example"
    facts = ("sha256", "split")

    @property
    def has_journal(self) -> bool:
        return self.config.method not in FIRST_ORDER

    @property
    def name(self) -> str:
        return f"{self.spec.name}-{self.config.method}"

    def describe(self) -> str:
        first = self.splits.train[0]
        example = (
            f"reads     {first.prompt!r}\nright     {first.continuations[first.label]!r} of "
            f"{list(first.continuations)}"
        )
        return f"{self.config.to_yaml()}\n{self.summary()}\n{example}"

    def summary(self) -> str:
        splits = self.splits
        counts = (
            f"{len(splits.train)} to train on, {len(splits.validation)} held out, "
            f"{len(splits.test)} to test on"
        )
        lines = [
            f"task      {self.spec.name}: {counts}",
            f"method    {self.config.method}, objective {self.config.objective}",
            f"compute   {self.device}, {str(self.dtype).removeprefix('torch.')}",
            memory_plan(self.config, self.model_folder, self.device, self.dtype, splits.longest()),
        ]
        if self.has_journal:
            step = build.step_in_words(self.config, self.config.data.batch_size, "examples")
            lines.insert(2, f"a step    {step}")
        return "\n".join(lines)

    def data(self) -> list[dict[str, Any]]:
        return [row for name in PARTS for row in _table(name, getattr(self.splits, name))]

    def settings(self) -> dict[str, Any]:
        return self.config.model_dump(
            exclude={
                "data": {"dir", "cache_dir"},
                "quant": {"calibration"},
                "model": True,
                "task": True,
            }
        )

    def metadata(self, components: Components) -> dict[str, str]:
        facts = provenance.scales_metadata(self.config, components.header["codes"])
        return facts | {"qzo.method": self.config.method, "qzo.task": self.spec.name}

    def probing(self) -> Probing:
        return build.probing(self.config)

    def schedule(self, factor: float) -> Schedule:
        return build.schedule(self.config, factor)

    def load(self, ranks: Ranks) -> Components:
        config = self.config
        if ranks.world > 1 and config.method in FIRST_ORDER:
            raise ConfigError(
                f"method {config.method} on {ranks.world} processes",
                "one process",
                "start it without torchrun",
            )
        base = load_base(config, self.model_folder, self.device, self.dtype, self.former)
        base.lm.part_before_(base.trained)
        encoded = {
            name: encode(base.lm, getattr(self.splits, name), config.data.max_tokens)
            for name in PARTS
        }

        def scores(out: RunFolder, tracker: Tracker) -> Scores:
            out.write_json(
                "dataset.json",
                [row for name in encoded for row in self._counted(name, encoded[name])],
            )
            if base.maps is not None:
                base.maps.keep_in(out.path)
            _warn_of_cuts([one for part in encoded.values() for one in part])
            size = build.micro_batch_size(config, config.data.batch_size)
            held_out, test = (
                evaluation_batches(base.lm, encoded[name], size) for name in ("validation", "test")
            )
            return Scores(out, base.lm, self.spec, test, tracker, held_out)

        build.check_share(config.data.batch_size, ranks.world)
        build.check_scalars(config, config.data.batch_size)
        return Components(
            scales=base.scales,
            theta=base.theta,
            optimizer=base.optimizer,
            objective=objective(base.lm, self.spec, config.objective),
            batches=TextBatches(
                base.lm,
                encoded["train"],
                batch_size=config.data.batch_size,
                seed=config.train.seed,
                micro_batch_size=build.micro_batch_size(config, config.data.batch_size),
                share=ranks.share,
                keep_in=build.cache_folder(config) if config.data.keep_hidden else None,
            ),
            header=journal_header(config, config.data.batch_size, base.codes, base.initial)
            | _facts(config),
            callbacks=scores,
            take_step=base.take_step,
        )

    def _counted(self, split: str, encoded: list[Encoded]) -> list[dict[str, Any]]:
        rows = _table(split, getattr(self.splits, split))
        return [
            row | {"tokens": one.length, "cut": one.cut}
            for row, one in zip(rows, encoded, strict=True)
        ]


def _facts(config: LlmConfig) -> dict[str, Any]:
    """Return the facts that the journal of a language model has beyond those of a style run."""
    lora, data = config.lora.model_dump(), config.data.model_dump(exclude={"cache_dir"})
    beside = {"unquantized": config.qzo.unquantized}
    return {
        "kind": "llm",
        "method": config.method,
        "task": config.task,
        "lora": lora,
        "data": data,
    } | beside


def _table(split: str, examples: list[Example]) -> list[dict[str, Any]]:
    """Return rows of dataset.json; the hash covers the whole example."""
    rows = []
    for example in examples:
        content = repr((example.prompt, example.continuations, example.label, example.answers))
        rows.append(
            {
                "file": example.place,
                "split": split,
                "sha256": hashlib.sha256(content.encode()).hexdigest(),
            }
        )
    return rows


def _warn_of_cuts(encoded: list[Encoded]) -> None:
    cut = [one.cut for one in encoded if one.cut]
    if cut:
        report(
            f"warning: {len(cut)} of {len(encoded)} texts are longer than data.max_tokens and "
            f"lost up to {max(cut)} tokens"
        )


def make_plan(
    config: LlmConfig, needed: Sequence[str] = PARTS, former: Path | None = None
) -> LlmPlan:
    """Resolve the task, the model, the device and the data, and check all of them.

    Parts of the data that are not `needed` may be empty. `former` is the folder of a run that goes
    on.
    """
    spec = read_task(config.task)
    folder, why = choose_lm(config.model)
    report(why)
    check_model_folder(folder)
    check_weights(folder)
    device = devices.choose_device(config.compute.device)
    splits = read_splits(config, spec, needed)
    _check_objective(config, spec)
    check_vocabulary(folder, config.task, spec, splits.all())
    resolved = with_whole_paths(config)
    build.resolve_dtype_(resolved, device)
    if config.method != "qlora":  # whose adapters are made for layers of bitsandbytes
        build.resolve_backend_(resolved, device)
    resolved.data.dir = str(data_folder(config.data.dir).resolve()) if config.data.dir else None
    if Path(config.model).is_dir():
        resolved.model = str(folder.resolve())
    elif is_gguf(Path(config.model)):
        resolved.model = str(
            folder.absolute()
        )  # not resolved: the target of a link may have another ending
    if config.task not in shipped_tasks():
        resolved.task = str(Path(config.task).resolve())
    return LlmPlan(
        resolved,
        folder,
        device,
        devices.choose_dtype(config.compute.dtype, device),
        spec,
        splits,
        former,
    )


def _check_objective(config: LlmConfig, spec: TaskSpec) -> None:
    fitting = {
        "choice": ("loss", "accuracy"),
        "answer": ("loss", "accuracy", "f1"),
        "text": ("loss",),
    }[spec.kind]
    if config.objective not in fitting:
        raise ConfigError(
            f"objective {config.objective} for the task {spec.name}",
            f"{' or '.join(fitting)}: a figure that every example has",
            f"use --objective {fitting[-1]}",
        )


def evaluate(config: LlmConfig, run: Path | None) -> dict[str, Any]:
    """Return the task's metric on its test examples, for the base or for a run's tuned model."""
    plan = make_plan(config, needed=["test"])
    tuned = load_scales(run) if run is not None else None
    former = None if run is None else locate(run).folder
    base = load_base(plan.config, plan.model_folder, plan.device, plan.dtype, former)
    if tuned is not None:
        apply_(base, *tuned, run or Path())
    batches = evaluation_batches(
        base.lm,
        _encoded_test(base.lm, plan),
        build.micro_batch_size(plan.config, plan.config.data.batch_size),
    )
    started = time.perf_counter()
    with base.scales.override(base.theta.perturbed()):
        value = mean_metric(base.lm, batches, plan.spec)
    count = len(plan.splits.test)
    return {
        "task": plan.spec.name,
        "model": plan.config.model,
        "method": plan.config.method,
        "run": str(run) if run is not None else None,
        "metric": plan.spec.metric,
        plan.spec.metric: value,
        **interval(plan.spec.metric, value, count),
        "test_examples": count,
        "seconds": time.perf_counter() - started,
    }


def _encoded_test(lm: CausalLm, plan: LlmPlan) -> list[Encoded]:
    if not plan.splits.test:
        raise DataError("no example to test on", "at least one", "set data.test_examples above 0")
    encoded = encode(lm, plan.splits.test, plan.config.data.max_tokens)
    _warn_of_cuts(encoded)
    return encoded
