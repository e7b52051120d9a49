"""The blocks before the first trained one: left out where they give the same, and never where that
would change a loss.
"""

import contextlib
import io
import itertools
import os
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from qzo_diffusion.core.errors import OutputError
from qzo_diffusion.core.noise import directions_of_step
from qzo_diffusion.core.parametrize import parametrize
from qzo_diffusion.core.probing import Probing, StepBatch
from qzo_diffusion.core.spsa import estimate
from qzo_diffusion.llm.data_files import Row
from qzo_diffusion.llm.kept_hidden import KeptHidden
from qzo_diffusion.llm.objectives import task_loss
from qzo_diffusion.llm.prefix import find_prefix
from qzo_diffusion.llm.task_file import read_task
from qzo_diffusion.llm.tasks import encode, make_batch, make_examples
from qzo_diffusion.quant.choose import matching
from qzo_diffusion.quant.load import find_scales, quantize_
from qzo_diffusion.runs.llm.batches import TextBatches
from tests.tiny_llama import tiny_llama

CPU = torch.device("cpu")
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
LAYERS = {
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
MODELS = {
    "qwen2 with two kinds of attention": lambda: Qwen2ForCausalLM(
        Qwen2Config(**SIZES, **LAYERS, use_sliding_window=True, sliding_window=4)
    ),
    "gemma3, which scales its embeddings": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**SIZES, **LAYERS, head_dim=16, sliding_window=4)
    ),
    "gpt2, which adds positions": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_embd=32, n_layer=4, n_head=2)
    ),
}


@pytest.fixture
def lm():
    """Four blocks, quantized, of which the last two are to be trained."""
    lm = tiny_llama(layers=4)
    quantize_(lm.model, backend="reference", skip=["lm_head"])
    return lm


def prepared(lm, trained=("layers.2", "layers.3")):
    """Numbers of some blocks; the model knows which."""
    scales = find_scales(lm.model)
    names = matching(scales, trained)
    lm.part_before_(names)
    return parametrize(scales, "separable", trained=names)


def encoded_sentences(lm, count=8, task="sst2"):
    rows = [
        Row({"sentence": f"a{' film' * (1 + n % 5)} {n}", "label": str(n % 2)}, f"line {n}")
        for n in range(count)
    ]
    return encode(lm, make_examples(read_task(task), rows), None)


@contextlib.contextmanager
def counted(lm):
    """How many rows each block is given."""
    rows, hooks = [0] * len(lm.model.model.layers), []
    for index, block in enumerate(lm.model.model.layers):

        def count(_block, args, index=index):
            rows[index] += len(args[0])

        hooks.append(block.register_forward_pre_hook(count))
    yield rows
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("name", MODELS)
def test_two_parts_are_the_model_bit_for_bit(name, count):
    model = MODELS[name]().eval().requires_grad_(False)
    base = model.base_model
    blocks = base.get_submodule("layers" if hasattr(base, "layers") else "h")
    stack = next(path for path, module in model.named_modules() if module is blocks)
    prefix = find_prefix(model, base, [f"{stack}.{index}.mlp" for index in range(count, 4)], CPU)
    assert prefix is not None
    ids = torch.randint(64, (3, 20), generator=torch.Generator().manual_seed(0))
    whole = base(input_ids=ids, use_cache=False).last_hidden_state
    assert torch.equal(prefix.after(ids, prefix.before(ids)), whole)
    assert not torch.equal(prefix.after(ids, torch.zeros_like(prefix.before(ids))), whole)
    assert torch.equal(base(input_ids=ids, use_cache=False).last_hidden_state, whole)


def test_there_is_none_where_something_before_all_blocks_is_trained(lm):
    layers = list(find_scales(lm.model))
    for trained in (
        layers,
        ["model.layers.0.mlp.up_proj"],
        ["model.layers.2.mlp.up_proj", "lm_head"],
        ["lm_head"],
        [],
    ):
        lm.part_before_(trained)
        assert lm.prefix is None, trained
    lm.part_before_(["model.layers.3.mlp.up_proj", "model.layers.2.mlp.up_proj"])
    assert lm.prefix.count == 2


def test_there_is_none_where_blocks_give_tuples(lm):
    for block in lm.model.model.layers:
        block.register_forward_hook(lambda _block, _args, output: (output,))
    lm.model.model.forward = lambda input_ids, use_cache: _read_first(lm.model.model, input_ids)
    lm.part_before_(["model.layers.3.mlp.up_proj"])
    assert lm.prefix is None


def _read_first(base, ids):
    hidden = base.embed_tokens(ids)
    positions = base.rotary_emb(hidden, torch.arange(ids.shape[1]).unsqueeze(0))
    for block in base.layers:
        hidden = block(hidden, position_embeddings=positions)[0]
    return SimpleNamespace(last_hidden_state=base.norm(hidden))


def test_there_is_none_where_a_part_is_not_the_model(lm):
    """A block that counts its calls, as one that is more than a function of what it reads."""
    calls = []

    def counting(_block, _args, output):
        calls.append(0)
        return output * len(calls)

    lm.model.model.layers[0].register_forward_hook(counting)
    lm.part_before_(["model.layers.3.mlp.up_proj"])
    assert lm.prefix is None


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
def test_blocks_are_back_in_their_places_after_an_error(lm, error):
    prepared(lm)
    batch = make_batch(lm, encoded_sentences(lm)).repeated(2)
    before, blocks = task_loss(lm, batch), list(lm.model.model.layers)

    def broken(*_args):
        raise error

    for index in (1, 3):  # in either part
        hook = lm.model.model.layers[index].register_forward_pre_hook(broken)
        with pytest.raises(type(error)):
            task_loss(lm, batch)
        hook.remove()
        assert list(lm.model.model.layers) == blocks
    assert torch.equal(task_loss(lm, batch), before)


def estimated(lm, theta, batch):
    directions = directions_of_step(0, 0, len(batch), "rademacher")
    with counted(lm) as rows:
        found = estimate(
            lambda part: task_loss(lm, part),
            StepBatch([batch]),
            theta,
            directions,
            Probing(0, eps=0.05, per_example=True),
        )
    return found, rows


def test_a_step_runs_them_once_for_both_probes_and_finds_the_same(lm):
    theta = prepared(lm)
    batch = make_batch(lm, encoded_sentences(lm))
    shared, rows = estimated(lm, theta, batch)
    assert rows == [8, 8, 16, 16]
    lm.prefix = None
    plain, rows = estimated(lm, theta, batch)
    assert rows == [16, 16, 16, 16]
    # Products of 8 rows in place of 16 may round in another way: single roundings of four blocks,
    # over 2 · eps.
    assert shared.directional_derivative == pytest.approx(
        plain.directional_derivative, rel=0, abs=2**-24 * 64 / 0.05
    )
    assert any(abs(d) > 0.01 for d in plain.directional_derivative)


# labels of one token, and of several: a row for each
@pytest.mark.parametrize("task", ["sst2", "sst2_review"])
def test_what_is_kept_is_not_computed_again(lm, tmp_path, task):
    theta, encoded = prepared(lm), encoded_sentences(lm, task=task)
    plain = TextBatches(lm, encoded, batch_size=4, seed=0)
    kept = TextBatches(lm, encoded, batch_size=4, seed=0, keep_in=tmp_path / "new" / "folder")
    for _ in (0, 1):
        found, rows = estimated(lm, theta, kept(0).micro_batches[0])
        assert rows[0] == 0 < rows[2]
        expected, _ = estimated(lm, theta, plain(0).micro_batches[0])
        assert found.directional_derivative == pytest.approx(
            expected.directional_derivative, rel=0, abs=2**-24 * 64 / 0.05
        )
    with counted(lm) as rows:
        for step in range(2, 6):  # two epochs: each row once, whatever was read before
            kept(step)
    assert rows[0] <= sum(len(one.rows) for one in encoded)


def test_a_run_that_goes_on_with_an_empty_file_reads_the_same_bits(lm, tmp_path):
    prepared(lm)
    encoded = encoded_sentences(lm, count=16)
    first, second = (
        TextBatches(lm, encoded, batch_size=4, seed=0, keep_in=tmp_path) for _ in range(2)
    )
    hidden = [first(step).micro_batches[0].hidden for step in range(8)]
    for step in (7, 5, 6):  # in another order, beside other texts
        assert torch.equal(second(step).micro_batches[0].hidden, hidden[step])
    assert list(tmp_path.iterdir()) == []  # the file has no name


@pytest.mark.parametrize(
    "groups", [("ad", "db"), ("da", "bd", "d"), ("dad", "b"), ("abc", "bca", "cab")]
)
def test_a_text_that_stands_in_several_groups_has_the_same_bits_in_any_order(lm, tmp_path, groups):
    prepared(lm)
    texts = {letter: tuple(range(3, 3 + 7 * (place + 1))) for place, letter in enumerate("abcd")}
    rows = [[texts[letter] for letter in group] for group in groups]
    orders = set(itertools.permutations(sorted(set("".join(groups)))))
    found = {}
    for order in orders:
        kept = KeptHidden(lm, rows, tmp_path)
        for letter in (*order, *order):
            states = kept.of([texts[letter]])
            assert torch.equal(states, found.setdefault(letter, states)), order


def test_a_short_read_goes_on_and_a_short_file_is_an_error(lm, tmp_path):
    prepared(lm)
    row = tuple(range(3, 20))
    kept = KeptHidden(lm, [[row]], tmp_path)
    whole = kept.of([row])

    class Slow(io.FileIO):
        def readinto(self, target):
            return super().readinto(memoryview(target)[:100])

    with Slow(os.dup(kept._file.fileno()), "rb+") as kept._file:
        assert torch.equal(kept.of([row]), whole)
        kept._file.truncate(1000)
        with pytest.raises(OutputError, match=r"(?s)shorter than.*data\.keep_hidden=false"):
            kept.of([row])


def test_nothing_is_kept_where_there_is_no_room(lm, tmp_path, monkeypatch):
    prepared(lm)
    encoded = encoded_sentences(lm)
    assert lm.bytes_of_token == 4 * 64
    tokens = sum(len(row) for one in encoded for row in one.rows)
    for free, kept in ((2 * tokens * 4 * 64, False), (2 * tokens * 4 * 64 + 1, True)):
        monkeypatch.setattr(
            "qzo_diffusion.system.files.shutil.disk_usage",
            lambda _place, free=free: type("Usage", (), {"free": free}),
        )
        batch = TextBatches(lm, encoded, batch_size=4, seed=0, keep_in=tmp_path)(0).micro_batches[0]
        assert (batch.hidden is not None) == kept


def test_nothing_is_kept_where_all_blocks_are_trained(lm, tmp_path):
    prepared(lm, ["layers"])
    batch = TextBatches(lm, encoded_sentences(lm), batch_size=4, seed=0, keep_in=tmp_path)(
        0
    ).micro_batches[0]
    assert batch.hidden is None


def test_a_full_disk_is_told_with_the_remedy(lm, tmp_path):
    prepared(lm)
    batches = TextBatches(lm, encoded_sentences(lm), batch_size=4, seed=0, keep_in=tmp_path)
    batches._kept._file.close()
    batches._kept._file = open("/dev/full", "rb+", buffering=0)  # noqa: SIM115
    with pytest.raises(OutputError, match=r"(?s)No space left.*data\.keep_hidden=false"):
        batches(0)
    batches._kept._file.close()


def test_forwards_have_few_widths_and_none_beyond_what_the_model_reads(tmp_path):
    """Each width costs memory for good on some machines; and learned positions end where the
    context does.
    """
    lm = tiny_llama(layers=4, context=48)
    quantize_(lm.model, backend="reference", skip=["lm_head"])
    prepared(lm)
    rows = [Row({"sentence": "a" + " film" * n, "label": str(n % 2)}, "") for n in range(1, 44)]
    encoded = encode(lm, make_examples(read_task("sst2"), rows), None)
    assert max(one.length for one in encoded) in range(42, 49)
    batches, widths = TextBatches(lm, encoded, batch_size=4, seed=0, keep_in=tmp_path), set()
    hook = lm.model.model.layers[0].register_forward_pre_hook(
        lambda _block, args: widths.add(args[0].shape[1])
    )
    for step in range(11):
        batches(step)
    hook.remove()
    assert widths == {32, 48}
