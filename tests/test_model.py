"""What the model must do whatever its weights: no look-ahead, no row for unknown ids, a rule learned."""

import math

import numpy as np
import pytest
import torch

from hstu_rec.config import RunConfig, load
from hstu_rec.data.batch import SequenceBatch
from hstu_rec.encoder import HSTUEncoder
from hstu_rec.encoder_config import EncoderConfig, chosen_kernel
from hstu_rec.hstu import HSTU
from hstu_rec.item_table import ItemTable, TableConfig
from hstu_rec.layer import Dropout
from hstu_rec.loss import LossConfig, SampledSoftmax
from hstu_rec.model import NextItemModel
from hstu_rec.optimizers import rate_factor
from hstu_rec.run_config import OptimConfig
from hstu_rec.softmax import Negatives
from hstu_rec.trainer import train
from tests.datasets import write_dataset

CALENDAR = {"calendar": "month", "calendar_begin": 0, "calendar_end": 10**8}
KINDS = {
    "hstu": {},
    "hstu with a calendar": CALENDAR,
    "sasrec": {
        "attention": "softmax",
        "use_gate": False,
        "ffn_dim": 32,
        "use_time_bias": False,
        "use_position_bias": False,
        "use_position_embedding": True,
    },
}


@pytest.mark.fault("R35")
@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_future_events_do_not_change_the_past(options):
    torch.manual_seed(0)
    encoder = HSTUEncoder(EncoderConfig(dim=16, max_history_len=30, **options)).eval()
    offsets = torch.tensor([0, 9, 9, 30, 31])
    items, times = torch.randn(31, 16), torch.randint(0, 10**8, (31,)).sort().values
    before = encoder(items, offsets, times)
    is_future = torch.zeros(31, dtype=torch.bool)
    is_future[5:9] = is_future[20:30] = True
    changed = torch.where(is_future[:, None], torch.randn(31, 16), items)
    after = encoder(changed, offsets, torch.where(is_future, times + 10**6, times))
    assert torch.equal(before[~is_future], after[~is_future])
    assert not torch.equal(before[is_future], after[is_future])


@pytest.mark.parametrize(
    "options", [*KINDS.values(), {"window": 4, "query_time": "next"}], ids=[*KINDS, "window"]
)
def test_a_candidate_is_what_it_is_as_the_only_one_after_the_history(options):
    torch.manual_seed(0)
    encoder = HSTUEncoder(EncoderConfig(dim=16, max_history_len=8, **options)).eval()
    histories, candidates = [0, 3, 8], [2, 4, 3]
    rows = [torch.randn(h + c, 16) for h, c in zip(histories, candidates, strict=True)]
    times = [torch.randint(0, 10**8, (len(x),)).sort().values for x in rows]
    offsets = torch.tensor([0, *map(len, rows)]).cumsum(0)
    together = encoder(
        torch.cat(rows),
        offsets,
        torch.cat(times),
        torch.cat(times) + 60,
        num_targets=torch.tensor(candidates),
    )
    for user, (history, count) in enumerate(zip(histories, candidates, strict=True)):
        for candidate in range(history, history + count):
            keep = [*range(history), candidate]
            at = times[user][keep]
            one = torch.tensor([1])
            alone = encoder(
                rows[user][keep], torch.tensor([0, len(keep)]), at, at + 60, num_targets=one
            )
            row = int(offsets[user]) + candidate
            torch.testing.assert_close(together[row], alone[-1], rtol=1e-5, atol=1e-6)
            if history < 8:  # then the candidate is an event like others
                event = encoder(rows[user][keep], torch.tensor([0, len(keep)]), at, at + 60)
                torch.testing.assert_close(together[row], event[-1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_a_layout_made_ahead_holds_the_candidates(options):
    torch.manual_seed(0)
    encoder = HSTUEncoder(EncoderConfig(dim=16, max_history_len=8, **options)).eval()
    items, offsets, times = torch.randn(9, 16), torch.tensor([0, 4, 9]), torch.arange(9)
    targets = torch.tensor([2, 3])
    layout = encoder.layout(offsets, times, num_targets=targets).to(torch.device("cpu"))
    expected = encoder(items, offsets, times, num_targets=targets)
    assert torch.equal(encoder(items, offsets, times, layout=layout), expected)
    assert not torch.equal(encoder(items, offsets, times), expected)
    with pytest.raises(ValueError, match="num_targets is part of a layout"):
        encoder(items, offsets, times, layout=layout, num_targets=targets)


def test_a_history_longer_than_the_encoder_takes_is_refused_but_for_its_candidates():
    encoder = HSTUEncoder(EncoderConfig(dim=16, max_history_len=5)).eval()
    items, offsets, times = torch.randn(8, 16), torch.tensor([0, 8]), torch.arange(8)
    for targets in (None, torch.tensor([2])):
        with pytest.raises(
            ValueError, match=r"a history has [68] events, more than max_history_len 5"
        ):
            encoder(items, offsets, times, num_targets=targets)
    encoder(items, offsets, times, num_targets=torch.tensor([3]))


def test_auto_is_the_fused_kernel_where_it_was_run():
    half, plain = torch.bfloat16, EncoderConfig(dim=64)
    assert chosen_kernel(plain, True, half) == "triton"
    assert chosen_kernel(plain, True, torch.float32) == "triton"
    for config, is_hopper, dtype in (
        (plain, False, torch.float32),
        (plain, True, torch.float64),
        (EncoderConfig(dim=1024), True, half),
        (EncoderConfig(dim=64, value_dim=512), True, half),
    ):
        assert chosen_kernel(config, is_hopper, dtype) == "grouped"
    asked = EncoderConfig(dim=1024, attention_kernel="triton")
    assert chosen_kernel(asked, False, half) == "triton"


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"window": 50}, "window 50 has no effect with max_history_len 50"),
        ({"window": -1}, "window must be at least 0"),
    ],
)
def test_a_window_that_cannot_be_is_refused(options, problem):
    with pytest.raises(ValueError, match=problem):
        HSTUEncoder(EncoderConfig(**options))


@pytest.mark.parametrize(
    ("options", "num_graphs"),
    [
        ({}, 2),  # before and after attention, the same of all layers
        ({"attention": "softmax", "use_gate": False, "ffn_dim": 8}, 2),
        ({"dropout": 0.5}, 5),  # our own dropout on CPU breaks the graph
    ],
    ids=["hstu", "sasrec", "dropout"],
)
def test_compiled_layers_do_the_same_for_any_number_of_events(options, num_graphs):
    graphs = []

    def count(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    torch.manual_seed(0)
    config = {"dim": 8, "num_heads": 2, "max_history_len": 9, "dropout": 0, **options}
    encoders = [HSTUEncoder(EncoderConfig(num_layers=2, **config)) for _ in range(2)]
    encoders[1].load_state_dict(encoders[0].state_dict())
    encoders[1].compile_layers(backend=count)
    for lengths in ([5], [9, 3], [1, 8, 0, 9]):
        times = torch.arange(sum(lengths)) * 1000
        offsets, found = torch.tensor([0, *lengths]).cumsum(0), []
        for encoder in encoders:
            torch.manual_seed(1)
            x = torch.randn(sum(lengths), 8, requires_grad=True)
            out = encoder(x, offsets, times)
            grads = torch.autograd.grad(out.square().sum(), [x, *encoder.parameters()])
            found.append([out, *grads])
        torch.testing.assert_close(*found)
    assert len(graphs) == num_graphs


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"offsets": torch.tensor([5, 7])}, "start at 0 and never fall"),
        ({"offsets": torch.tensor([0, 9, 5, 12])}, "start at 0 and never fall"),
        ({"offsets": torch.tensor([0, 5, 12], dtype=torch.int32)}, "int64"),
        ({"offsets": torch.tensor([0, 5, 11])}, r"timestamps must be int64 \[11\]"),
        ({"timestamps": torch.arange(12.0)}, r"int64 \[12\] in s, one an event; got torch.float32"),
        ({"timestamps": torch.arange(11)}, r"int64 \[12\]"),
        ({"x": torch.randn(12, 4)}, r"x must be \[12, 8\]"),
        ({"x": torch.randn(11, 8)}, r"x must be \[12, 8\]"),
    ],
)
def test_tensors_that_are_no_events_are_refused(changed, sentence):
    encoder = HSTUEncoder(EncoderConfig(dim=8, max_history_len=9))
    given = {
        "x": torch.randn(12, 8),
        "offsets": torch.tensor([0, 5, 12]),
        "timestamps": torch.arange(12),
    }
    assert encoder(**given).shape == (12, 8)
    with pytest.raises(ValueError, match=sentence):
        encoder(**{**given, **changed})


@pytest.mark.parametrize("name", ["attention", "norm", "final_norm", "query_time", "calendar"])
def test_a_choice_that_there_is_not_is_refused(name):
    config = EncoderConfig(**{name: "Softmax"})
    with pytest.raises(ValueError, match=f"{name} must be one of .*; got 'Softmax'"):
        HSTUEncoder(config)


def test_recomputed_layers_keep_less_and_give_the_same():
    lengths, kept, found = [9, 3, 7], [], []
    offsets, times = torch.tensor([0, *lengths]).cumsum(0), torch.arange(sum(lengths)) * 1000
    torch.manual_seed(0)
    encoder = HSTUEncoder(EncoderConfig(dim=8, num_layers=3, max_history_len=9, dropout=0.4))
    x = torch.randn(sum(lengths), 8, requires_grad=True)
    for recomputes in (False, True):
        encoder.recomputes = recomputes
        torch.manual_seed(1)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda saved, sizes=sizes: sizes.append(saved.nbytes) or saved, lambda saved: saved
        ):
            out = encoder(x, offsets, times)
        kept.append(sum(sizes))
        found.append([out, *torch.autograd.grad(out.square().sum(), [x, *encoder.parameters()])])
    torch.testing.assert_close(*found, rtol=0, atol=0)
    assert kept[1] < kept[0] / 4


def test_the_query_time_of_the_next_event_is_used():
    torch.manual_seed(0)
    config = EncoderConfig(dim=16, query_time="next")
    encoder = HSTUEncoder(config).eval()
    items, times, offsets = torch.randn(4, 16), torch.arange(4) * 86_400, torch.tensor([0, 4])
    soon = encoder(items, offsets, times, times + 60)
    late = encoder(items, offsets, times, times + 10**7)
    assert not torch.allclose(soon, late)
    with pytest.raises(ValueError, match="next_timestamps"):
        encoder(items, offsets, times)


def test_a_calendar_tells_buckets_apart_and_counts_times_outside_as_its_ends():
    torch.manual_seed(0)
    config = EncoderConfig(
        dim=8, use_time_bias=False, calendar="week", calendar_end=10 * 604_800 - 1
    )
    encoder = HSTUEncoder(config).eval()
    assert sum(p.shape == (10, 8) for p in encoder.parameters()) == 1
    items, offsets = torch.randn(1, 8), torch.tensor([0, 1])
    at = [0, 604_799, 604_800, 9 * 604_800, 10**10, -1]
    first, same, second, last, after, before = (
        encoder(items, offsets, torch.tensor([time])) for time in at
    )
    assert torch.equal(first, same) and torch.equal(first, before) and torch.equal(last, after)
    assert not torch.allclose(first, second)
    with pytest.raises(ValueError, match="a calendar needs timestamps"):
        encoder(items, offsets)


def test_with_query_time_the_calendar_of_the_event_to_predict_is_used():
    torch.manual_seed(0)
    config = EncoderConfig(dim=8, use_time_bias=False, query_time="next", **CALENDAR)
    encoder = HSTUEncoder(config).eval()
    items, times, offsets = (
        torch.randn(3, 8),
        torch.zeros(3, dtype=torch.int64),
        torch.tensor([0, 3]),
    )
    now, later = (encoder(items, offsets, times, times + t) for t in (0, 10**7))
    assert not torch.allclose(now, later)
    with pytest.raises(ValueError, match="a calendar needs next_timestamps"):
        encoder(items, offsets, times)


def test_events_of_one_second_have_a_calendar_of_one_bucket():
    begin = 1_000_000_000
    config = EncoderConfig(dim=8, calendar="month", calendar_begin=begin, calendar_end=begin)
    calendar = HSTUEncoder(config).calendar
    assert calendar.embedding.shape == (1, 8)
    assert calendar(torch.tensor([begin, begin + 10**8])).shape == (2, 8)


def test_a_range_without_a_calendar_is_refused():
    with pytest.raises(ValueError, match="have no effect with calendar 'none'"):
        HSTUEncoder(EncoderConfig(calendar_end=9))


def test_a_calendar_without_a_range_is_refused():
    with pytest.raises(ValueError, match="needs calendar_begin and calendar_end"):
        HSTUEncoder(EncoderConfig(calendar="month"))


def test_padding_left_right_or_none_gives_the_same_logits():
    torch.manual_seed(0)
    model = HSTU(num_items=20, hidden_dim=16, max_seq_len=6).eval()
    ids, times = torch.tensor([[3, 9, 20]]), torch.tensor([[10, 500, 9000]])
    pad = torch.nn.functional.pad
    plain = model(ids, times, ids > 0)[0]
    left = model(pad(ids, (3, 0)), pad(times, (3, 0)), pad(ids, (3, 0)) > 0)[0, 3:]
    right = model(pad(ids, (0, 3)), pad(times, (0, 3)))[0, :3]
    assert plain.shape == (3, 21)
    assert (plain[:, 0] == -torch.inf).all()
    torch.testing.assert_close(left, plain)
    torch.testing.assert_close(right, plain)
    with pytest.raises(ValueError, match=r"1 item ids are outside 1\.\.20, for example \[21\]"):
        model(torch.tensor([[1, 21]]), torch.tensor([[1, 2]]))


def test_wrong_values_are_told_all_at_once():
    with pytest.raises(
        ValueError, match=r"dim must be a multiple.*; query_time 'next' has no effect"
    ):
        HSTUEncoder(EncoderConfig(dim=15, use_time_bias=False, query_time="next"))


def test_adam_on_cpu_is_refused_with_what_to_do():
    with pytest.raises(ValueError, match="use 'rowwise_adagrad', 'adagrad' or 'sgd'"):
        ItemTable(TableConfig(optimizer="adam"), 10, 4, torch.device("cpu"))


def test_ids_outside_the_catalogue_are_refused():
    table = ItemTable(TableConfig(), 10, 4, torch.device("cpu"))
    for bad in (-1, 10, 2**33):
        with pytest.raises(ValueError, match=r"1 item ids are outside the catalogue 0\.\.9"):
            table(torch.tensor(sorted([3, bad])))


@pytest.mark.parametrize("bad", [-1, 10])
def test_the_exact_softmax_refuses_ids_outside_the_catalogue_too(bad):
    encoder = HSTUEncoder(EncoderConfig(dim=4, use_time_bias=False))
    loss = SampledSoftmax(LossConfig(negatives="all"))
    model = NextItemModel(ItemTable(TableConfig(), 10, 4, torch.device("cpu")), encoder, loss)
    negatives = Negatives(torch.arange(10), largest_part=10, is_whole=True)
    times = torch.zeros(2, dtype=torch.int64)
    for items, targets in (([1, bad], [2, 3]), ([1, 2], [3, bad])):
        ids, target_ids = torch.tensor(items), torch.tensor(targets)
        batch = SequenceBatch(ids, times, times, torch.tensor([0, 2]), target_ids, 2)
        with pytest.raises(ValueError, match=r"1 item ids are outside the catalogue 0\.\.9"):
            model(batch, negatives)


def run_planted(path, labels):
    """Test metrics of a short run where item 7 j + 3 (mod 61) follows item j; `labels` may be "random",
    of the test alone or of all events."""
    random = np.random.default_rng(3)
    sequences = []
    for _ in range(400):
        items = [int(random.integers(61))]
        while len(items) < 10:
            items.append((7 * items[-1] + 3) % 61)
        sequences.append(items)
    drawn = random.integers(61, size=(400, 10)).tolist()
    if labels == "random":
        sequences = drawn
    if labels == "random in the test":
        sequences = [[*own[:-1], other[-1]] for own, other in zip(sequences, drawn, strict=True)]
    write_dataset(path / "data", sequences, num_items=61)
    settings = ["encoder.dim=32", "encoder.dropout=0", "loss.negatives=all", "train.max_epochs=12"]
    settings += ["data.batch_users=32"]  # of five seeds, each reaches 1.0
    folders = [f"data.path={path / 'data'}", f"train.run_dir={path / 'run'}"]
    quick = ["train.device=cpu", "train.eval_every_epochs=4", "eval.with_baselines=false"]
    return train(load(RunConfig, [*settings, *folders, *quick]))["test"]["seen_allowed"]


@pytest.mark.fault("R34")
def test_a_planted_rule_is_learned(tmp_path):
    assert run_planted(tmp_path, "by the rule")["recall@1"] > 0.99


@pytest.mark.fault("R34")
@pytest.mark.parametrize("labels", ["random in the test", "random"])
def test_random_labels_are_found_by_chance(tmp_path, labels):
    """Targets drawn evenly from 61 items are among any k of them with a probability of k / 61: the hits of
    400 users are binomial, and with a probability above 1 - 2e-6 within these bounds."""
    found = run_planted(tmp_path, labels)
    for k in (1, 10):
        low, high = binomial_bounds(400, k / 61, 1e-6)
        assert low <= round(400 * found[f"recall@{k}"]) <= high


def binomial_bounds(count, chance, outside):
    """(least, most) successes of `count`, each side left out with a probability of at most `outside`."""
    shares = [
        math.comb(count, n) * chance**n * (1 - chance) ** (count - n) for n in range(count + 1)
    ]
    total = np.cumsum(shares)
    return int(np.searchsorted(total, outside)), int(np.searchsorted(total, 1 - outside))


@pytest.mark.parametrize("p", [0.2, 0.5])
def test_dropout_keeps_the_right_share_and_the_mean(p):
    torch.manual_seed(0)
    x = torch.ones(1001, 999, requires_grad=True)
    out = Dropout(p)(x)
    assert set(out.unique().tolist()) == {0.0, out.max().item()}
    assert out.max().item() == pytest.approx(1 / (1 - p))
    assert (out == 0).float().mean().item() == pytest.approx(p, abs=0.003)
    # Neighbours share a draw of 64 bits, and must still be independent.
    pairs = ((out[:, :-1] == 0) & (out[:, 1:] == 0)).float().mean().item()
    assert pairs == pytest.approx(p * p, abs=0.003)
    out.sum().backward()
    torch.testing.assert_close(x.grad, out.detach())
    assert Dropout(p).eval()(x) is x


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("constant", [0.5, 1, 1, 1, 1, 1]), ("linear", [0.5, 1, 1, 0.7, 0.4, 0.1])],
)
def test_rates_warm_up_and_end_at_their_last_fraction(schedule, expected):
    final = 0.1 if schedule == "linear" else 0.0
    config = OptimConfig(warmup_steps=2, schedule=schedule, final_lr_fraction=final)
    assert [rate_factor(config, step, 6) for step in range(6)] == pytest.approx(expected)
    cosine = OptimConfig(schedule="cosine")
    assert [rate_factor(cosine, step, 3) for step in (0, 1, 2, 3)] == pytest.approx([1, 0.5, 0, 0])
