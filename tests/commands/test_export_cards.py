"""Cards of exports: scores of the exported scales alone, nothing private, names escaped."""

import json
import shutil

import pytest

from qzo_diffusion.cli import main
from qzo_diffusion.runs.style.export_use import USE
from qzo_diffusion.runs.tuned import load_scales

pytestmark = pytest.mark.usefixtures("small_tiny")


def test_cards_of_4_bit_folders_say_that_diffusers_needs_a_gpu():
    needing = {kind for kind, text in USE.items() if "No GPU found" in text}
    assert needing == {"nf4", "native"}


def scores_in(folder):
    return (folder / "README.md").read_text().split("## Scores")[1].split("## Settings")[0]


@pytest.mark.parametrize(
    ("kind", "part"), [("delta", ""), ("delta", "checkpoints/step_000001"), ("journal", "")]
)
def test_only_scores_of_the_exported_scales_are_told(coarse, tmp_path, export, kind, part):
    run, step = shutil.copytree(coarse, tmp_path / "run"), 1 if part else 2
    assert "held-out loss" in scores_in(export(kind, run=run, name="losses")) or part
    (run / "evaluation.json").write_text(
        json.dumps({"step": 3 - step, "clip_score": {"mean": "of other scales"}})
    )
    assert "other scales" not in scores_in(export(kind, run=run / part, name="other"))
    (run / f"evaluation_step_{step:06d}.json").write_text(
        json.dumps({"step": step, "clip_score": {"mean": "of these"}})
    )
    assert "of these" in scores_in(export(kind, run=run / part, name="own"))


@pytest.fixture
def told(finished, tmp_path, monkeypatch):
    """A copy of the run whose settings, metadata and journal name places, a user and a machine."""
    from qzo_diffusion.core.journal import encoded, read_journal
    from qzo_diffusion.runs import publish
    from qzo_diffusion.system.files import SCALES, write_folder
    from qzo_diffusion.train.run_folder import save_tensors

    monkeypatch.setenv("LOGNAME", "annalena")
    monkeypatch.setattr(publish.socket, "gethostname", lambda: "workhorse")
    run = shutil.copytree(finished, tmp_path / "# <b>annalena<br>\n[ink](x) on workhorse")
    settings = (run / "config.yaml").read_text()
    settings = settings.replace("cache_dir: ", "cache_dir: /srv/annalena/")
    settings = settings.replace("prompts: ", "prompts: /srv/annalena/")
    settings = settings.replace("weight: 0.0", "weight: 1.0")  # without it prior.prompts is refused
    (run / "config.yaml").write_text(settings)
    tensors, facts = load_scales(run)
    facts["qzo.model"], facts["qzo.mix"] = "/srv/annalena/tiny", "/srv/annalena/a=1 /srv/b=0.5"
    write_folder(run / "final", lambda folder: save_tensors(folder / SCALES, tensors, facts))
    journal = read_journal(run / "journal.qzo")
    header = {**journal.header, "init_from": "/srv/annalena/before"}
    (run / "journal.qzo").write_bytes(encoded(header, journal.entries))
    environment = json.loads((run / "environment.json").read_text())
    environment |= {"node": "workhorse", "model": "/srv/annalena/tiny"}
    (run / "environment.json").write_text(json.dumps(environment))
    return run


@pytest.mark.parametrize("kind", ["bf16", "delta", "journal"])
def test_what_is_published_names_no_place_user_or_machine(told, export, kind):
    folder = export(kind, run=told)
    assert main(["report", "--run", str(told)]) == 0
    files = [path for path in folder.iterdir() if path.is_file()] + [told / "report.html"]
    assert len(files) > 3
    for file in files:
        data = file.read_bytes()
        for secret in (b"annalena", b"workhorse", b"/srv", str(told.parent).encode()):
            assert secret not in data, (file.name, secret)


def test_a_card_escapes_names_and_shows_tables(told, export):
    import markdown_it

    text = (export("delta", run=told) / "README.md").read_text()
    assert "{" not in text
    parser = markdown_it.MarkdownIt("commonmark", {"html": True}).enable("table")
    page = parser.render(text.split("---\n", 2)[2])
    assert page.count("<h1>") == 1
    assert "&lt;b&gt;" in page
    assert "<b>" not in page
    assert 'href="x"' not in page
    assert page.count("<table>") == 1  # nothing was measured


def test_a_card_shows_the_verdict_and_the_figures_of_an_evaluation(finished, tmp_path, export):
    from tests.evaluate.test_report_in_browser import evaluation

    run = shutil.copytree(finished, tmp_path / "scored")
    (run / "evaluation.json").write_text(json.dumps(evaluation() | {"step": 2}))
    text = (export("delta", run=run) / "README.md").read_text()
    assert "The style came" in text
    assert "| Similarity to the style | 0.3000 | 0.5000 | +0.2000 | +0.1500 to +0.2500 |" in text
    assert "CLIP score" not in text
