"""What is compared: tasks, methods with their settings, and the cells that these make."""

from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

BATCH = 16

# Settings of each task beside its own; `dir` is inside the folder of data.
TASKS: dict[str, dict[str, Any]] = {
    "sst2": {
        "dir": "sst2",
        "steps": 2000,
        "settings": ["data.validation_examples=200", "data.max_tokens=64"],
    },
    "rte": {"dir": "rte", "steps": 200, "settings": ["data.max_tokens=256"]},
    "boolq": {
        "dir": "superglue_BoolQ",
        "steps": 200,
        "settings": [
            "data.train_file=val.jsonl",
            "data.test_file=val.jsonl",
            "data.max_tokens=256",
        ],
    },
    "cb": {
        "dir": "superglue_CB",
        "steps": 20,
        "settings": ["data.train_examples=24", "data.validation_examples=8", "data.max_tokens=256"],
    },
    "squad": {
        "dir": ".",
        "steps": 20,
        "settings": [
            "data.train_file=xquad.en.json",
            "data.test_file=xquad.en.json",
            "data.test_examples=100",
            "data.max_tokens=384",
        ],
    },
}
PAPER = [
    "qzo.parametrization=dense",
    "qzo.units=absolute",
    "qzo.eps=1e-3",
    "qzo.directions=gaussian",
    "train.schedule=constant",
]
# in bfloat16 rounding swallows an eps of 0.2 % of a scale
PAPER += ["train.lr=1e-7", "compute.dtype=float32"]
BFLOAT16 = ["compute.dtype=bfloat16"]
BOTH_SIDES = ["qzo.num_directions=1"]  # of each example, probed at +eps and -eps


@dataclass(frozen=True)
class Method:
    """A `--method` with settings; `trained` False only evaluates. seeds, on SST-2 alone; tasks None
    is all of them.

    probes: forwards of each of a step's `batch` examples.
    """

    method: str
    settings: tuple[str, ...] = ()
    trained: bool = True
    seeds: int = 1
    share_of_steps: float = 1.0
    tasks: tuple[str, ...] | None = None
    batch: int = BATCH
    probes: int = 2

    @property
    def forwards_of_step(self) -> int:
        """Examples; of first order, those that went forwards and backwards."""
        return self.batch * (1 if self.first_order else self.probes)

    @property
    def first_order(self) -> bool:
        return self.method in ("qlora", "fo-scales")


# The paper's one dense direction in relative units, at the rate that the convergence benchmark
# found for it.
RELATIVE = [
    "qzo.layers=null",
    "qzo.parametrization=dense",
    "qzo.eps=0.01",
    "train.schedule=constant",
    "train.lr=0.00316",
]


def _clipped(threshold: str) -> Method:
    """In the paper's units no derivative of SST-2 reaches 50 (the largest of 805 steps is 22), so
    that all thresholds are one.
    """
    return Method(
        "qzo",
        (*RELATIVE, f"qzo.clip_threshold={threshold}", *BFLOAT16),
        tasks=("sst2",),
        share_of_steps=0.1,
    )


QUZO_SHARE = 0.6  # of the steps, 38,400 forward passes: one fits in 40 minutes in bfloat16


def _quzo(*settings: str, seeds: int = 1, share: float = QUZO_SHARE) -> Method:
    """Integer codes along factors of rows and columns."""
    chosen = (*BFLOAT16, *settings)
    return Method(
        "quzo", chosen, seeds=seeds, share_of_steps=share, tasks=("sst2",), batch=4, probes=8
    )


def _each_code(*settings: str, share: float = 0.1) -> Method:
    """Fewer steps than the others: noise for every weight, drawn again for twenty past steps, makes
    one three times as long.
    """
    chosen = (*BFLOAT16, "qzo.parametrization=codes", *settings)
    return Method("quzo", chosen, tasks=("sst2",), share_of_steps=share)


# Before the default was found: less of what rounding left, and a higher rate that stays.
SHORT_FEEDBACK = ("train.feedback_decay=0.9", "train.feedback_steps=20", "train.schedule=constant")


METHODS: dict[str, Method] = {
    # unquantized, which for this model is dequantized Q4_1
    "zero_shot": Method("mezo", (), trained=False),
    "zero_shot_quantized": Method("qzo", (), trained=False),
    "default": Method("qzo", tuple(BFLOAT16), seeds=3, batch=4, probes=8),
    "antithetic": Method("qzo", (*BOTH_SIDES, *BFLOAT16), seeds=3),  # the default before
    "held": Method(
        "qzo",
        ("qzo.normalize=running", "train.schedule=hold", *BOTH_SIDES, *BFLOAT16),
        tasks=("sst2",),
    ),
    "middle_columns": Method(  # the default before that
        "qzo",
        (
            f"qzo.layers=[{','.join(f'layers.{block}' for block in range(12, 21))}]",
            "qzo.parametrization=column",
            "qzo.eps=0.03",
            "train.lr=0.025",
            *BOTH_SIDES,
            *BFLOAT16,
        ),
        seeds=3,
        tasks=("sst2",),
    ),
    "all_layers": Method(  # and before that
        "qzo",
        (
            "qzo.layers=null",
            "qzo.parametrization=separable",
            "qzo.eps=0.01",
            "train.lr=0.005",
            *BOTH_SIDES,
            *BFLOAT16,
        ),
        tasks=("sst2",),
    ),
    "paper": Method("qzo", (*PAPER, "qzo.clip_threshold=100"), seeds=3),
    # Signs in place of Gaussian numbers: a step draws 106 million of them three times, and the
    # limit is one of time.
    "mezo": Method("mezo", ("qzo.directions=rademacher", *BFLOAT16)),
    "fo_scales": Method("fo-scales", tuple(BFLOAT16), share_of_steps=0.25),
    "qlora": Method("qlora", tuple(BFLOAT16), share_of_steps=0.25),
    "quzo_default": _quzo(seeds=3),
    "quzo_default_int4": _quzo("quant.type=int4", "quant.blocksize=32", seeds=3),
    "quzo_default_fp8": _quzo("quant.type=fp8"),
    "quzo_default_w8a8": _quzo("quant.activations=int8"),
    "quzo_default_twice": _quzo(share=2 * QUZO_SHARE),
    "quzo_int8": _each_code(*SHORT_FEEDBACK, "train.lr=0.3"),
    "quzo_int8_slow": _each_code(
        "train.feedback_decay=0.95",
        "train.feedback_steps=40",
        "train.lr=0.2",
        "train.schedule=linear",
    ),
    "quzo_int8_long": _each_code(share=0.28),  # the default for as many steps as 40 minutes hold
    "quzo_int8_cosine": _each_code(
        *SHORT_FEEDBACK[:2], "train.lr=0.3", "train.schedule=cosine", share=0.2
    ),
    "quzo_int8_plain": _each_code(
        "train.optimizer=sgd", "train.lr=0.8", "train.schedule=constant"
    ),  # of the slope itself: about 0.05 codes a step
    "quzo_w8a8": _each_code("quant.activations=int8"),
    "quzo_int4": _each_code("quant.type=int4", *SHORT_FEEDBACK, "train.lr=0.08"),
    "quzo_int4_plain": _each_code(
        "quant.type=int4",
        "train.optimizer=sgd",
        "train.lr=0.02",
        "train.schedule=constant",
        share=0.05,
    ),  # about 0.01 codes a step
    "quzo_fp8": _each_code("quant.type=fp8", *SHORT_FEEDBACK, "train.lr=0.2", share=0.015),
    "quzo_lora": Method("quzo-lora", tuple(BFLOAT16), tasks=("sst2",), share_of_steps=0.1),
    "qzo_int8": Method(
        "qzo",
        ("quant.backend=intgrid", "quant.type=int8", *BOTH_SIDES, *BFLOAT16),
        tasks=("sst2",),
        share_of_steps=0.2,
    ),  # the same codes, fixed
    "relative_clip_off": _clipped("null"),
    "relative_clip_10": _clipped("10"),
    "relative_clip_3": _clipped("3"),
    "relative_clip_1": _clipped("1"),
}


@dataclass(frozen=True)
class Cell:
    task: str
    method: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.task}/{self.method}_{self.seed}"


@dataclass(frozen=True)
class Places:
    """results: finished cells; cache: run folders, outside of the repository; data, model:
    folders.
    """

    results: Path
    cache: Path
    data: Path
    model: Path
    steps: int | None = None  # of every run, for a quick look
    dtype: str | None = None  # of every run, in place of the method's own
    minutes: float = 40  # of the processor, at most, in a cell

    def result(self, cell: Cell) -> Path:
        return self.results / "cells" / "llm" / f"{cell.name}.json"


def cells(pattern: str) -> list[Cell]:
    found = []
    for task in TASKS:
        for name, method in METHODS.items():
            if method.tasks is None or task in method.tasks:
                found += [
                    Cell(task, name, seed) for seed in range(method.seeds if task == "sst2" else 1)
                ]
    return [cell for cell in found if any(fnmatch(cell.name, one) for one in pattern.split(","))]


def arguments_of(cell: Cell, places: Places) -> list[str]:
    """Everything behind `llm train` or `llm evaluate` that makes the cell what it is."""
    task, method = TASKS[cell.task], METHODS[cell.method]
    arguments = [
        "--task",
        cell.task,
        "--model",
        str(places.model),
        "--data-dir",
        str(places.data / task["dir"]),
    ]
    arguments += [
        "--method",
        method.method,
        f"data.batch_size={method.batch}",
        *task["settings"],
        *method.settings,
        *([f"compute.dtype={places.dtype}"] if places.dtype else []),
    ]
    if method.trained:
        steps = places.steps or round(task["steps"] * method.share_of_steps)
        arguments += [
            "--max-steps",
            str(steps),
            "--seed",
            str(cell.seed),
            "train.validate_every=100",
        ]
    return [*arguments, "--json"]
