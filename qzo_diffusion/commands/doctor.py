"""`qzo-diffuse doctor`: check this machine and say what a run will use."""

import argparse
import json
from typing import Any

from qzo_diffusion.commands.flags import add_output
from qzo_diffusion.system.console import DONE, MENDABLE, show


def add(verbs: Any) -> None:
    doctor = verbs.add_parser("doctor", help="check this machine and say what a run will use")
    add_output(doctor)
    doctor.set_defaults(verb=run)


def run(options: argparse.Namespace) -> int:
    from qzo_diffusion.runs.style import doctor

    facts = doctor.examine()
    if options.json:
        print(json.dumps(facts, indent=1))
    else:
        show(doctor.as_text(facts))
    return MENDABLE if facts["problems"] else DONE
