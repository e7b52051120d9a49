"""The default and the exact gradient of the same numbers, at three rates."""

from benchmarks.content.methods import FIRST_ORDER, METHODS, Settings, changed

DEFAULT = "default"
RATES = (0.003, 0.01, 0.03)
EXACT = {f"first_order_{rate:g}": changed(FIRST_ORDER, train__lr=rate) for rate in RATES}
COMPARED: dict[str, Settings] = {DEFAULT: METHODS["bound"], **EXACT}
