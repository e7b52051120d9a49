"""The benchmark of pictures: which concepts a candidate holds, and figures from finished cells."""

import json

import numpy as np
import pytest

from benchmarks.pictures import candidates, report
from benchmarks.tiny.lessons import knowledge
from benchmarks.tiny.treatments import treat


@pytest.fixture
def emoji(tmp_path):
    """A drawing of every concept that the next weights are taught, in two styles."""
    names = knowledge().concepts
    generator = np.random.default_rng(0)
    arrays = {}
    for style in ("fluent_mono", "fluent_flat"):
        arrays[f"img_{style}"] = generator.integers(0, 255, (len(names), 64, 64, 3), np.uint8)
        arrays[f"ok_{style}"] = np.ones(len(names), bool)
    np.savez(tmp_path / "emoji64.npz", **arrays)
    (tmp_path / "meta.json").write_text(json.dumps([{"name": name} for name in names]))
    return tmp_path


def test_a_folder_holds_no_concept_that_pictures_are_judged_by(emoji, tmp_path):
    taught = knowledge().concepts
    found = candidates.candidate_folder("fluent_mono", emoji, tmp_path / "work", taught)
    texts = [
        json.loads(line)["text"]
        for folder in (found.train, found.held_out)
        for line in (folder / "metadata.jsonl").read_text().splitlines()
    ]
    assert len(set(texts)) == candidates.TRAIN + candidates.VALIDATION == len(texts)
    assert not set(texts) & (set(found.concepts) | candidates.prompted())
    assert set(found.concepts) == set(knowledge().held_out)
    assert list(found.captions) == list(found.concepts)


def test_treatments_are_laid_over_a_taught_style(emoji):
    plain = candidates.Candidate("fluent_flat")
    names = knowledge().concepts[:3]
    treated = candidates.drawings("two_inks", emoji, names)
    candidates_own = candidates.CANDIDATES["two_inks"]
    assert candidates_own.drawn == plain.drawn
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(candidates.CANDIDATES, "plain", plain)
        untreated = candidates.drawings("plain", emoji, names)
    assert treated.images.equal(treat("two inks", untreated.images))
    assert not treated.images.equal(untreated.images)


def test_a_style_that_is_no_candidate_is_refused(emoji, tmp_path):
    with pytest.raises(ValueError, match="no candidate 'noto'; there are fluent_mono, "):
        candidates.candidate_folder("noto", emoji, tmp_path, knowledge().concepts)
    free = set(knowledge().concepts) - set(knowledge().held_out) - candidates.prompted()
    with pytest.raises(ValueError, match="55 drawings of fluent_mono, 56 are needed"):
        candidates.chosen("fluent_mono", emoji, sorted(free)[:55])


def result(method, loss, style, content, folder="fluent_mono"):
    def pair(change):
        return {"base": 0.5, "tuned": 0.5 + change, "delta_ci95": [change - 0.1, change + 0.1]}

    return {
        "folder": folder,
        "method": method,
        "steps": 300,
        "step": 300,
        "loss": {"start": 2.0, "final": loss},
        "style": pair(style),
        "content": pair(content),
        "drawing": {"delta": -0.1, "delta_ci95": [-0.2, -0.05]},
    }


def test_shares_are_of_the_exact_gradient_with_the_lowest_held_out_loss():
    results = [
        result("subspace", 1.5, 0.06, -0.02),
        result("first_order_0.003", 1.4, 0.3, -0.3),
        result("first_order_0.01", 1.2, 0.1, -0.04),
    ]
    found = report.figures(results, ["fluent_mono"], [], 300)["styles"]["fluent_mono"]
    assert found["first_order_method"] == "first_order_0.01"
    assert found["share"] == pytest.approx(0.6)
    assert found["per_content"] == pytest.approx((0.06 / 0.02) / (0.1 / 0.04))
    assert found["style_delta_ci95"] == pytest.approx([-0.04, 0.16])


def test_style_for_content_is_no_number_where_no_content_is_lost():
    results = [result("subspace", 1.5, 0.06, 0.02), result("first_order_0.01", 1.2, 0.1, -0.04)]
    found = report.figures(results, ["fluent_mono"], [], 300)["styles"]["fluent_mono"]
    assert found["per_content"] is None
    alone = report.figures(results[:1], ["fluent_mono"], [], 300)["styles"]["fluent_mono"]
    assert "share" not in alone
    with pytest.raises(ValueError, match=r"no cell openmoji/subspace_300"):
        report.figures(results, ["openmoji"], [], 300)
