"""Checkpoints with a journal: found, verified, restored, dropped when old."""

import json

import pytest
import torch

from qzo_diffusion.core.errors import JournalError, OutputError
from qzo_diffusion.core.journal import JournalWriter, read_journal
from qzo_diffusion.core.optimizer import make_optimizer, make_schedule
from qzo_diffusion.core.parametrization import tuned_scales
from qzo_diffusion.core.parametrize import parametrize
from qzo_diffusion.core.probing import Probing, StepBatch
from qzo_diffusion.runs.tuned import load_scales
from qzo_diffusion.train.checkpoint import (
    Checkpoint,
    bad_steps_at_end,
    checkpoint_folder,
    cut_metrics,
    drop_old,
    entry_of,
    list_checkpoints,
    load_checkpoint_,
    read_checkpoint,
    restore_,
    save_checkpoint,
)
from qzo_diffusion.train.loop import Setup, train
from tests.quantized import inputs, scaled_network, squared_output


class Run:
    """A network trained with journal and checkpoints in a folder."""

    def __init__(self, folder, optimizer="adam", level="layer"):
        folder.mkdir(exist_ok=True)
        self.folder, self.level, self.optimizer_name = folder, level, optimizer
        self.model, self.scales = scaled_network()
        self.theta, self.optimizer = parametrize(self.scales, level), make_optimizer(optimizer)

    def go(self, steps, first_step=0, every=2, losses=None):
        path = self.folder / "journal.qzo"
        header = {"directions": "rademacher"}
        writer = (
            JournalWriter.reopen(path)[0] if path.exists() else JournalWriter.create(path, header)
        )

        def after(done):
            if done % every == 0:
                loss = (losses or {}).get(done)
                folder = checkpoint_folder(self.folder / "checkpoints", done)
                at = Checkpoint(folder, done, writer.chain, loss)
                save_checkpoint(at, self.theta, self.optimizer, metadata={}, keep=2)

        train(
            Setup(
                squared_output(self.model),
                lambda step: StepBatch([inputs(seed=step)]),
                self.theta,
                self.optimizer,
                Probing(0, 1e-2),
                make_schedule("constant", 0.02, steps),
            ),
            max_steps=steps,
            first_step=first_step,
            on_step=lambda record: writer.append(entry_of(record, 0)),
            after_step=after,
        )
        writer.close()
        return self

    def restored(self, checkpoint):
        fresh = Run(self.folder, self.optimizer_name, self.level)
        return fresh, restore_(
            checkpoint, read_journal(self.folder / "journal.qzo"), fresh.theta, fresh.optimizer
        )


def same_numbers(first, second):
    return all(
        torch.equal(tensor, second.theta.state()[name])
        for name, tensor in first.theta.state().items()
    )


class OnAnotherDevice:
    """Numbers that are where there is no memory, as a machine without a GPU has no other second
    device.
    """

    def __init__(self, theta):
        self._numbers = theta

    def templates(self):
        return {name: number.to("meta") for name, number in self._numbers.templates().items()}

    def load_state_(self, state):
        self._numbers.load_state_(state)


def test_what_an_optimizer_remembers_comes_to_the_numbers_device(tmp_path):
    run = Run(tmp_path / "run", "momentum").go(4)
    (checkpoint, *_), _ = list_checkpoints(tmp_path / "run" / "checkpoints")
    fresh = make_optimizer("momentum")
    load_checkpoint_(checkpoint, OnAnotherDevice(run.theta), fresh)
    velocities = fresh.state()
    assert velocities.keys() == {f"velocity.{name}" for name in run.theta.templates()}
    assert all(velocity.is_meta for velocity in velocities.values())


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
@pytest.mark.parametrize("level", ["dense", "layer"])
def test_restored_from_any_checkpoint_or_none_the_run_is_where_it_was(tmp_path, optimizer, level):
    run = Run(tmp_path / "run", optimizer, level).go(5)
    checkpoints, problems = list_checkpoints(tmp_path / "run/checkpoints")
    assert [checkpoint.step for checkpoint in checkpoints] == [2, 4]
    assert problems == []
    for checkpoint in [None, *checkpoints]:
        restored, step = run.restored(checkpoint)
        assert step == 5
        assert same_numbers(run, restored)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_continued_run_is_the_uninterrupted_one(tmp_path, optimizer):
    whole = Run(tmp_path / "whole", optimizer).go(9)
    first = Run(tmp_path / "parts", optimizer).go(5)
    second, step = first.restored(list_checkpoints(tmp_path / "parts/checkpoints")[0][-1])
    second.go(9, first_step=step)
    assert same_numbers(whole, second)
    assert (tmp_path / "whole/journal.qzo").read_bytes() == (
        tmp_path / "parts/journal.qzo"
    ).read_bytes()


def test_the_last_ones_and_the_best_are_kept(tmp_path):
    Run(tmp_path / "run").go(10, losses={2: 0.5, 4: 0.1, 6: 0.3, 8: 0.4, 10: 0.2})
    steps = [checkpoint.step for checkpoint in list_checkpoints(tmp_path / "run/checkpoints")[0]]
    assert steps == [4, 8, 10]


def test_what_a_kill_left_is_dropped_with_the_old_ones(tmp_path):
    Run(tmp_path / "run").go(6)
    checkpoints = tmp_path / "run/checkpoints"
    for name in (".step_000002.partial", ".step_000002.old", "step_000001"):
        (checkpoints / name).mkdir()
    (checkpoints / "step_000001/state.json").write_text(
        '{"step": 1, "chain": "", "validation_loss": NaN}'
    )
    drop_old(checkpoints, keep=2)
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step_000004", "step_000006"]


def test_tuned_scales_are_what_the_model_sees_and_can_be_read(tmp_path):
    run = Run(tmp_path / "run").go(2)
    before = {name: run.scales[name].clone() for name in run.scales}
    tensors, _ = load_scales(tmp_path / "run/checkpoints/step_000002")
    seen = tuned_scales(run.theta)
    assert all(torch.equal(tensors[name], seen[name]) for name in seen)
    assert all(torch.equal(before[name], run.scales[name]) for name in before)
    run.theta.merge_()
    assert all(torch.equal(tensors[name], run.scales[name]) for name in tensors)


@pytest.mark.parametrize(
    "file",
    [
        "numbers.safetensors",
        "optimizer.safetensors",
        "scales.safetensors",
        "state.json",
        "COMPLETE",
    ],
)
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "zero"])
def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path, file, damage):
    run = Run(tmp_path / "run").go(5)
    path = tmp_path / "run/checkpoints/step_000004" / file
    data = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    else:
        data[len(data) // 2] ^= 16
        path.write_bytes({"flip": data, "truncate": data[:-3], "zero": bytes(len(data))}[damage])
    checkpoints, (problem,) = list_checkpoints(tmp_path / "run/checkpoints")
    assert [checkpoint.step for checkpoint in checkpoints] == [2]
    assert "step_000004" in problem
    restored, step = run.restored(checkpoints[-1])
    assert step == 5
    assert same_numbers(run, restored)


def test_a_half_written_checkpoint_is_no_checkpoint(tmp_path):
    run = Run(tmp_path / "run").go(4)
    checkpoints = tmp_path / "run/checkpoints"
    (checkpoints / "step_000004").rename(checkpoints / ".step_000004.partial")
    assert [checkpoint.step for checkpoint in list_checkpoints(checkpoints)[0]] == [2]
    assert run.restored(None)[1] == 4


def test_a_journal_shorter_than_its_checkpoint_is_refused(tmp_path):
    run = Run(tmp_path / "run").go(5)
    path = tmp_path / "run/journal.qzo"
    journal = read_journal(path)
    path.write_bytes(path.read_bytes()[: journal.sizes[2]])
    checkpoint = read_checkpoint(tmp_path / "run/checkpoints/step_000004")
    with pytest.raises(JournalError, match="ends at step 3"):
        run.restored(checkpoint)


def test_a_checkpoint_of_another_level_is_refused(tmp_path):
    Run(tmp_path / "run", level="dense").go(2)
    other = Run(tmp_path / "run", level="layer")
    with pytest.raises(OutputError, match="does not fit"):
        other.restored(read_checkpoint(tmp_path / "run/checkpoints/step_000002"))


def lines(*entries):
    return "".join(json.dumps(entry) + "\n" for entry in entries)


def test_metrics_are_cut_back_to_the_journal(tmp_path):
    path = tmp_path / "metrics.jsonl"
    kept = [
        {"step": 0, "validation_loss": 0.5},
        {"step": 0, "loss": 1},
        {"step": 1, "loss": 1},
        {"step": 2, "validation_loss": 0.4},
    ]
    path.write_text(lines(*kept, {"step": 2, "loss": 1}, {"step": 3, "validation_loss": 1}))
    assert cut_metrics(path, 2) == {0: 0.5, 2: 0.4}
    assert path.read_text() == lines(*kept)


@pytest.mark.parametrize("tail", ['{"step": 1, "lo', "garbage\n", "[]\n", '{"loss": 1}\n'])
def test_a_torn_line_is_dropped(tmp_path, tail):
    path = tmp_path / "metrics.jsonl"
    path.write_text(lines({"step": 0, "loss": 1}) + tail)
    cut_metrics(path, 9)
    assert path.read_text() == lines({"step": 0, "loss": 1})


def test_bad_steps_are_counted_from_the_end(tmp_path):
    writer = JournalWriter.create(tmp_path / "journal.qzo", {})
    from tests.core.test_journal import step

    for index in range(6):
        writer.append(step(index, skipped=index in (1, 4, 5)))
    writer.close()
    assert bad_steps_at_end(read_journal(tmp_path / "journal.qzo")) == 2


def test_scales_that_are_not_finite_are_no_checkpoint_and_drop_none(tmp_path):
    run = Run(tmp_path).go(4)
    before = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    next(iter(run.theta.state().values())).fill_(200.0)  # exp of it is no fp32 number
    at = Checkpoint(checkpoint_folder(tmp_path / "checkpoints", 6), 6, "", None)
    assert save_checkpoint(at, run.theta, run.optimizer, metadata={}, keep=1) is None
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == before
