"""Texts, tables and pictures."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from benchmarks.forged import forgeries as f
from benchmarks.forged.reader import Found, Reader, of_value
from qzo_diffusion.config.files import make_config, read_yaml
from qzo_diffusion.config.style import Config
from qzo_diffusion.diffusion.captions import read_captions
from qzo_diffusion.diffusion.images import open_image
from qzo_diffusion.diffusion.prompts import read_prompt_file
from qzo_diffusion.llm.data_files import read_rows
from qzo_diffusion.llm.task_file import read_task
from qzo_diffusion.runs import report
from qzo_diffusion.runs.style.evaluate import compare
from qzo_diffusion.train import checkpoint as checkpoints


def writes(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: _write(folder / name, text)


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def reads(name: str, read: Callable[[Path], Any]) -> Callable[[Path], Found]:
    return lambda folder: of_value(read(folder / name))


EVALUATION = {
    "step": 2,
    "scorer": {"name": "embedded", "note": ""},
    "style": {
        "similarity": {"mean": 0.5, "delta": 0.1, "delta_ci95": [0.0, 0.2]},
        "kid": {"value": 0.1},
        "diversity": {"tuned": 0.4},
    },
    "clip_score": {"mean": 0.3, "delta": 0.0, "delta_ci95": [-0.1, 0.1]},
    "validation_loss": {"tuned": 1.0, "delta": -0.1},
    "prompts": [{"prompt": "a cat", "content": "a cat"}],
    "sampling": {"seed": 1, "steps": 2, "guidance": 1.0},
}
SCORES = {"task": "sst2", "metric": "accuracy", "test_examples": 8, "by_step": {"0": 0.5, "9": 0.6}}
ROWS = [{"file": f"{i}.png", "sha256": "ab" * 16, "caption": f"a {i}"} for i in range(8)]
METRICS = "".join(
    json.dumps({"step": i, "loss": 1.5 / (i + 1), "lr": 0.1}) + "\n" for i in range(9)
)
CAPTIONS = "".join(
    json.dumps({"file_name": f"{i}.png", "text": f"a drawing {i}"}) + "\n" for i in range(4)
)
CONFIG = """model: tiny
method: qzo
data:
  style_dir: imgs
  caption: "a picture: in [trigger] style"
  trigger: ink
  batch_size: 4
train:
  max_steps: 10
  lr: 1e-3
qzo:
  num_directions: 8
  layers: [ff.net, attn]
"""
TASK = """name: own
train: [a.tsv]
test: [b.tsv]
columns: [sentence, label]
template: "{sentence} It was"
label: label
choices:
  "0": " terrible"
  "1": " great"
metric: accuracy
"""
PROMPTS = "a red apple\na lighthouse by the sea --n blurry\nein Bär 🐻\n"
SQUAD = json.dumps(
    {
        "data": [
            {
                "paragraphs": [
                    {
                        "context": f"The number is {i}.",
                        "qas": [
                            {
                                "question": "Which?",
                                "id": str(i),
                                "answers": [{"text": str(i), "answer_start": 14}],
                            }
                        ],
                    }
                ]
            }
            for i in range(4)
        ]
    }
)
DATA = {
    "data.tsv": "sentence\tlabel\n" + "".join(f"film {i}\t{i % 2}\n" for i in range(9)),
    "data.csv": "sentence,label\n" + "".join(f'"film, {i}",{i % 2}\n' for i in range(9)),
    "data.jsonl": "".join(
        json.dumps({"sentence": f"film {i}", "label": i}) + "\n" for i in range(9)
    ),
    "data.json": SQUAD,
}
FIELDS = {"data.json": ["context", "question"]}


def rows_of(path: Path) -> Any:
    return read_rows(path, FIELDS.get(path.name, ["sentence", "label"]), [])


def make_parquet(folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"sentence": [f"film {i}" for i in range(9)], "label": list(range(9))})
    pq.write_table(table, folder / "data.parquet")


def make_captions(folder: Path) -> None:
    for index in range(4):
        Image.new("RGB", (32, 32), (60 * index, 0, 0)).save(folder / f"{index}.png")
    (folder / "metadata.jsonl").write_text(CAPTIONS)
    (folder / "0.txt").write_text("a drawing of a ship, in ink")


def use_captions(folder: Path) -> Found:
    images = sorted(folder.glob("*.png"))
    return of_value(read_captions(folder, images, fallback="", trigger=None))


def make_picture(name: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        pixels = torch.randint(0, 256, (48, 64, 3), generator=torch.Generator().manual_seed(1))
        Image.fromarray(pixels.to(torch.uint8).numpy()).save(folder / name)

    return make


def use_picture(path: Path) -> Any:
    image = open_image(path).image
    return image.size, image.tobytes()


def use_report(folder: Path) -> Found:
    (folder / "config.yaml").write_text(CONFIG)
    return of_value((report.read_metrics(folder), report.grid_prompts(folder)))


def use_page(folder: Path) -> Found:
    (folder / "config.yaml").write_text(CONFIG)
    report.write(folder)
    return Found(b"")


def use_cut(folder: Path) -> Found:
    return of_value(checkpoints.cut_metrics(folder / "metrics.jsonl", 5))


def readers() -> list[Reader]:
    dataset, evaluation = json.dumps(ROWS), json.dumps(EVALUATION)
    texts = [
        Reader(
            "metrics, report", "metrics.jsonl", writes("metrics.jsonl", METRICS), use_report, f.JSON
        ),
        Reader(
            "metrics, resume", "metrics.jsonl", writes("metrics.jsonl", METRICS), use_cut, f.JSON
        ),
        Reader("dataset.json", "dataset.json", writes("dataset.json", dataset), use_page, f.JSON),
        Reader(
            "environment.json",
            "environment.json",
            writes("environment.json", '{"device": "cpu", "packages": {}}'),
            use_page,
            f.JSON,
        ),
        Reader(
            "evaluation.json",
            "evaluation.json",
            writes("evaluation.json", evaluation),
            reads("evaluation.json", lambda path: compare([path])),
            f.JSON,
        ),
        Reader(
            "evaluation.json, report",
            "evaluation.json",
            writes("evaluation.json", json.dumps(SCORES)),
            use_page,
            f.JSON,
        ),
        Reader(
            "config",
            "c.yaml",
            writes("c.yaml", CONFIG),
            reads("c.yaml", lambda path: make_config(read_yaml(path), Config)),
            f.YAML,
        ),
        Reader(
            "task",
            "t.yaml",
            writes("t.yaml", TASK),
            reads("t.yaml", lambda path: read_task(str(path))),
            f.YAML,
        ),
        Reader(
            "prompts", "p.txt", writes("p.txt", PROMPTS), reads("p.txt", read_prompt_file), f.TEXT
        ),
        Reader("metadata.jsonl", "metadata.jsonl", make_captions, use_captions, f.JSON),
        Reader("caption", "0.txt", make_captions, use_captions, f.TEXT),
    ]
    if importlib.util.find_spec("pyarrow"):  # which comes with the extra for data sets
        name = "data.parquet"
        texts.append(Reader(name, name, make_parquet, reads(name, rows_of), f.BYTES))
    texts += [
        Reader(
            name,
            name,
            writes(name, text),
            reads(name, rows_of),
            f.JSON if "json" in name else f.TEXT,
        )
        for name, text in DATA.items()
    ]
    pictures = {"a.png": (f.png_size,), "a.jpg": (f.jpeg_size,), "a.webp": (), "a.tiff": ()}
    return texts + [
        Reader(name, name, make_picture(name), reads(name, use_picture), (*f.BYTES, *more))
        for name, more in pictures.items()
    ]
