"""Prompts as they were published, and losses against a full forward pass."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from qzo_diffusion.core.errors import DataError
from qzo_diffusion.core.noise import directions_of_step
from qzo_diffusion.core.parametrize import parametrize
from qzo_diffusion.llm.data_files import read_rows
from qzo_diffusion.llm.objectives import (
    choice_scores,
    mean_metric,
    task_loss,
)
from qzo_diffusion.llm.task_file import read_task, shipped_tasks
from qzo_diffusion.llm.tasks import choose_rows, encode, make_batch, make_examples
from qzo_diffusion.quant.load import find_scales, quantize_
from qzo_diffusion.runs.llm.batches import TextBatches, evaluation_batches
from tests.llm.small_tasks import FACTS, examples_of, own_task
from tests.quantized import estimated
from tests.tiny_llama import tiny_llama, write_sentences


@pytest.fixture(scope="module")
def lm():
    return tiny_llama()


def test_there_is_a_fact_for_every_task_that_comes_along():
    assert shipped_tasks() == sorted(FACTS)


@pytest.mark.parametrize("task", FACTS)
def test_prompts_are_those_that_were_published(tmp_path, task):
    row, prompt, right = FACTS[task]
    _, (example,) = examples_of(tmp_path, task, row)
    assert example.prompt == prompt
    assert example.continuations[example.label] == right


def test_all_answers_of_squad_count_and_the_first_is_taught(tmp_path):
    _, (example,) = examples_of(tmp_path, "squad", FACTS["squad"][0])
    assert example.answers == ("yes", "It is")
    assert example.continuations == (" yes",)


def by_hand(lm, example):
    """Mean log-probability of every continuation, each by a forward of its own over the whole
    vocabulary.
    """
    means = []
    for text in example.continuations:
        prompt, whole = lm.encode(example.prompt), lm.encode(example.prompt + text)
        assert whole[: len(prompt)] == prompt
        logits = lm.model(input_ids=torch.tensor([whole])).logits.float().log_softmax(-1)[0]
        places = range(max(1, len(prompt)), len(whole))
        means.append(sum(logits[at - 1, whole[at]] for at in places) / len(places))
    return torch.stack(means)


@pytest.mark.parametrize(
    "choices", [{"0": " terrible", "1": " great"}, {"0": " xyz", "1": " great", "2": " good bad"}]
)
def test_the_loss_of_choices_is_that_of_separate_forwards(tmp_path, lm, choices):
    task = own_task(tmp_path, choices=choices)
    rows = [
        {"text": "a film", "label": 0},
        {"text": "a longer film good", "label": 1},
        {"text": "x", "label": len(choices) - 1},
    ]
    _, examples = examples_of(tmp_path, task, *rows)
    encoded = encode(lm, examples, None)
    batch = make_batch(lm, encoded)
    single = all(len(lm.encode(text)) == 1 for text in choices.values())
    assert batch.shared == single
    assert len(batch.ids) == len(rows) * (1 if single else len(choices))
    # fp32 throughout; log-probabilities of about 10, sums over 64 channels and 400 words in another
    # order.
    for example, scores, loss in zip(
        examples, choice_scores(lm, batch), task_loss(lm, batch), strict=True
    ):
        wanted = by_hand(lm, example)
        if not single:
            torch.testing.assert_close(scores, wanted, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(
            loss, F.cross_entropy(wanted, torch.tensor(example.label)), rtol=1e-5, atol=2e-4
        )


def test_the_loss_of_an_answer_is_that_of_its_tokens(tmp_path, lm):
    _, (example,) = examples_of(
        tmp_path, "squad", FACTS["squad"][0] | {"answers": ["a green answer"]}
    )
    batch = make_batch(lm, encode(lm, [example], None))
    torch.testing.assert_close(task_loss(lm, batch), -by_hand(lm, example), rtol=1e-5, atol=1e-4)


def test_plain_text_is_learned_from_its_second_token_on(tmp_path, lm):
    task = own_task(tmp_path, template="{text}", label=None, choices=None, metric="loss")
    spec, (example,) = examples_of(tmp_path, task, {"text": "a good film"})
    batch = make_batch(lm, encode(lm, [example], None))
    torch.testing.assert_close(task_loss(lm, batch), -by_hand(lm, example), rtol=1e-5, atol=1e-4)
    assert mean_metric(lm, [batch], spec) == pytest.approx(task_loss(lm, batch).item())


def test_padding_and_company_change_no_loss(tmp_path, lm):
    _, examples = examples_of(
        tmp_path,
        own_task(tmp_path),
        *({"text": "a" + " film" * n, "label": n % 2} for n in range(1, 9)),
    )
    encoded = encode(lm, examples, None)
    together = task_loss(lm, make_batch(lm, encoded))
    alone = torch.cat([task_loss(lm, make_batch(lm, [one])) for one in encoded])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-4)
    twice = make_batch(lm, encoded).repeated(2)
    assert len(twice) == 16
    torch.testing.assert_close(task_loss(lm, twice), alone.repeat(2), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "choices", [{"0": " terrible", "1": " great"}, {"0": " xyz", "1": " great"}]
)
@pytest.mark.parametrize("level", ["row", "separable"])
def test_every_example_can_have_a_direction_of_its_own(tmp_path, choices, level):
    """What one forward with a direction for every example finds is what a forward for each finds
    with its own direction.
    """
    lm = tiny_llama()
    quantize_(lm.model, backend="reference", skip=["lm_head"])
    theta = parametrize(find_scales(lm.model), level)
    _, examples = examples_of(
        tmp_path,
        own_task(tmp_path, choices=choices),
        *({"text": f"a film {n}", "label": n % 2} for n in range(4)),
    )
    encoded = encode(lm, examples, None)
    directions = directions_of_step(0, 0, 4, "rademacher")

    def objective(batch):
        return task_loss(lm, batch)

    found = estimated(
        objective, [make_batch(lm, encoded)], theta, directions, eps=0.1, per_example=True
    )
    for one, direction, up, down in zip(
        encoded, directions, found.loss_plus, found.loss_minus, strict=True
    ):
        single = estimated(
            objective, [make_batch(lm, [one])], theta, [direction], eps=0.1, probes_per_forward=1
        )
        assert (up, down) == pytest.approx(
            (single.loss_plus[0], single.loss_minus[0]), rel=1e-4, abs=1e-4
        )
        assert up != down


def test_long_prompts_are_counted_and_cut_at_their_beginning(tmp_path):
    lm = tiny_llama(context=32)
    rows = [{"text": "bad" + " film" * 40, "label": 0}, {"text": "short", "label": 1}]
    _, examples = examples_of(tmp_path, own_task(tmp_path), *rows)
    with pytest.raises(
        DataError, match=r"1 of 2 prompts are longer than the model reads"
    ) as raised:
        encode(lm, examples, None)
    assert "data.max_tokens=32" in str(raised.value)
    long, short = encode(lm, examples, 32)
    whole = lm.encode(examples[0].prompt)
    assert long.rows[0] == tuple(whole[-32:])
    assert (long.cut, short.cut) == (len(whole) - 32, 0)
    assert torch.isfinite(task_loss(lm, make_batch(lm, [long, short]))).all()


@given(st.integers(1, 60), st.integers(4, 40), st.booleans())
def test_what_is_cut_fits_and_keeps_something_to_read(words, limit, several):
    lm = _SHARED
    spec = (
        read_task("squad").model_copy(update={"answer": " red green"})
        if several
        else read_task("sst2")
    )
    values = {
        "title": "t",
        "context": "film" + " film" * words,
        "question": "q",
        "sentence": "a" + " film" * words,
        "label": "1",
    }
    (example,) = make_examples(spec, [_row(values)])
    (one,) = encode(lm, [example], limit)
    assert one.length <= limit
    assert all(
        reads and all(0 <= at < len(row) for at, _ in reads)
        for row, reads in zip(one.rows, one.reads, strict=True)
    )


_SHARED = tiny_llama()


def _row(values):
    from qzo_diffusion.llm.data_files import Row

    return Row(values, "data, line 1")


def test_a_label_that_adds_no_token_is_told(tmp_path, lm):
    _, examples = examples_of(tmp_path, own_task(tmp_path), {"text": "a film", "label": 0})
    from dataclasses import replace

    with pytest.raises(DataError, match="line 1: '' adds no token to its prompt"):
        encode(lm, [replace(examples[0], continuations=("", " great"))], None)


def test_splits_are_disjoint_and_do_not_depend_on_what_follows(tmp_path):
    rows = [_row({"n": str(n)}) for n in range(50)]
    first, second, rest = choose_rows(rows, [10, 20, None], 0, "train")
    assert choose_rows(rows, [10], 0, "train") == [first]
    assert sorted(int(row.values["n"]) for part in (first, second, rest) for row in part) == list(
        range(50)
    )
    assert choose_rows(rows, [10], 1, "train") != [first]
    assert choose_rows(rows, [60], 0, "train") == [rows]


def test_batches_are_of_one_length_and_follow_from_the_step(tmp_path, lm):
    folder = write_sentences(tmp_path, train=64)
    spec = read_task("sst2")
    encoded = encode(
        lm, make_examples(spec, read_rows(folder / "train.tsv", spec.fields, spec.columns)), None
    )
    batches = TextBatches(lm, encoded, batch_size=4, seed=1, micro_batch_size=3)
    again = TextBatches(lm, encoded, batch_size=4, seed=1)
    for step in (5, 0, 17):
        parts = batches(step).micro_batches
        assert [len(part) for part in parts] == [3, 1]
        assert torch.equal(
            torch.cat([part.label for part in parts]), again(step).micro_batches[0].label
        )
    shares = [
        TextBatches(
            lm, encoded, batch_size=4, seed=1, share=lambda n, r=rank: slice(2 * r, 2 * r + 2)
        )(0)
        for rank in (0, 1)
    ]
    assert [share.first_example for share in shares] == [0, 2]
    assert torch.equal(
        torch.cat([share.micro_batches[0].label for share in shares]),
        again(0).micro_batches[0].label,
    )
    held_out = evaluation_batches(lm, encoded, 10)
    assert sum(map(len, held_out)) == 64
    assert math.fsum(int(batch.label.sum()) for batch in held_out) == 32


def test_a_bfloat16_model_gives_fp32_scores(tmp_path):
    lm = tiny_llama()
    _, examples = examples_of(tmp_path, own_task(tmp_path), {"text": "a film", "label": 0})
    wide = task_loss(lm, make_batch(lm, encode(lm, examples, None)))
    lm.model.to(torch.bfloat16)
    narrow = task_loss(lm, make_batch(lm, encode(lm, examples, None)))
    assert narrow.dtype == torch.float32
    assert narrow.bfloat16().float() != narrow  # it was never rounded to bfloat16
    assert narrow == pytest.approx(wide, rel=0.2)
