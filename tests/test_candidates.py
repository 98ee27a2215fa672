"""A cached history and its candidates: the numbers of one jagged batch, at the cost of the candidates."""

import pytest
import torch

from hstu_rec import encoder as encoder_module
from hstu_rec.encoder import EncodedHistory, HSTUEncoder
from hstu_rec.encoder_config import EncoderConfig
from hstu_rec.ops import candidates as ops
from hstu_rec.ops import jagged_attention_reference

CALENDAR = {"calendar": "month", "calendar_begin": 0, "calendar_end": 10**8}
SASREC = {"attention": "softmax", "use_gate": False, "ffn_dim": 32, "use_position_embedding": True}
KINDS = {
    "hstu": {},
    "no bias": {"use_time_bias": False, "use_position_bias": False},
    "a bias a head": {"is_bias_per_head": True, "attention_dim": 6, "value_dim": 10},
    "calendars, request time": {"query_time": "next", **CALENDAR},
    "window": {"window": 4},
    "sasrec": SASREC,
}
LENGTHS, COUNTS = [0, 3, 9, 1, 7], [2, 0, 5, 1, 3]


def made(options, dtype=torch.float64):
    """An encoder whose biases count, and users' events and candidates."""
    torch.manual_seed(0)
    config = EncoderConfig(dim=16, num_layers=3, max_history_len=9, **options)
    encoder = HSTUEncoder(config).to(dtype).eval()
    for name, weight in encoder.named_parameters():
        if "bias" in name or "calendar" in name:
            torch.nn.init.normal_(weight)
    events = [torch.randn(n, 16, dtype=dtype) for n in LENGTHS]
    candidates = [torch.randn(n, 16, dtype=dtype) for n in COUNTS]
    times = [torch.randint(0, 10**8, (n,)).sort().values for n in LENGTHS]
    at = torch.tensor([10**8 + 1000 * n for n in range(len(LENGTHS))])
    return encoder, events, candidates, times, at


def uncached(encoder, events, candidates, times, at):
    """The candidates' vectors from `forward` over users' events and candidates together."""
    now = [at[u].repeat(count) for u, count in enumerate(COUNTS)]
    rows = [row for pair in zip(events, candidates, strict=True) for row in pair]
    when = [time for pair in zip(times, now, strict=True) for time in pair]
    following = [torch.cat([t[1:], at[u].repeat(min(len(t), 1))]) for u, t in enumerate(times)]
    after = [time for pair in zip(following, now, strict=True) for time in pair]
    sizes = torch.tensor(LENGTHS) + torch.tensor(COUNTS)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
    found = encoder(
        torch.cat(rows),
        offsets,
        torch.cat(when),
        torch.cat(after),
        num_targets=torch.tensor(COUNTS),
    )
    is_candidate = torch.cat(
        [torch.arange(n + c) >= n for n, c in zip(LENGTHS, COUNTS, strict=True)]
    )
    return found[is_candidate]


def history_of(encoder, events, times, at):
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), torch.tensor(LENGTHS).cumsum(0)])
    following = [torch.cat([t[1:], at[u].repeat(min(len(t), 1))]) for u, t in enumerate(times)]
    return encoder.encode_history(
        torch.cat(events), offsets, torch.cat(times), torch.cat(following)
    )


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_a_cached_history_gives_what_one_batch_gives(options, dtype, error):
    encoder, events, candidates, times, at = made(options, dtype)
    history = history_of(encoder, events, times, at)
    found = encoder.encode_candidates(torch.cat(candidates), torch.tensor(COUNTS), history, at)
    expected = uncached(encoder, events, candidates, times, at)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, rtol=error, atol=error)


@pytest.mark.parametrize("options", [{}, SASREC], ids=["hstu", "sasrec"])
def test_parts_of_the_candidates_are_scored_as_all_together(options, monkeypatch):
    encoder, events, candidates, times, at = made(options)
    history = history_of(encoder, events, times, at)
    whole = encoder.encode_candidates(torch.cat(candidates), torch.tensor(COUNTS), history, at)
    monkeypatch.setattr(encoder_module, "BATCH_CANDIDATES", 3)  # users are cut in two
    monkeypatch.setattr(ops, "MAX_BLOCK_SCORES", 20)  # one candidate or two at a time
    parts = encoder.encode_candidates(torch.cat(candidates), torch.tensor(COUNTS), history, at)
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-12)
    # The same history again, for other candidates of one user.
    one = torch.tensor([0, 0, 1, 0, 0])
    again = encoder.encode_candidates(candidates[2][3:4], one, history, at)
    torch.testing.assert_close(again[0], whole[COUNTS[0] + 3], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["silu", "softmax"])
@pytest.mark.parametrize("window", [0, 3])
def test_candidate_attention_is_the_slow_formula(kind, window):
    torch.manual_seed(0)
    lengths, counts = [5, 0, 8], [3, 1, 2]
    sizes = torch.tensor(lengths) + torch.tensor(counts)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
    is_candidate = torch.cat(
        [torch.arange(n + c) >= n for n, c in zip(lengths, counts, strict=True)]
    )
    q, k, v = (torch.randn(int(sizes.sum()), 2, 4, dtype=torch.float64) for _ in range(3))
    at = torch.tensor([9000, 9100, 9200])
    times = torch.randint(0, 9000, (len(q),)).sort().values
    times[is_candidate] = torch.repeat_interleave(at, torch.tensor(counts))
    bias = {
        "position_bias": torch.randn(2, 6, dtype=torch.float64),
        "time_bias": torch.randn(1, 129, dtype=torch.float64),
    }
    expected = jagged_attention_reference(
        q,
        k,
        v,
        offsets,
        kind=kind,
        scale=0.3,
        timestamps=times,
        num_targets=torch.tensor(counts),
        window=window,
        **bias,
    )
    past = torch.cat([torch.zeros(1, dtype=torch.int64), torch.tensor(lengths).cumsum(0)])
    layout = ops.candidate_layout(past, torch.tensor(counts), times[~is_candidate], at, window)
    keys = k[~is_candidate].transpose(0, 1), v[~is_candidate].transpose(0, 1)
    mine = (one[is_candidate] for one in (q, k, v))
    found = ops.candidate_attention(*mine, keys, layout, kind=kind, scale=0.3, **bias)
    torch.testing.assert_close(found, expected[is_candidate], rtol=1e-12, atol=1e-12)


def test_no_candidates_are_no_vectors():
    encoder, events, _, times, at = made({})
    history = history_of(encoder, events, times, at).to(torch.device("cpu"))
    assert isinstance(history, EncodedHistory)
    none = torch.zeros(len(LENGTHS), dtype=torch.int64)
    found = encoder.encode_candidates(torch.zeros(0, 16, dtype=torch.float64), none, history, at)
    assert found.shape == (0, 16)


def test_what_does_not_fit_is_told():
    encoder, events, candidates, times, at = made({})
    history = history_of(encoder, events, times, at)
    x, counts = torch.cat(candidates), torch.tensor(COUNTS)
    for arguments, told in [
        ((x, counts, history), r"this encoder uses times: give at"),
        ((x, counts[:4], history, at), r"num_candidates must be int64 \[5\], .* got torch.int64"),
        ((x, counts.float(), history, at), "got torch.float32"),
        ((x, counts, history, at[:2]), r"at must be int64 \[5\]"),
        ((x[1:], counts, history, at), r"num_candidates tells of 11 candidates in all; got 10"),
        ((x, counts - 1, history, at), "num_candidates must be at least 0; got -1"),
    ]:
        with pytest.raises(ValueError, match=told):
            encoder.encode_candidates(*arguments)
    with pytest.raises(ValueError, match=r"encode_candidates is for serving: call eval\(\) first"):
        encoder.train().encode_candidates(x, counts, history, at)
    with pytest.raises(ValueError, match="encode_history is for serving"):
        history_of(encoder, events, times, at)
