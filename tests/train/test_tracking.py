"""The curves are files that TensorBoard reads."""

from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from qzo_diffusion.train.tracking import Curves


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
