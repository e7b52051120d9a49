"""Sentences of the documents that code can check: figures, flags, settings, files, links, ids."""

import argparse
import ast
import json
import re
from functools import cache
from pathlib import Path

import pytest
import yaml

from qzo_diffusion import cli, resources
from qzo_diffusion.config.files import known_keys, make_config
from qzo_diffusion.config.llm import LlmConfig
from qzo_diffusion.config.style import Config
from qzo_diffusion.core.journal import JournalWriter, StepEntry
from qzo_diffusion.core.quzo import stochastic_round
from qzo_diffusion.core.scales import overridden_at_once

ROOT = Path(__file__).parents[1]
DECISIONS = ROOT / "docs" / "decisions"
DOCUMENTS = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "benchmarks").rglob("*.md")),
    *sorted((ROOT / "configs").glob("*.yaml")),
]
SOURCES = [path for room in ("qzo_diffusion", "benchmarks") for path in (ROOT / room).rglob("*.py")]
WORDS = dict(enumerate(["no", "one", "two", "three", "four", "five", "six", "seven", "eight"]))

# Flags of other programs that documents name.
FOREIGN_FLAGS = {"--exclude", "--repo-type", "--logdir", "--nsamples", "--num_codebooks"}
FOREIGN_FLAGS |= {"--nbits_per_codebook", "--in_group_size", "--save", "--save_safetensors"}
FOREIGN_FLAGS |= {"--dist", "--system-site-packages"}
# Keys of the metadata in safetensors files, which begin as settings of section `qzo` do.
METADATA = {"format", "model", "codes", "quant_type", "blocksize", "seed", "version", "steps"}
METADATA |= {"method", "task", "mix"}
FILE_ENDINGS = {"tsv", "csv", "json", "jsonl", "yaml", "py", "md", "txt", "png", "parquet"}


def every_document(check):
    return pytest.mark.parametrize(
        "path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix()
    )(check)


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
    keys = {*known_keys(Config), *known_keys(LlmConfig)}
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


@every_document
def test_flags_and_verbs_exist(path):
    assert wrong_flags(text_of(path)) == []


@every_document
def test_settings_exist(path):
    assert wrong_settings(text_of(path)) == []


def test_settings_that_the_code_names_exist():
    package = [path for path in SOURCES if path.is_relative_to(ROOT / "qzo_diffusion")]
    metadata = {f"qzo.{name}" for name in METADATA}
    named = {path.name: wrong_settings("\n".join(strings_of(path))) for path in package}
    wrong = {name: set(keys) - metadata for name, keys in named.items()}
    assert {name: keys for name, keys in wrong.items() if keys} == {}


@every_document
def test_presets_formats_and_methods_exist(path):
    text = text_of(path)
    presets = {config.stem for config in (ROOT / "configs").glob("*.yaml")}
    named = {*re.findall(r"--preset (\w+)", text), *re.findall(r"`(sd35_\w+gb)`", text)}
    assert named - {"NAME"} <= presets
    (formats,) = (a.choices for a in verbs()["export"]._actions if "--format" in a.option_strings)
    assert set(re.findall(r"--format ([a-z]\w*)", text)) <= set(formats)
    methods = set(LlmConfig.model_fields["method"].annotation.__args__)
    assert set(re.findall(r"--method ([a-z][\w-]*)", text)) <= methods


@every_document
def test_links_files_modules_and_targets_exist(path):
    text = text_of(path)
    assert broken_links(path, text) == []
    assert wrong_files(text, (ROOT, ROOT / "qzo_diffusion", path.parent)) == []
    for module in re.findall(r"python -m (benchmarks[\w.]*\w)", text):
        place = ROOT / module.replace(".", "/")
        assert place.is_dir() or place.with_suffix(".py").is_file(), module
    targets = set(re.findall(r"^([a-z][\w-]*):", text_of(ROOT / "Makefile"), re.MULTILINE))
    assert set(re.findall(r"(?:^|`)make ([a-z][\w-]*)", text, re.MULTILINE)) <= targets


def test_documents_that_the_code_names_exist():
    wrong = {path.name: wrong_files(text_of(path)) for path in SOURCES}
    assert {name: files for name, files in wrong.items() if files} == {}


def test_decisions_are_short_and_in_the_index():
    index = text_of(DECISIONS / "README.md")
    for number, (name, lines) in decisions().items():
        assert len(lines) <= 8, number
        assert any("Status:" in line for line in lines), number
        row = next(line for line in index.splitlines() if f"]({name})" in line)
        assert re.search(rf"\b{number} ", row), f"{number} is missing in the index"
    assert max(int(number[1:]) for number in decisions()) < int(
        re.search(r"next free number is (\d+)", index)[1]
    )


def test_cited_decisions_exist():
    documents = [*DOCUMENTS, *SOURCES]
    wrong = {str(path): wrong_citations(text_of(path)) for path in documents}
    assert {path: ids for path, ids in wrong.items() if ids} == {}


@pytest.mark.parametrize("path", [*DOCUMENTS, ROOT / "CHANGELOG.md", ROOT / "NOTICE"], ids=str)
def test_nothing_names_a_machine_or_a_user(path):
    assert re.findall(r"(?<![\w.~])/(?:home|root|Users|tmp|work|mnt|data)/\S*", text_of(path)) == []


def test_results_name_no_machine_or_user():
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        assert not re.search(r'"/|[ =]/(?:home|root|Users|tmp|work|mnt)/', text_of(path)), path.name


def test_the_readme_fits_on_one_screen():
    assert len(text_of(ROOT / "README.md").splitlines()) <= 80


def bytes_of_a_step(scalars, folder):
    """Measured: the length of one record."""
    writer = JournalWriter.create(folder / f"{scalars}.qzo", {})
    before = writer.path.stat().st_size
    writer.append(StepEntry(0, 0, 0.1, 0.01, 1.0, (0.5,) * scalars))
    writer.close()
    return writer.path.stat().st_size - before


def test_bytes_a_step_are_those_of_the_journal(tmp_path):
    pictures, texts = make_config({}), make_config({}, LlmConfig)
    counts = [c.data.batch_size * c.qzo.num_directions * c.qzo.regions for c in (pictures, texts)]
    measured = [bytes_of_a_step(count, tmp_path) for count in (*counts, 1)]
    written = [f"{number:,}" for number in measured]
    sentence = re.search(
        r"pictures takes ([\d,]+) bytes: .* texts it takes ([\d,]+), .* direction ([\d,]+)\.",
        text_of(ROOT / "docs" / "how_it_works.md"),
    )
    assert list(sentence.groups()) == written
    ranks = ["32"]  # what a rank sends with one direction: benchmarks/results/scale_out.json
    for path in [*DOCUMENTS, *SOURCES]:
        for number in re.findall(r"([\d,]+) bytes a step", text_of(path)):
            assert number in written + ranks, path


def test_megabytes_that_exist_twice_are_those_of_the_code():
    cpu, gpu = (4 * overridden_at_once(2**40, device) // 2**20 for device in ("cpu", "cuda"))
    sentence = f"At most {cpu} MB of scales exist twice on a CPU and {gpu} MB on a GPU"
    assert sentence in text_of(ROOT / "docs" / "how_it_works.md")
    for path in DOCUMENTS:
        for line in text_of(path).splitlines():
            if re.search(r"exist twice", line):
                assert sentence in line, path


def test_a_default_step_is_as_the_documents_say():
    config = make_config({})
    images, probes = WORDS[config.data.batch_size], WORDS[config.qzo.num_directions]
    assert config.qzo.estimator == "leave_one_out"
    assert f"A default step takes {images} images" in text_of(ROOT / "README.md")
    how = text_of(ROOT / "docs" / "how_it_works.md")
    assert f"mean of the other {WORDS[config.qzo.num_directions - 1]}" in how
    assert f"{probes} directions of each of {images} examples" in text_of(
        DECISIONS / "estimator.md"
    )


def test_the_small_card_is_described_as_its_preset():
    config = make_config(yaml.safe_load(text_of(ROOT / "configs" / "sd35_large_8gb.yaml")))
    assert config.train.micro_batch_size == 1
    row = next(
        line
        for line in text_of(ROOT / "docs" / "sd35.md").splitlines()
        if line.startswith("| `sd35_large_8gb`")
    )
    assert f"a batch of {WORDS[config.data.batch_size]}, one probe at a time" in row
    assert f"{config.data.resolution} px" in row


def test_stochastic_rounding_is_as_exact_as_it_says():
    """Chances are 31 random bits in fp32, which has 24: the worst error lies just below 1."""
    import torch

    raw = torch.arange(2**31 - 2**12, 2**31)
    worst = (raw.float().double() - raw.double()).abs().max().item() * 2.0**-31
    (power,) = re.findall(r"exact to 2\^-(\d+) near 1", " ".join(stochastic_round.__doc__.split()))
    assert worst == 2.0 ** -int(power)
    exact = torch.arange(2**24 - 2**12, 2**24 + 1)
    assert torch.equal(exact.float().long(), exact)  # below 2^-7


def test_sizes_and_defaults_are_those_of_the_code():
    size = sum(path.stat().st_size for path in resources.tiny_model().rglob("*") if path.is_file())
    (most,) = re.findall(r"`tiny` \(under (\d+) MB", text_of(ROOT / "docs" / "how_it_works.md"))
    assert size < int(most) * 10**6
    examples = make_config({}, LlmConfig).data
    llm = text_of(ROOT / "docs" / "llm.md")
    told = re.findall(r"`data\.(\w+_examples)`\s\((\d[\d,]*\d)", llm)
    assert len(told) == 3
    for name, number in told:
        assert number == f"{getattr(examples, name):,}"


def test_exit_codes_are_those_of_the_command_line():
    codes = re.findall(r"^\| (\d+) \|", text_of(ROOT / "docs" / "usage.md"), re.MULTILINE)
    assert codes == [str(code) for code in (cli.DONE, cli.MENDABLE, cli.INTERRUPTED)]


def test_the_demo_is_described_by_its_own_figures():
    facts = json.loads(text_of(ROOT / "docs" / "images" / "demo.json"))
    loss, score = facts["validation_loss"], facts["evaluation"]["clip_score"]
    readme = " ".join(text_of(ROOT / "README.md").split())
    assert f"falls by {100 * (1 - loss['end'] / loss['start']):.0f} %" in readme
    assert f"from {score['base_mean']:.2f} to {score['mean']:.2f}" in readme


@pytest.mark.parametrize(
    ("check", "text"),
    [
        (wrong_flags, "`qzo-diffuse sample --promts FILE`"),
        (wrong_flags, "`qzo-diffuse report --max-steps 3`"),
        (wrong_flags, "`qzo-diffuse tune`"),
        (wrong_settings, "set `train.learn_rate=0.1`"),
        (wrong_files, "see core/no_such_file.py"),
        (wrong_citations, "docs/decisions/rates.md D1"),
        (wrong_citations, "as D999 says"),
    ],
)
def test_the_checks_find_what_is_wrong(check, text):
    assert check(text) != []
