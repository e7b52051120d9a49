"""The house rules, read from the source alone: nothing of the package is imported here."""

import ast
import re
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "qzo_diffusion"

# Floor -> what it may import of ours. A floor may always import itself; a floor is a folder, or a
# room of `runs`.
GROUND = ("", "resources", "devices", "system")  # "" is the bare package (its __version__)
LIBRARY = {"rewards", "config", "train", "diffusion", "llm", "evaluate", "quant", "core", "ground"}
BELOW = {
    "core": set(),
    "ground": {"core"},
    "quant": {"core", "ground"},
    "train": {"core", "ground"},
    "diffusion": {"quant", "core", "ground"},
    "llm": {"quant", "core", "ground"},
    "evaluate": {"quant", "core", "ground"},
    "rewards": {"diffusion", "evaluate", "quant", "core", "ground"},
    "config": {"core", "ground"},
    "runs": LIBRARY,
    "runs.style": {"runs"} | LIBRARY,
    "runs.llm": {"runs"} | LIBRARY,
    "commands": {"runs", "runs.style", "runs.llm"} | LIBRARY,
    "api": {"runs"} | LIBRARY,
    "cli": {"commands", "config", "core", "ground", "runs"},
}
CORE_PACKAGES = {"torch", "numpy", *sys.stdlib_module_names}
KERNEL = "core/fused_scaling.py"  # in Triton, which comes with torch for Linux
# What every run goes through; a further level of numbers is a file of its own (core/grouped.py).
MATHEMATICS = [
    f"core/{name}.py"
    for name in ("noise", "scales", "spsa", "parametrization", "parametrize", "dense", "optimizer")
]
MAY_DIFFERENTIATE = {"core/oracle.py", "llm/baselines.py", "llm/flatquant.py"}
DERIVATIVES = (
    "autograd.grad",
    "autograd.backward",
    "func.grad",
    "func.grad_and_value",
    "func.vjp",
    "func.jacrev",
)
FAMILIES = "diffusion/families/"
# A family outside of its record: diffusers' classes of it, and a module that makes it.
OF_A_FAMILY = re.compile(
    r"\b(SD3|Flux|QwenImage|UNet2D|StableDiffusion|ZImage)\w*(Model|Pipeline)\b"
    r"|\bfamilies[./](?!family\b|registry\b)\w"
)
GRAB_BAGS = {"utils.py", "helpers.py", "common.py"}


def imports_of(tree):
    """Every module that a source asks for, absolute, at any depth, by name or by importlib."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from (arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant))


def floor_of(path):
    """The floor of a module inside the package, given with slashes: `runs/style/plan` ->
    `runs.style`.
    """
    parts = path.split("/")
    if parts[0] in GROUND:
        return "ground"
    return (
        "runs." + parts[1]
        if parts[0] == "runs" and f"runs.{'.'.join(parts[1:2])}" in BELOW
        else parts[0]
    )


def wrong_import(path, name):
    floor = floor_of(path.removesuffix(".py").removeprefix("__init__"))
    if name.startswith("."):
        return "relative import"
    if floor not in BELOW:
        return "a floor without rules"
    top, _, inside = name.partition(".")
    if top != "qzo_diffusion":
        foreign = (
            floor == "core"
            and top not in CORE_PACKAGES
            and not (path == KERNEL and top == "triton")
        )
        return "core knows torch, numpy and the standard library only" if foreign else None
    target = floor_of(inside.replace(".", "/"))
    if target not in BELOW:
        target = "ground"  # a name of the bare package
    return None if target in BELOW[floor] | {floor} else "arrows go down only"


def names_of_a_family(tree):
    """Names and texts of a source, without its docstrings, that mean one family of models."""
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node)
    }
    for node in ast.walk(tree):
        texts = []
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            texts = [] if id(node) in docstrings else [node.value]
        elif isinstance(node, ast.Import | ast.ImportFrom | ast.Name | ast.Attribute):
            texts = [ast.unparse(node)]
        yield from (found[0] for text in texts if (found := OF_A_FAMILY.search(text)))


def violations(sources):
    """`path: reason` for every rule that {path inside the package: source} breaks."""
    found = []
    for path, source in sources.items():
        tree = ast.parse(source)
        names = list(imports_of(tree))
        calls = [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]
        reasons = [f"{reason}: {name}" for name in names if (reason := wrong_import(path, name))]
        if path.count("/") and path.endswith("__init__.py") and source.strip():
            reasons.append("__init__ of a sub-package is not empty")
        if Path(path).name in GRAB_BAGS:
            reasons.append("a name that says nothing")
        if source.count("\n") > 400:
            reasons.append("more than 400 lines")
        if path not in MAY_DIFFERENTIATE:
            reasons += [
                f"derivative: {name}"
                for name in names + calls
                if name.endswith((*DERIVATIVES, ".backward"))
            ]
        if not path.startswith(FAMILIES):
            reasons += [f"names a family: {name}" for name in names_of_a_family(tree)]
        reasons += [f"device by name: {call}" for call in calls if call.endswith(".cuda")]
        reasons += [
            f"pickle: {name}"
            for name in names
            if name.split(".")[0] == "pickle" or name == "torch.load"
        ]
        reasons += [f"pickle: {call}" for call in calls if call == "torch.load"]
        found += [f"{path}: {reason}" for reason in reasons]
    if sum(sources.get(path, "").count("\n") for path in MATHEMATICS) >= 1300:
        found.append("core: the mathematics fills 1300 lines or more")
    return found


def test_the_package_keeps_the_rules():
    sources = {
        path.relative_to(PACKAGE).as_posix(): path.read_text("utf-8")
        for path in PACKAGE.rglob("*.py")
    }
    assert {"__init__.py", "core/__init__.py"} <= sources.keys()
    assert violations(sources) == []


@pytest.mark.parametrize(
    ("path", "source", "reason"),
    [
        ("core/spsa.py", "import transformers", "core knows torch"),
        ("core/activation_scaling.py", "import triton", "core knows torch"),
        ("core/spsa.py", "from qzo_diffusion.quant.base import Layer", "arrows"),
        ("core/spsa.py", "from qzo_diffusion import quant", "arrows"),
        ("core/spsa.py", "from . import noise", "relative"),
        ("core/spsa.py", "from qzo_diffusion import __version__", "arrows"),
        ("quant/bnb.py", "import qzo_diffusion.train.loop", "arrows"),
        ("train/loop.py", "def f():\n    from qzo_diffusion.quant import base", "arrows"),
        ("diffusion/vae.py", "from qzo_diffusion.llm.tasks import Task", "arrows"),
        (
            "llm/tasks.py",
            "import importlib\nimportlib.import_module('qzo_diffusion.diffusion.vae')",
            "arrows",
        ),
        ("evaluate/report.py", "from qzo_diffusion.config.style import Config", "arrows"),
        ("quant/base.py", "from qzo_diffusion.runs.build import build", "arrows"),
        ("rewards/reward.py", "from qzo_diffusion.config.style import Config", "arrows"),
        ("evaluate/style.py", "from qzo_diffusion.rewards.reward import Reward", "arrows"),
        ("runs/trainer.py", "from qzo_diffusion.runs.style import plan", "arrows"),
        ("runs/style/plan.py", "from qzo_diffusion.runs.llm import plan", "arrows"),
        ("runs/training.py", "from qzo_diffusion.commands import mix", "arrows"),
        ("runs/build.py", "from qzo_diffusion.cli import main", "arrows"),
        ("cellar/wine.py", "import torch", "without rules"),
        ("core/__init__.py", "from qzo_diffusion.core.noise import z", "__init__"),
        ("quant/utils.py", "", "name"),
        ("quant/bnb.py", "x = 1\n" * 401, "400 lines"),
        ("core/spsa.py", "def f(loss):\n    loss.backward()", "derivative"),
        ("core/spsa.py", "import torch\ntorch.autograd.grad(y, x)", "derivative"),
        ("core/spsa.py", "from torch.autograd import grad", "derivative"),
        ("diffusion/vae.py", "model.cuda()", "device"),
        ("diffusion/vae.py", "from diffusers import FluxPipeline", "family"),
        ("runs/style/plan.py", "kind = 'UNet2DConditionModel'", "family"),
        ("runs/style/plan.py", "from qzo_diffusion.diffusion.families.sd3 import SD3", "family"),
        ("train/checkpoint.py", "import pickle", "pickle"),
        ("train/checkpoint.py", "import torch\ntorch.load(p)", "pickle"),
        ("train/checkpoint.py", "from torch import load", "pickle"),
    ],
)
def test_a_broken_rule_is_found(path, source, reason):
    assert any(reason in line for line in violations({path: source})), violations({path: source})


def test_too_much_mathematics_is_found():
    assert violations(dict.fromkeys(MATHEMATICS, "x = 1\n" * 180)) == []
    assert violations(dict.fromkeys(MATHEMATICS, "x = 1\n" * 190)) == [
        "core: the mathematics fills 1300 lines or more"
    ]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("core/oracle.py", "import torch\ntorch.autograd.grad(y, x)"),
        ("llm/baselines.py", "loss.backward()"),
        (
            "core/spsa.py",
            "import math, numpy\nimport torch.nn.functional as F\nfrom qzo_diffusion.core "
            "import noise",
        ),
        (
            "train/loop.py",
            "from qzo_diffusion import __version__\nfrom qzo_diffusion.core.errors import "
            "UserError",
        ),
        (
            "diffusion/vae.py",
            "import torch\ntorch.cuda.is_available()\nfrom qzo_diffusion.quant import bnb",
        ),
        ("diffusion/families/sd3.py", "from diffusers import StableDiffusion3Pipeline"),
        ("runs/style/plan.py", "from qzo_diffusion.diffusion.families import family, registry"),
        ("runs/style/plan.py", 'def f():\n    """Not of StableDiffusion3Pipeline."""'),
        (
            "cli.py",
            "from qzo_diffusion.core.errors import UserError\nfrom qzo_diffusion.commands "
            "import doctor",
        ),
        (
            "runs/style/plan.py",
            "from qzo_diffusion.runs import build\nfrom qzo_diffusion.diffusion import vae",
        ),
    ],
)
def test_what_is_allowed_passes(path, source):
    assert violations({path: source}) == []
