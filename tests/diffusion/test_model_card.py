"""The licence that a model card names follows from the base's name."""

import pytest

from qzo_diffusion.diffusion.families import registry
from qzo_diffusion.diffusion.model_card import Base, Scores, card, modelspec

OPEN = ("black-forest-labs/FLUX.2-klein-base-4B", "Tongyi-MAI/Z-Image", "Qwen/Qwen-Image")
CLOSED = ("black-forest-labs/FLUX.2-klein-9B", "black-forest-labs/FLUX.1-dev")


def test_every_published_model_has_a_licence() -> None:
    for family in registry.FAMILIES:
        for name in family.published:
            assert modelspec("a", "t", name, 64)["modelspec.license"] != "that of the base model"


@pytest.mark.parametrize("name", [*OPEN, *CLOSED])
def test_a_card_tells_open_models_from_those_with_a_licence_of_their_own(name: str) -> None:
    text = card("a title", Base(name), "", {}, Scores(), ())
    assert ("license: apache-2.0" in text) == (name in OPEN)
    assert ("non-commercial" in text) == (name in CLOSED)
