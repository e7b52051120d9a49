"""The site of the documents, and that the notebook calls what exists."""

import ast
import json
import re

import pytest
import yaml

from tests.documents import ROOT, broken_links, wrong_flags, wrong_settings

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def test_the_site_holds_the_documents_and_asks_no_other_server():
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))
    assert (ROOT / site["docs_dir"] / "index.md").is_file()
    assert site["theme"]["font"] is False  # a reader's browser would ask for it
    assert "search" in site["plugins"]


def cells(notebook):
    return json.loads(notebook.read_text("utf-8"))["cells"]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.name)
def test_commands_of_a_notebook_exist(notebook):
    text = "\n".join("".join(cell["source"]) for cell in cells(notebook))
    commands = re.sub(r"\\\n\s*", "", text).replace("!qzo-diffuse", "qzo-diffuse")
    assert "qzo-diffuse train" in commands
    assert wrong_flags(f"```\n{commands}\n```") == []
    assert wrong_settings(commands) == []
    assert broken_links(notebook, text) == []
    presets = {config.stem for config in (ROOT / "configs").glob("*.yaml")}
    assert set(re.findall(r"--preset (\w+)", commands)) <= presets


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_is_stored_without_results_and_its_python_is_python(notebook):
    facts = json.loads(notebook.read_text("utf-8"))
    assert facts["nbformat"] == 4
    assert len({cell["id"] for cell in facts["cells"]}) == len(facts["cells"])
    for cell in facts["cells"]:
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)
            lines = "".join(cell["source"]).splitlines()
            if not any(line.startswith("!") for line in lines):
                ast.parse("\n".join(line for line in lines if not line.startswith("%")))


def test_a_wrong_flag_in_a_notebook_would_be_found():
    assert wrong_flags("```\nqzo-diffuse train --stile-dir imgs\n```") != []
