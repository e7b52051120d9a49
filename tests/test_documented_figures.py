"""Figures in the documents are those of the code and of the files that they come from."""

import json
import re

import pytest
import torch
import yaml

from benchmarks.comparison import report as comparison
from qzo_diffusion import resources
from qzo_diffusion.config.files import make_config
from qzo_diffusion.config.llm import LlmConfig
from qzo_diffusion.core import journal_format
from qzo_diffusion.core.journal import JournalWriter
from qzo_diffusion.core.journal_format import StepEntry
from qzo_diffusion.core.rounding import stochastic_round
from qzo_diffusion.core.scales import overridden_at_once
from qzo_diffusion.system.console import DONE, INTERRUPTED, MENDABLE
from tests.documents import DECISIONS, DOCUMENTS, ROOT, SOURCES, text_of

WORDS = dict(enumerate(["no", "one", "two", "three", "four", "five", "six", "seven", "eight"]))


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
    assert f"{bytes_of_a_step(0, tmp_path)} + 8 · " in journal_format.__doc__
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
    probes = WORDS[config.train.micro_batch_size]
    row = next(
        line
        for line in text_of(ROOT / "docs" / "sd35.md").splitlines()
        if line.startswith("| `sd35_large_8gb`")
    )
    assert f"a batch of {WORDS[config.data.batch_size]}, {probes} probes at a time" in row
    assert f"{config.data.resolution} px" in row


def test_stochastic_rounding_is_as_exact_as_it_says():
    """Chances are 31 random bits in fp32, which has 24: the worst error lies just below 1."""
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
    assert codes == [str(code) for code in (DONE, MENDABLE, INTERRUPTED)]


def test_the_demo_is_described_by_its_own_figures():
    facts = json.loads(text_of(ROOT / "docs" / "images" / "demo.json"))
    loss, score = facts["validation_loss"], facts["evaluation"]["clip_score"]
    readme = " ".join(text_of(ROOT / "README.md").split())
    assert f"falls by {100 * (1 - loss['end'] / loss['start']):.0f} %" in readme
    assert f"from {score['base_mean']:.2f} to {score['mean']:.2f}" in readme
    style = facts["evaluation"]["style_similarity"]
    table = text_of(ROOT / "docs" / "benchmarks.md")
    assert f"{loss['start']:.3f} -> {loss['end']:.3f}" in table
    assert f"{score['base_mean']:.3f} -> {score['mean']:.3f}" in table
    assert f"{style['delta']:+.3f}" in table


# File in benchmarks/results, keys inside, start of the row in docs/benchmarks.md, format.
FIGURES = [
    ("sd35_full_size", "load_peak_rss_gb", "peak while loading", "{:.2f} GB"),
    ("sd35_full_size", "stages.steps.default.step_peak_rss_gb", "peak of ten default", "{:.2f} GB"),
    ("sd35_full_size", "step_peak_rss_gb", "peak of ten dense", "{:.2f} GB"),
    ("sd35_full_size", "step_over_two_forwards", "time of a default", "{:.2f}"),
    ("sd35_full_size", "second_start_over_read", "second start", "{:.2f}"),
    ("sd35_full_size", "encoders_peak_rss_gb", "peak of T5-XXL", "{:.2f} GB"),
    ("sd35_full_size", "reward_step_peak_rss_gb", "peak of a step on a reward", "{:.2f} GB"),
    ("sd35_full_size", "reward_step_over_sampling", "time of that step", "{:.2f}"),
    ("everyday", "fo.steps_gb", "peak of a step by the exact", "{:.2f} GB"),
    ("everyday", "fo.plan_gb", "the memory plan | 6", "{:.2f} GB"),
    ("formats", "gguf_full_size.memory_over_inference", "memory of a step over pl", "{}"),
    ("formats", "gguf_full_size.step_over_forwards", "time of a step over them: m", "{:.2f}"),
    ("gpu_check", "large.512px.default.step_busy_over_two_forwards", "time the card", "{:.2f}"),
    ("gpu_check", "large.512px.default.step_seconds", "seconds on the clock", "{:.2f}"),
    ("gpu_check", "large.1024px.default.step_peak_gb", "peak memory |", "{:.2f} GB"),
    ("step_time", "cases.tiny_b16_float32.probes_over_two_forwards", "`tiny`, batch 16", "{:.2f}"),
    (
        "step_time",
        "cases.smollm2_b16_bfloat16.probes_over_two_forwards",
        "SmolLM2-135M, b",
        "{:.2f}",
    ),
    ("llm_compare", "tasks.sst2.default.accuracy", "accuracy of the default", "0.511 -> {:.3f}"),
    ("llm_compare", "tasks.sst2.default.validation_loss", "held-out loss of the d", "-> {:.3f}"),
    ("llm_memory", "methods.fo_scales.memory_over_inference", "the same of first order", "{:.1f}"),
    ("quzo", "memory_ratio_to_first_order", "memory of first-order fake-quant", "{:.1f}"),
    ("corruption", "trials", "damaged journals", "{:,}"),
    ("corruption", "applied_silently", "of them used wrongly", "{}"),
    ("hostile", "trials", "forged files", "{:,}"),
    ("hostile", "used_silently", "of them used silently", "{}"),
    ("hostile", "over_memory", "of them beyond their size", "{}"),
    ("kill_resume", "lost_steps", "completed steps lost", "{}"),
    ("replay", "times_faster_at_least", "slowest replay", "{} (dense Adam)"),
    ("scale_out", "throughput_ratio", "two ranks", "{:.2f}"),
    (
        "convergence",
        "default_ratio.geometric_mean",
        "geometric mean of the first row, with",
        "{:.1f}",
    ),
    ("convergence", "speedup.fluent_mono", "passes of the reference", "{:.1f}"),
    ("convergence", "speedup_by_rows.fluent_mono", "the same by every row", "{:.1f}"),
    ("convergence", "speedup.openmoji", "passes of the reference", "{:.1f}"),
    ("convergence", "speedup_by_rows.openmoji", "the same by every row", "{:.1f}"),
    ("convergence", "speedup.sst2", "passes of the reference", "{:.1f}"),
]


@pytest.mark.parametrize(("file", "keys", "row", "form"), FIGURES, ids=lambda value: str(value))
def test_benchmark_figures_are_those_of_their_files(file, keys, row, form):
    value = json.loads(text_of(ROOT / "benchmarks" / "results" / f"{file}.json"))
    for key in keys.split("."):
        value = value[key]
    lines = text_of(ROOT / "docs" / "benchmarks.md").splitlines()
    rows = [line for line in lines if line.startswith(f"| {row}")]
    assert any(form.format(value) in line for line in rows), rows


def test_the_table_of_cards_is_as_measured():
    large = json.loads(text_of(ROOT / "benchmarks" / "results" / "gpu_check.json"))["large"]
    rows = [line for line in text_of(ROOT / "README.md").splitlines() if "| H200" in line]
    steps = [
        large[size][step]
        for size, step in [
            ("512px", "default"),
            ("1024px", "default"),
            ("512px", "default_one_in_flight"),
        ]
    ]
    assert len(rows) == len(steps)
    for row, step in zip(rows, steps, strict=True):
        assert f"| {step['step_peak_gb']:.1f} GB |" in row
        seconds = step["step_seconds"]
        assert f"| {seconds:.2f} s " in row or f"| {seconds:.1f} s " in row


def test_the_tables_of_the_comparison_are_those_of_its_file():
    figures = json.loads(text_of(ROOT / "benchmarks" / "results" / "comparison.json"))
    tables = comparison.tables(figures)
    assert "sst2" in tables
    for table in tables.values():
        assert table.strip() in text_of(ROOT / "docs" / "comparison.md")
