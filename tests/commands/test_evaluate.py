"""`evaluate` and `report` as a user types them: runs, base against tuned; folders of pictures;
tables of runs; bad input.
"""

import html
import json
import shutil

import pytest
from PIL import Image

from qzo_diffusion.cli import main
from qzo_diffusion.evaluate import signal
from qzo_diffusion.runs.style import evaluate as evaluate_run
from qzo_diffusion.runs.style import scoring as score_run
from qzo_diffusion.runs.tuned import load_scales
from tests.conftest import FAST, failing

FEW = 4


@pytest.fixture(autouse=True)
def _few_directions(monkeypatch):
    """Slopes along four directions instead of 24: the figure is coarse, the path is the same."""
    monkeypatch.setattr(signal, "DIRECTIONS", FEW)


def train_no_step(folder, cache, model):
    """Tuned is base, so every difference must be nothing."""
    for name, count in (("train", 5), ("held_out", 3)):
        (folder / name).mkdir()
        for index in range(count):
            Image.new("RGB", (64, 64), (40 * count, 40 * index, 0)).save(
                folder / name / f"{index}.png"
            )
    (folder / "prompts.txt").write_text("red apple\nbanana\n")
    places = [
        "--style-dir",
        folder / "train",
        "--validation-dir",
        folder / "held_out",
        "--output-dir",
        folder / "run",
    ]
    settings = [
        "--caption",
        "leaf",
        "--max-steps",
        0,
        "--sample-prompts",
        folder / "prompts.txt",
        f"data.cache_dir={cache}",
        *FAST,
    ]
    assert main(["train", "--model", str(model), *map(str, [*places, *settings])]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def run_of_no_step(tmp_path_factory, cache, pipeline):
    return train_no_step(tmp_path_factory.mktemp("evaluate"), cache, pipeline)


@pytest.fixture
def run(run_of_no_step, tmp_path):
    return shutil.copytree(run_of_no_step, tmp_path / "run")


def scored(run):
    return json.loads((run / "evaluation.json").read_text())


def test_base_against_base_differs_by_nothing(tmp_path, cache, prompts, capsys):
    """On the embedded model, whose scorer is the embedded one without being asked for."""
    run = train_no_step(tmp_path, cache, "tiny")
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
    command = ["evaluate", "--scorer", "embedded", "--run", str(run), "--prompts", str(prompts)]
    assert main(command) == 0
    first = scored(run)
    assert "sampling" in capsys.readouterr().err
    assert main(command) == 0
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


def files_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


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


@pytest.mark.parametrize("wanted", ["file/scores.json", "."])
def test_where_scores_of_pictures_go_is_looked_at_before_anything_is_opened(
    pictures, tmp_path, monkeypatch, capsys, wanted
):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(score_run, "open_image", None)
    error = failing(
        capsys, score(pictures, "--prompts", tmp_path / "three.txt", "--output", tmp_path / wanted)
    )
    assert "choose another --output" in error


def test_a_folder_for_the_scores_is_made(run, prompts, tmp_path):
    output = tmp_path / "new" / "scores.json"
    assert (
        main(
            [
                "evaluate",
                "--scorer",
                "embedded",
                "--run",
                str(run),
                "--prompts",
                str(prompts),
                "--output",
                str(output),
            ]
        )
        == 0
    )
    assert (
        main(
            ["evaluate", "--compare", str(output), "--output", str(tmp_path / "table" / "all.json")]
        )
        == 0
    )
    assert json.loads((tmp_path / "table" / "all.json").read_text())["runs"][0]["step"] == 0


LANGUAGE = {
    "task": "sst2",
    "metric": "accuracy",
    "test_examples": 4,
    "by_step": {"0": 0.5, "2": 0.75},
}


@pytest.mark.parametrize(
    "content", [LANGUAGE, {"scorer": {"name": "a"}, "clip_score": {"mean": 0.5}}, [], {"style": 1}]
)
def test_what_is_no_evaluation_of_a_run_on_images_is_not_compared(run, tmp_path, capsys, content):
    file = tmp_path / "scores.json"
    file.write_text(json.dumps(content))
    assert str(file) in failing(capsys, main(["evaluate", "--compare", str(file)]))
    shutil.copy(file, run / "evaluation.json")
    assert str(run / "evaluation.json") in failing(
        capsys, main(["evaluate", "--compare", str(run)])
    )


def test_the_page_is_there_while_a_run_goes_on(train, tmp_path, monkeypatch):
    pages = []

    def remember(folder, output=None):
        page = write(folder, output)
        pages.append(page.read_text())
        return page

    from qzo_diffusion.runs import report as report_run

    write = report_run.write
    monkeypatch.setattr(report_run, "write", remember)
    assert train("--max-steps", 2, "sample.every=1") == 0
    assert "Step 0 of 2" in pages[0]
    assert "Step 1 of 2" in pages[1]
    assert "Finished at step 2" in pages[-1]
    assert (tmp_path / "run/report.html").read_text() == pages[-1]


def test_a_page_that_cannot_be_written_stops_no_run(train, tmp_path, monkeypatch):
    from qzo_diffusion.runs import report as report_run

    def full(folder, output=None):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report_run, "write", full)
    assert train("--max-steps", 1) == 0
    assert (tmp_path / "run/final/COMPLETE").exists()


def test_report_writes_where_it_is_told_and_needs_a_run(run, tmp_path, capsys):
    assert (
        main(["report", "--run", str(run), "--output", str(tmp_path / "page.html"), "--json"]) == 0
    )
    assert json.loads(capsys.readouterr().out)["bytes"] == (tmp_path / "page.html").stat().st_size
    failing(capsys, main(["report", "--run", str(tmp_path)]))
    (run / "evaluation.json").write_text('{"steps": []}')
    assert "evaluation.json" in failing(capsys, main(["report", "--run", str(run)]))


def test_runs_are_compared_in_one_table(run, prompts, tmp_path, capsys):
    failing(capsys, main(["evaluate", "--compare", str(run)]))
    prompts.write_text("banana\n")
    assert (
        main(["evaluate", "--scorer", "embedded", "--run", str(run), "--prompts", str(prompts)])
        == 0
    )
    assert scored(run)["clip_score"]["n"] == 1
    assert scored(run)["clip_score"]["ci95"] is None
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(run / "config.yaml", other)
    changed = scored(run)
    changed["scorer"]["name"] = "another"
    (other / "evaluation.json").write_text(json.dumps(changed))
    capsys.readouterr()
    assert main(["evaluate", "--compare", str(run), str(other)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "CLIP" not in lines[0]
    assert len(lines) == 4
    assert "different scorers" in lines[-1]
    assert main(["evaluate", "--compare", str(run), str(other), "--json"]) == 0
    assert [row["run"] for row in json.loads(capsys.readouterr().out)["runs"]] == [
        str(run),
        str(other),
    ]


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index, colour in enumerate(("red", "green", "blue")):
        Image.new("RGB", (64, 64), colour).save(folder / f"{index}.png")
    (tmp_path / "three.txt").write_text("red apple\nfrog, noto style\nblue heart\n")
    return folder


def score(pictures, *arguments):
    return main(
        ["evaluate", "--images", str(pictures), "--scorer", "embedded", *map(str, arguments)]
    )


def test_any_folder_of_pictures_can_be_scored(pictures, tmp_path, images, capsys):
    output = tmp_path / "scores.json"
    assert (
        score(
            pictures,
            "--prompts",
            tmp_path / "three.txt",
            "--style-dir",
            images,
            "--output",
            output,
            "--json",
        )
        == 0
    )
    found = json.loads(output.read_text())
    assert found == json.loads(capsys.readouterr().out)
    assert found["clip_score"]["n"] == 3
    assert [row["content"] for row in found["images"]] == ["red apple", "frog", "blue heart"]
    assert found["style"]["n_style"] == 6
    assert found["unusable"] == []


def test_what_sample_left_needs_no_prompts(tmp_path, prompts, capsys):
    folder = tmp_path / "out"
    main(["sample", "--model", "tiny", "--prompts", str(prompts), "--output-dir", str(folder)])
    capsys.readouterr()
    assert score(folder / "samples", "--json") == 0
    assert [row["file"] for row in json.loads(capsys.readouterr().out)["images"]] == [
        "000.png",
        "001.png",
    ]
    # grid.png beside them is no picture of a prompt
    assert score(folder / "samples", "--prompts", prompts) == 0


def test_pictures_are_paired_in_the_order_of_their_numbers(tmp_path, capsys):
    folder = tmp_path / "many"
    names = ["s1/p_9.png", "s1/P_10.png", "s2/p_1.png", "s10/p_1.png"]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16)).save(folder / name)
    (tmp_path / "p.txt").write_text("".join(f"thing {index}\n" for index in range(4)))
    assert score(folder, "--prompts", tmp_path / "p.txt", "--json") == 0
    captured = capsys.readouterr()
    pairs = [(row["file"], row["prompt"]) for row in json.loads(captured.out)["images"]]
    assert pairs == [(name, f"thing {index}") for index, name in enumerate(names)]
    assert "s1/p_9.png <- thing 0\n  s1/P_10.png <- thing 1" in captured.err


def test_how_prompts_were_read_is_told(pictures, tmp_path, capsys):
    text = "red “apple” --w 512\nfrog\nblue heart --d 3\n"
    (tmp_path / "windows.txt").write_bytes(text.encode("cp1252"))
    assert score(pictures, "--prompts", tmp_path / "windows.txt", "--json") == 0
    captured = capsys.readouterr()
    prompts = [row["prompt"] for row in json.loads(captured.out)["images"]]
    assert prompts == ["red “apple”", "frog", "blue heart"]
    assert "is not UTF-8" in captured.err
    assert "options behind prompts are left out: --w (line 1" in captured.err
    assert "--d (line 3" in captured.err


def test_an_order_that_nobody_can_mistake_is_not_told(pictures, tmp_path, capsys):
    assert score(pictures, "--prompts", tmp_path / "three.txt") == 0
    error = capsys.readouterr().err
    assert "the first pairs" not in error
    assert "Content score" in error
    assert "CLIP score" not in error


def test_a_corrupt_picture_is_named_and_counted(pictures, tmp_path, capsys):
    (pictures / "1.png").write_bytes((pictures / "1.png").read_bytes()[:50])
    assert score(pictures, "--prompts", tmp_path / "three.txt", "--json") == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert [row["prompt"] for row in found["images"]] == ["red apple", "blue heart"]
    assert found["unusable"][0]["file"] == "1.png"
    assert "1.png is left out" in captured.err


def test_one_picture_is_scored_with_a_warning(pictures, tmp_path, capsys):
    for name in ("1.png", "2.png"):
        (pictures / name).unlink()
    (tmp_path / "one.txt").write_text("red apple\n")
    assert score(pictures, "--prompts", tmp_path / "one.txt", "--json") == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["clip_score"]["ci95"] is None
    assert "one picture has no interval" in captured.err


@pytest.mark.parametrize(
    "case",
    [
        "too few prompts",
        "no prompts",
        "empty folder",
        "no folder",
        "all corrupt",
        "unknown scorer",
        "table",
    ],
)
def test_bad_input_is_told_and_costs_nothing(pictures, tmp_path, capsys, case):
    prompts, folder, more = tmp_path / "three.txt", pictures, []
    if case == "too few prompts":
        prompts.write_text("red apple\n")
    if case == "empty folder":
        folder = tmp_path / "empty"
        folder.mkdir()
    if case == "no folder":
        folder = tmp_path / "nowhere"
    if case == "all corrupt":
        for file in pictures.iterdir():
            file.write_bytes(b"no picture")
    if case == "table":
        (pictures / "prompts.json").write_text('[{"file": "../../etc/passwd", "prompt": "a"}]')
    if case == "unknown scorer":
        more = ["--scorer", "ViT-Z/nothing"]
    if case not in ("no prompts", "table"):
        more += ["--prompts", prompts]
    failing(capsys, score(folder, *more))


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
    assert (
        main(
            [
                "evaluate",
                "--scorer",
                "embedded",
                "--run",
                str(run),
                "--prompts",
                str(prompts),
                "--json",
            ]
        )
        == 0
    )
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
