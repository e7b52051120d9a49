"""Write and read the results of finished cells."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.convergence.methods import FAMILIES
from benchmarks.convergence.settings import Method, Phase


def to_json(content: dict[str, Any]) -> str:
    """Indented, but a curve's points side by side: a file of five hundred lines a curve is no help
    to anybody.
    """
    shell = {key: value for key, value in content.items() if key != "curve"}
    points = ", ".join(json.dumps(point) for point in content["curve"])
    return json.dumps(shell, indent=1).removesuffix("\n}") + f',\n "curve": [{points}]\n}}'


def finished(results: Path) -> dict[str, dict[str, Any]]:
    """Results by the cell's name; one whose settings are no longer those of the table does not
    count.

    A setting that was not there when a cell ran had what is now its default.
    """
    found = {}
    for path in sorted(results.glob("*/*.json")):
        result = json.loads(path.read_text())
        settings = result["settings"]
        then = Method(
            **settings | {"phases": tuple(Phase(**phase) for phase in settings["phases"])}
        )
        if then.settings() == _settings_now(settings, result["data"]):
            found[result["cell"]] = result
    return found


def _settings_now(settings: dict[str, Any], data: str) -> dict[str, Any] | None:
    family = FAMILIES.get(settings["name"].rpartition("_lr")[0])
    if family is None:
        return None
    now = family.template
    return Method(
        settings["name"],
        settings["lr"],
        family.phases(data),
        now.first_order,
        now.batch,
        now.budget,
    ).settings()


def final_losses(results: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    return {
        name: math.inf if result["final_loss"] is None else result["final_loss"]
        for name, result in results.items()
    }
