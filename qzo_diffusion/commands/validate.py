"""`qzo-diffuse validate`: check a config file and show it with all defaults."""

import argparse
from typing import Any

from qzo_diffusion.system.console import DONE


def add(verbs: Any) -> None:
    validate = verbs.add_parser(
        "validate", help="check a config file and show it with all defaults"
    )
    validate.add_argument("--config", required=True, help="a YAML file, or a shipped one by name")
    validate.set_defaults(verb=run)


def run(options: argparse.Namespace) -> int:
    from qzo_diffusion.config.files import find_config, kind_of, make_config, read_run

    settings = read_run(find_config(options.config))
    print(make_config(settings, kind_of(settings)).to_yaml(), end="")
    return DONE
