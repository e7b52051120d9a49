"""Checks of names in the documents: flags, settings, files, links, decisions."""

import argparse
import ast
import re
from functools import cache
from pathlib import Path

from qzo_diffusion import cli
from qzo_diffusion.config.files import known_keys
from qzo_diffusion.config.llm import LlmConfig
from qzo_diffusion.config.sections import NEW_KEYS
from qzo_diffusion.config.style import Config

ROOT = Path(__file__).parents[1]
DECISIONS = ROOT / "docs" / "decisions"
DOCUMENTS = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "benchmarks").rglob("*.md")),
    *sorted((ROOT / "configs").glob("*.yaml")),
]
SOURCES = [path for room in ("qzo_diffusion", "benchmarks") for path in (ROOT / room).rglob("*.py")]

# Flags of other programs that documents name.
FOREIGN_FLAGS = {"--exclude", "--repo-type", "--logdir", "--nsamples", "--num_codebooks"}
FOREIGN_FLAGS |= {"--nbits_per_codebook", "--in_group_size", "--save", "--save_safetensors"}
FOREIGN_FLAGS |= {"--dist", "--system-site-packages", "--nproc-per-node", "--local-dir"}
# Keys of the metadata in safetensors files, which begin as settings of section `qzo` do.
METADATA = {"format", "model", "codes", "quant_type", "blocksize", "seed", "version", "steps"}
METADATA |= {"method", "task", "mix"}
FILE_ENDINGS = {"tsv", "csv", "json", "jsonl", "yaml", "py", "md", "txt", "png", "parquet"}


@cache
def text_of(path):
    return path.read_text("utf-8")


@cache
def verbs():
    """Words of a verb ("llm train") -> its parser."""
    found = {}

    def walk(parser, words):
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for name, inner in action.choices.items():
                    walk(inner, (*words, name))
                return
        found[" ".join(words)] = parser

    walk(cli.make_parser(), ())
    return found


def flags_of(parser):
    return {flag for action in parser._actions for flag in action.option_strings}


def wrong_flags(text):
    """`verb --flag` for each flag that its verb lacks, `--flag` for one that nothing has."""
    every = set().union(*map(flags_of, verbs().values()), FOREIGN_FLAGS, {"--version"})
    every |= {flag for path in SOURCES for flag in re.findall(r'"(--[a-z][\w-]+)"', text_of(path))}
    wrong = [flag for flag in flags_in(text) if flag not in every]
    for command in re.findall(r"qzo-diffuse ([a-z][^`\n|#]*)", text):
        words = command.split()
        verb = next((v for v in (" ".join(words[:2]), words[0]) if v in verbs()), None)
        if verb is not None:
            known = flags_of(verbs()[verb])
            wrong += [f"{verb} {flag}" for flag in flags_in(command) if flag not in known]
        elif words[0] != "llm":
            wrong.append(f"no verb {words[0]}")
    return wrong


def flags_in(text):
    return re.findall(r"(?<![\w-])--[a-z][\w-]+", text)


def wrong_settings(text):
    keys = {*known_keys(Config), *known_keys(LlmConfig), *NEW_KEYS}
    sections = "|".join({key.partition(".")[0] for key in keys if "." in key})
    named = re.findall(rf"(?<![\w./-])((?:{sections})\.([a-z]\w*))(?![\w/(.]*\()", text)
    return [
        key
        for key, name in named
        if key not in keys and name not in FILE_ENDINGS and not is_module(key)
    ]


def is_module(dotted):
    return (ROOT / "qzo_diffusion" / f"{dotted.replace('.', '/')}.py").is_file()


def strings_of(path):
    """Every string in a source, docstrings included, without the parts of f-strings."""
    tree = ast.parse(text_of(path))
    return [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]


def wrong_files(text, folders=(ROOT, ROOT / "qzo_diffusion")):
    """Names of files in the repository, `core/scales.py` meaning one of the package."""
    named = re.findall(r"(?<![\w./<-])((?:[\w-]+/)+[\w-]+\.(?:py|md|yaml|json|png))\b", text)
    tops = {path.name for folder in folders for path in folder.iterdir() if path.is_dir()}
    tops -= {"outputs"}
    return [
        name
        for name in named
        if name.partition("/")[0] in tops and not any((f / name).exists() for f in folders)
    ]


def broken_links(path, text):
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text)
    return [t for t in targets if "://" not in t and not (path.parent / t).exists()]


@cache
def decisions():
    """Id -> (file name, lines of the entry)."""
    found = {}
    for path in sorted(DECISIONS.glob("*.md")):
        for entry in re.split(r"^(?=## )", text_of(path), flags=re.MULTILINE)[1:]:
            number = re.match(r"## (D\d+) \S", entry)
            assert number, f"{path.name}: an entry without an id: {entry[:40]}"
            assert number[1] not in found, f"{number[1]} is there twice"
            found[number[1]] = (path.name, entry.strip().splitlines())
    return found


def wrong_citations(text):
    wrong = [i for i in re.findall(r"(?<![\w#-])D\d{1,3}(?!\w)", text) if i not in decisions()]
    cited = re.findall(r"decisions/(\w+\.md)\)?[ :,]+(D\d+)", text)
    return wrong + [f"{f} {i}" for f, i in cited if decisions().get(i, ("",))[0] != f]
