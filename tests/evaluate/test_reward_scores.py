"""What the scores of a run on rewards say, from rows with known changes."""

from qzo_diffusion.evaluate.reward_scores import change, findings, gamed, score_charts

BEFORE = [0.1, 0.5, 0.3, 0.2, 0.4]


def rows(reward, second):
    """Two steps; the scores of all prompts change by about these amounts."""
    small = (-0.01, 0.0, 0.01, 0.0, 0.0)

    def after(amount):
        return [value + amount + more for value, more in zip(BEFORE, small, strict=True)]

    return [
        {"step": 0, "reward": BEFORE, "second": BEFORE},
        {"step": 50, "reward": after(reward), "second": after(second)},
    ]


def found(steps, **names):
    return {"rewards": {"brightness": 1.0}, "second": "clip_score", "steps": steps} | names


def test_changes_are_paired_over_prompts():
    moved = change(rows(0.2, 0.0), "reward")
    low, high = moved["delta_ci95"]
    assert abs(moved["delta"] - 0.2) < 1e-9
    assert 0.19 < low < 0.2 < high < 0.21


def test_a_reward_that_rises_while_the_second_score_falls_is_a_warning():
    assert gamed(rows(0.2, -0.2))
    assert not gamed(rows(0.2, 0.2))
    assert not gamed(rows(-0.2, -0.2))
    assert not gamed(rows(0.2, 0.0))
    assert not gamed(rows(0.2, -0.2)[:1])
    alone = [{"step": row["step"], "reward": row["reward"]} for row in rows(0.2, -0.2)]
    assert not gamed(alone)
    first, *rest = findings(found(rows(0.2, -0.2)))
    assert first["sign"] == "bad"
    assert [one["sign"] for one in rest] == ["good", "bad"]


def test_a_change_that_may_be_chance_is_called_so():
    signs = [one["sign"] for one in findings(found(rows(0.2, 0.0)))]
    assert signs == ["good", "open"]
    assert findings(found(rows(0.2, 0.0)[:1])) == []


def test_a_picture_without_a_score_leaves_the_change_open():
    steps = rows(0.2, -0.2)
    steps[1]["reward"] = [None, *steps[1]["reward"][1:]]
    assert not gamed(steps)
    assert findings(found(steps))[0]["sign"] == "open"


def test_each_score_has_a_chart_with_intervals():
    charts = score_charts(found(rows(0.2, 0.1)))
    assert [one["title"] for one in charts] == [
        "What is tuned: brightness",
        "Only reported: clip_score",
    ]
    assert all(one["curves"][0]["band"] and len(one["curves"][0]["marks"]) == 2 for one in charts)
    several = found(rows(0.2, 0.1), rewards={"a": 1.0, "b": 2.0}, second=None)
    assert [one["title"] for one in score_charts(several)] == ["What is tuned: reward"]
