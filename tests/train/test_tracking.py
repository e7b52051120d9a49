"""The curves are files that TensorBoard reads."""

import io
import json
import socket

from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.summary.writer.record_writer import RecordWriter

from qzo_diffusion.train.tracking import Curves, MetricsLog, Tracker, _Whole


def test_tensorboard_reads_the_curves(tmp_path):
    curves = Curves(tmp_path / "tensorboard")
    for step in range(3):
        curves.add("train/loss", 1.0 / (step + 1), step)
    curves.close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    events = list(EventFileLoader(str(file)).Load())
    assert events[0].file_version == "brain.Event:2"
    found = [
        (event.step, event.summary.value[0].tag, event.summary.value[0].tensor.float_val[0])
        for event in events[1:]
    ]
    assert [(step, tag) for step, tag, _ in found] == [(step, "train/loss") for step in range(3)]
    assert [round(value, 6) for _, _, value in found] == [1.0, 0.5, 0.333333]


def test_a_write_that_takes_less_than_it_is_given_goes_on(tmp_path):
    class Slow(io.FileIO):
        def write(self, data):
            return super().write(memoryview(data)[:7])

    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.close()
    with Slow(tmp_path / "metrics.jsonl", "ab") as log._file:
        log.write({"step": 1, "loss": 0.5})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": 0.5}
    curves = Curves(tmp_path / "tensorboard")
    (file,) = (tmp_path / "tensorboard").iterdir()
    curves.close()
    with Slow(file, "ab") as slow:
        curves._records = RecordWriter(_Whole(slow))
        curves.add("train/loss", 0.25, 3)
    (_, event) = EventFileLoader(str(file)).Load()
    assert event.step == 3


def test_tensorboard_shows_the_pictures_of_each_step(tmp_path):
    tracker = Tracker(tmp_path, 10, show_progress=False)
    for step, colour in ((0, "red"), (10, "blue")):
        tracker.on_pictures(step, Image.new("RGB", (6, 4), colour))
    tracker.close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    assert socket.gethostname() not in file.name
    events = EventAccumulator(str(file)).Reload()
    found = events.Images("samples")
    assert [(one.step, one.width, one.height) for one in found] == [(0, 6, 4), (10, 6, 4)]
    with Image.open(io.BytesIO(found[1].encoded_image_string)) as picture:
        assert picture.getpixel((0, 0)) == (0, 0, 255)
