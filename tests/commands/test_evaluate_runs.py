"""`evaluate --run` as a user types it: base against tuned, checkpoints, deltas, wrong input."""

import html
import json
import shutil

import pytest

from qzo_diffusion.cli import main
from qzo_diffusion.runs.style import evaluate as evaluate_run
from qzo_diffusion.runs.tuned import load_scales
from tests.commands.short_runs import files_of, scored, train_no_step
from tests.conftest import failing


def evaluate(run, prompts, *more):
    """The exit code of scoring a run with the embedded scorer."""
    command = ["evaluate", "--scorer", "embedded", "--run", str(run), "--prompts", str(prompts)]
    return main([*command, *more])


def test_base_against_base_differs_by_nothing(tmp_path, command_line, prompts, capsys):
    """On the embedded model, whose scorer is the embedded one without being asked for."""
    run = train_no_step(tmp_path, command_line, "tiny")
    own = tmp_path / "own.txt"
    own.write_text(f"{prompts.read_text().rstrip()} --w 512\n")
    assert main(["evaluate", "--run", str(run), "--prompts", str(own), "--json"]) == 0
    captured = capsys.readouterr()
    assert "options behind prompts are left out: --w" in captured.err
    found = json.loads(captured.out)
    assert found == scored(run)
    for figures in (
        found["clip_score"],
        found["style"]["similarity"],
        found["validation_loss"],
        found["style"]["kid"],
    ):
        assert figures["delta"] == 0
        assert figures["delta_ci95"] == [0, 0]
    assert {"model", "n", "mean", "std", "ci95", "base_mean", "delta", "delta_ci95"} <= found[
        "clip_score"
    ].keys()
    assert {"base", "tuned"} <= found["validation_loss"].keys()
    assert [band["sigma"] for band in found["validation_loss"]["bands"]] == [
        0.125,
        0.375,
        0.625,
        0.875,
    ]
    assert found["validation_loss"]["n"] == 12
    assert found["scorer"]["note"] == "embedded scorer, not comparable with CLIP ViT-L/14"
    assert -1 <= found["signal"]["base"]["exact"]["cosine"] <= 1
    assert found["signal"]["base"]["step_sizes"]
    page = (run / "report.html").read_text()
    assert "not comparable with CLIP ViT-L/14" in page
    assert html.escape(found["verdict"][0]["text"]).replace("&#x27;", "&#39;") in page


def test_a_second_time_nothing_is_sampled_and_nothing_changes(run, prompts, capsys):
    assert evaluate(run, prompts) == 0
    first = scored(run)
    assert "sampling" in capsys.readouterr().err
    assert evaluate(run, prompts) == 0
    assert "sampling" not in capsys.readouterr().err
    assert scored(run) == first


def test_a_tuned_run_is_scored_at_its_own_scales(train, tmp_path, prompts):
    assert train("--max-steps", 2, "train.lr=0.05", "--trigger", "zxq") == 0
    prompts.write_text("red apple in [trigger] style\nbanana\n")
    run = tmp_path / "run"
    before = load_scales(run)[0]
    assert (
        main(
            [
                "evaluate",
                "--run",
                str(run),
                "--prompts",
                str(prompts),
                "--scorer",
                "embedded",
                "--output",
                str(tmp_path / "scores.json"),
            ]
        )
        == 0
    )
    found = json.loads((tmp_path / "scores.json").read_text())
    assert not (run / "evaluation.json").exists()
    assert found["step"] == 2
    assert found["prompts"][0]["prompt"] == "red apple in zxq style"
    assert found["prompts"][0]["content"] == "red apple"
    assert found["clip_score"]["delta"] != 0
    assert found["validation_loss"] is None
    assert [row["step"] for row in found["steps"]] == [0, 2]
    assert found["signal"]["steps"] == 2
    assert all((before[name] == load_scales(run)[0][name]).all() for name in before)


def test_a_checkpoint_is_scored_beside_its_run(train, tmp_path, prompts, capsys):
    assert train("--max-steps", 2, "train.lr=0.05", "train.checkpoint_every=1") == 0
    run = tmp_path / "run"
    checkpoint = run / "checkpoints/step_000001"
    command = ["evaluate", "--scorer", "embedded", "--prompts", str(prompts), "--run"]
    assert main([*command, str(run)]) == 0
    before = files_of(run)
    capsys.readouterr()
    assert main([*command, str(checkpoint)]) == 0
    # the base's pictures are those of the run
    assert capsys.readouterr().err.count("sampling") == 1
    after = files_of(run)
    assert {path: after[path] for path in before} == before
    own = {path.relative_to(run).as_posix() for path in after.keys() - before.keys()}
    assert {path.rpartition("/")[0] for path in own} == {"", "evaluation/step_000001/tuned"}
    assert "evaluation_step_000001.json" in own
    assert json.loads((run / "evaluation_step_000001.json").read_text())["step"] == 1
    capsys.readouterr()
    assert main(["evaluate", "--compare", str(run), str(checkpoint), "--json"]) == 0
    assert [row["step"] for row in json.loads(capsys.readouterr().out)["runs"]] == [2, 1]


@pytest.mark.parametrize("wanted", ["file/scores.json", "."])
def test_where_scores_go_is_looked_at_before_anything_is_loaded(
    run, tmp_path, monkeypatch, capsys, wanted
):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(evaluate_run, "load_tuned", None)
    monkeypatch.setattr(evaluate_run, "read_json", None)
    for what in ("--run", "--compare"):
        error = failing(
            capsys, main(["evaluate", what, str(run), "--output", str(tmp_path / wanted)])
        )
        assert "choose another --output" in error


def test_a_folder_for_the_scores_is_made(run, prompts, tmp_path):
    output = tmp_path / "new" / "scores.json"
    assert evaluate(run, prompts, "--output", str(output)) == 0
    assert (
        main(
            ["evaluate", "--compare", str(output), "--output", str(tmp_path / "table" / "all.json")]
        )
        == 0
    )
    assert json.loads((tmp_path / "table" / "all.json").read_text())["runs"][0]["step"] == 0


def test_a_run_needs_an_end_a_scorer_and_something_to_show(run, prompts, tmp_path, capsys):
    failing(capsys, main(["evaluate", "--scorer", "embedded", "--run", str(tmp_path / "nowhere")]))
    failing(capsys, main(["evaluate", "--run", str(run), "--scorer", "nonsense"]))
    failing(
        capsys,
        main(
            [
                "evaluate",
                "--scorer",
                "embedded",
                "--run",
                str(run),
                "--prompts",
                str(tmp_path / "none.txt"),
            ]
        ),
    )
    prompts.write_text("banana\n, noto style\n")
    assert "nothing but style" in failing(
        capsys,
        main(["evaluate", "--scorer", "embedded", "--run", str(run), "--prompts", str(prompts)]),
    )
    shutil.rmtree(run / "final")
    failing(capsys, main(["evaluate", "--scorer", "embedded", "--run", str(run)]))
    assert not (run / "evaluation.json").exists()


def test_a_run_is_credited_with_what_it_gained_itself(train, tmp_path, prompts, pipeline, capsys):
    """Also where it is given as a delta, which is a folder of hashed files."""
    first, second, delta = tmp_path / "first", tmp_path / "second", tmp_path / "delta"
    assert train("--max-steps", 2, "train.lr=0.05", name="first") == 0
    assert train("--max-steps", 0, "--init-from", first, name="second") == 0
    command = ["evaluate", "--scorer", "embedded", "--prompts", str(prompts), "--run"]
    assert main([*command, str(first)]) == 0
    assert main([*command, str(second)]) == 0
    found = scored(second)
    assert found["compared_with"] == "what the run began with"
    for figures in (found["clip_score"], found["style"]["similarity"], found["style"]["kid"]):
        assert figures["delta"] == 0
    assert found["clip_score"]["mean"] == found["clip_score"]["begun_mean"]
    assert found["clip_score"]["begun_mean"] != found["clip_score"]["base_mean"]
    assert found["prompts"][0]["clip"] == [
        scored(first)["prompts"][0]["clip"][0],
        *[scored(first)["prompts"][0]["clip"][1]] * 2,
    ]
    assert all(row["rms"] == 0 for row in found["signal"]["moved"])
    assert "Begun with" in (second / "report.html").read_text()

    export = ["export", "--run", str(first), "--format", "delta", "--output-dir", str(delta)]
    assert main(export) == 0
    before = files_of(delta)
    (tmp_path / "imgs").rename(tmp_path / "elsewhere")
    command[1:1] = ["--model", str(pipeline)]  # a delta names its folder alone
    assert "--style-dir DIR" in failing(capsys, main([*command, str(delta)]))
    (tmp_path / "elsewhere").rename(tmp_path / "imgs")
    assert main([*command, str(delta)]) == 0
    for name in ("prompts", "clip_score", "style", "validation_loss"):
        assert scored(tmp_path / "delta-evaluation")[name] == scored(first)[name]
    assert main(["report", "--run", str(delta)]) == 0
    assert "Finished." in (tmp_path / "delta-evaluation" / "report.html").read_text()
    assert files_of(delta) == before


def test_what_a_run_began_with_may_be_gone(tmp_path, capsys):
    from qzo_diffusion.config.files import make_config
    from qzo_diffusion.runs.style.evaluation import begun_with

    gone = make_config({"init_from": str(tmp_path / "gone"), "data": {"style_dir": "x"}})
    assert begun_with(gone) is None
    assert "its gain is counted as this run's" in capsys.readouterr().err
    assert begun_with(make_config({"data": {"style_dir": "x"}})) is None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_diverged_run_is_scored_and_has_a_page(run, prompts, monkeypatch, capsys, value):
    from qzo_diffusion.runs.style import evaluation

    def diverging(objective, batch):
        return [value] * len(batch)

    monkeypatch.setattr(evaluation, "sample_losses", diverging)
    assert evaluate(run, prompts, "--json") == 0
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    kept = json.loads((run / "evaluation.json").read_text(), parse_constant=pytest.fail)
    assert kept == found
    assert found["diverged"] is True
    assert found["validation_loss"]["tuned"] is None
    assert next(iter(found)) == "sentence"
    assert found["sentence"].startswith("Worse than the base: the run diverged")
    assert "the run diverged" in (run / "report.html").read_text()
    # as an older version wrote it
    (run / "evaluation.json").write_text(json.dumps(found).replace("null", "NaN"))
    assert main(["report", "--run", str(run)]) == 0
    assert main(["evaluate", "--compare", str(run)]) == 0


@pytest.mark.parametrize(("own", "count"), [(False, 8), (True, 0)])
def test_half_of_the_shipped_prompts_hold_the_captions_trigger(images, prompts, own, count):
    from qzo_diffusion.config.files import make_config
    from qzo_diffusion.runs.style.plan import make_plan
    from qzo_diffusion.runs.style.samples import prompt_table

    for index in range(6):
        (images / f"{index}.txt").write_text(f"square {index}, zxq")
    settings = {"model": "tiny", "data": {"style_dir": str(images)}}
    plan = make_plan(make_config(settings | ({"sample": {"prompts": str(prompts)}} if own else {})))
    assert sum(", zxq" in prompt for prompt in plan.sample_prompts) == count
    assert sum(row["with"] for row in prompt_table(plan.prompts, plan.trigger)) == count
    assert f"{count or 'none'} with the captions' trigger 'zxq'" in plan.summary()
