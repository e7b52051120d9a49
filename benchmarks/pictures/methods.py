"""The demo's settings, along the directions that the model's own styles have in common; every row
by itself, the default of models without a file of directions; the exact gradient of the same
numbers, at three rates; and the default of before, which trained rows and columns of all layers
within a bound."""

from benchmarks.content.methods import FIRST_ORDER, METHODS, Settings, changed

SHOWN = "subspace"  # the settings of configs/demo.yaml and tiny.yaml
DEFAULT = "default"
ROWS = {
    "qzo__parametrization": "row",
    "qzo__layers": ["norm1.linear", "ff.net", "attn.to_out"],  # `image` of this model
    "prior__bound": None,
}
RATES = (0.003, 0.01, 0.03)
EXACT = {f"first_order_{rate:g}": changed(FIRST_ORDER, train__lr=rate, **ROWS) for rate in RATES}
# of all numbers, to see how far the rows alone reach
EXACT_ALL = {"first_order_all_0.01": FIRST_ORDER}
SUBSPACE = changed(METHODS["default"], qzo__subspace="tiny", **ROWS)
COMPARED: dict[str, Settings] = {
    DEFAULT: changed(METHODS["default"], train__lr=0.05, **ROWS),
    "rate_0.1": changed(METHODS["default"], **ROWS),
    SHOWN: SUBSPACE,
    "subspace_0.14": changed(SUBSPACE, train__lr=0.14),
    "subspace_0.2": changed(SUBSPACE, train__lr=0.2),
    "bound": METHODS["bound"],
    **EXACT,
    **EXACT_ALL,
}
