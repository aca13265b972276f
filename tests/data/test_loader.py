"""The training stream: nothing lost or repeated through changes of length, batch, layout, weights and datasets, and through resuming."""

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_llama3.config.errors import UserError
from megatron_llama3.config.run import RunConfig
from megatron_llama3.data.blend import integer_weights
from megatron_llama3.data.indexed_dataset import IndexedDataset
from megatron_llama3.data.loader import TrainingStream, batch_hash, build_train_and_valid_streams, whole_batch
from megatron_llama3.data.packing import PackedDocuments
from tests.data.datasets import numbered_documents, write_dataset

LENGTHS = {"a": [40, 1, 0, 25, 90, 7] * 3, "b": [300], "c": [11] * 40}
FIRST_ID = {"a": 0, "b": 10_000, "c": 20_000}
VOCAB = 30_000


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("datasets")
    return {name: write_dataset(folder / name, numbered_documents(lengths, FIRST_ID[name])) for name, lengths in LENGTHS.items()}


def make_stream(datasets, weights: dict[str, float], seed: int = 1, longest: int = 64, **kwargs) -> TrainingStream:
    sources = [PackedDocuments(datasets[name], 0, datasets[name].num_documents, seed) for name in weights]
    return TrainingStream(sources, integer_weights(list(weights.values())), VOCAB, seed, longest, **kwargs)


class Given:
    """Which places of each dataset's stream have been given, over all batches."""

    def __init__(self):
        self.places: dict[str, list[int]] = {}

    def plan(self, stream: TrainingStream, size: int, length: int) -> None:
        plan = stream.plan_batch(size, length)
        for k, source in enumerate(plan.sources):
            places = self.places.setdefault(stream.sources[source].dataset.fingerprint, [])
            for start, count in stream.stretches(plan, k):
                places += range(start, start + count)

    def check(self, stream: TrainingStream) -> None:
        """Nothing twice, and nothing left out before the window in which each dataset stands, as the stream's state tells it."""
        for row in stream.state_dict()["sources"]:
            places = self.places.get(row["fingerprint"], [])
            assert len(places) == row["epoch"] * row["tokens_per_epoch"] + row["token_offset"] == len(set(places))
            assert set(range(row["blocks"]["window"])) <= set(places)
            assert max(places, default=0) < row["blocks"]["window"] + row["tokens_per_epoch"] + row["blocks"]["block_length"]


def resumed(stream: TrainingStream, datasets, weights: dict[str, float], longest: int = 64) -> TrainingStream:
    """A new stream that goes on from the state of `stream`, which passes through JSON as in a checkpoint."""
    other = make_stream(datasets, weights, stream.seed, longest)
    other.load_state_dict(json.loads(json.dumps(stream.state_dict())))
    return other


def test_a_batch_by_hand(tmp_path):
    dataset = write_dataset(tmp_path / "x", [np.array([1, 2, 3])])
    stream = TrainingStream([PackedDocuments(dataset, 0, 1, 1)], [1], 10, 1, 4)
    batch = stream.next_batch(2, 4, 1, 0, 1)
    assert batch.tokens.tolist() == [[[1, 2, 3, 1]], [[2, 3, 1, 2]]]
    assert batch.targets.tolist() == [[[2, 3, 1, 2]], [[3, 1, 2, 3]]]
    assert batch.document_ids.tolist() == [[[0, 0, 0, 1]], [[0, 0, 1, 1]]]
    assert batch.loss_mask.tolist() == [[[True, True, False, True]], [[True, False, True, True]]]
    assert batch.position_ids.tolist() == [[[0, 1, 2, 3]], [[0, 1, 2, 3]]]
    assert [array.dtype for array in batch] == [np.int64, np.int64, bool, np.int32, np.int64]


def test_reading_ahead_asks_for_what_comes_next_and_moves_nothing(datasets, monkeypatch):
    stream, asked = make_stream(datasets, {"a": 1, "b": 2, "c": 1}), []

    def note(dataset, starts, lengths):
        ahead(dataset, starts, lengths)
        asked.extend(t for start, length in zip(starts, lengths) for t in dataset.tokens(int(start), int(length)).tolist())

    ahead = IndexedDataset.read_ahead
    monkeypatch.setattr(IndexedDataset, "read_ahead", note)
    for _ in range(30):
        asked.clear()
        before = stream.state_dict()
        stream.read_ahead(8, 16, 2, 1, 2)
        assert stream.state_dict() == before
        batch = stream.next_batch(8, 16, 2, 1, 2)
        wanted = np.concatenate([batch.tokens, batch.targets[..., -1:]], axis=-1)
        assert asked == wanted.reshape(-1).tolist()


def test_options_of_positions_and_borders(tmp_path):
    dataset = write_dataset(tmp_path / "x", [np.array([1, 2, 3])])
    stream = TrainingStream([PackedDocuments(dataset, 0, 1, 1)], [1], 10, 1, 5, reset_position_ids=True, loss_across_documents=True)
    batch = stream.next_batch(2, 5, 1, 0, 1)
    assert batch.position_ids.tolist() == [[[0, 1, 2, 0, 1]], [[0, 0, 1, 2, 0]]]
    assert batch.loss_mask.all()


def test_borders_come_from_the_index_and_not_from_ids(tmp_path):
    """An end-of-document id in mid-document is no border, and equal neighbours are."""
    dataset = write_dataset(tmp_path / "x", [np.array([9, 5, 9, 9, 9]), np.array([9, 9])])
    packed = PackedDocuments(dataset, 0, 2, 1)
    batch = TrainingStream([packed], [1], 10, 1, 7).next_batch(1, 7, 1, 0, 1)
    first = packed.spans(0, 7).lengths[0]
    assert batch.document_ids.tolist() == [[[0] * first + [1] * (7 - first)]]
    assert np.flatnonzero(~batch.loss_mask[0, 0]).tolist() == [first - 1, 6]


@pytest.mark.parametrize("dp_size, micro_batch_size", [(1, 1), (1, 4), (2, 3), (3, 2), (4, 1), (12, 1)])
def test_the_ranks_of_any_layout_together_get_the_batch_of_one(datasets, dp_size, micro_batch_size):
    weights = {"a": 3, "b": 1, "c": 2}
    alone = make_stream(datasets, weights)
    ranks = [make_stream(datasets, weights) for _ in range(dp_size)]
    for length in (16, 48):
        expected = alone.next_batch(12, length, 12, 0, 1)
        parts = [rank.next_batch(12, length, micro_batch_size, d, dp_size) for d, rank in enumerate(ranks)]
        assert parts[0].tokens.shape == (12 // micro_batch_size // dp_size, micro_batch_size, length)
        assert batch_hash(whole_batch(parts)) == batch_hash(expected)
        for d, part in enumerate(parts):  # the rule of the module's docstring, sequence by sequence
            for m, j in np.ndindex(part.tokens.shape[:2]):
                k = (m * dp_size + d) * micro_batch_size + j
                np.testing.assert_array_equal(part.tokens[m, j], expected.tokens[0, k])
    assert all(rank.state_dict() == alone.state_dict() for rank in ranks)


def test_a_target_outside_the_vocabulary_is_refused(tmp_path):
    dataset = write_dataset(tmp_path / "x", [np.array([1, 2, 3])])
    with pytest.raises(UserError, match=r"x: document 0 holds token id 3, outside .* 3 entries"):
        TrainingStream([PackedDocuments(dataset, 0, 1, 1)], [1], 3, 1, 2).next_batch(1, 2, 1, 0, 1)


def test_a_batch_that_the_layout_does_not_divide_is_refused(datasets):
    with pytest.raises(UserError, match="12 is not divisible by micro-batch size 2 x data-parallel size 4"):
        make_stream(datasets, {"a": 1}).next_batch(12, 8, 2, 0, 4)


_blends = st.sampled_from([{"a": 1}, {"a": 3, "b": 2}, {"b": 1, "c": 5, "a": 1}, {"c": 1}])
_step = st.tuples(
    st.sampled_from([1, 2, 6]), st.one_of(st.sampled_from([8, 16, 32, 64]), st.integers(1, 70)), _blends, st.sampled_from([32, 64, 70])
)
_steps = st.lists(_step, min_size=1, max_size=12)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=_steps)
def test_no_token_is_lost_or_repeated_whatever_changes(datasets, steps):
    """Batch size, sequence length, weights, the set of datasets and the longest sequence change at every step, each change a resume."""
    given_places, stream = Given(), make_stream(datasets, steps[0][2])
    for batch_size, length, weights, longest in steps:
        stream = resumed(stream, datasets, weights, longest)
        given_places.plan(stream, batch_size, length)
    given_places.check(stream)
    assert sum(map(len, given_places.places.values())) == sum(size * length for size, length, *_ in steps)


def test_resuming_anywhere_equals_going_on(datasets):
    weights = {"a": 5, "b": 2, "c": 3}
    schedule = [(4, 8)] * 5 + [(6, 8)] * 3 + [(6, 50)] * 6
    unbroken = make_stream(datasets, weights)
    states, hashes = [], []
    for size, length in schedule:
        states.append(json.dumps(unbroken.state_dict()))
        hashes.append(batch_hash(unbroken.next_batch(size, length, 2, 0, 1)))
    assert len(set(hashes)) == len(hashes)
    for begin, state in enumerate(states):
        stream = make_stream(datasets, weights)
        stream.load_state_dict(json.loads(state))
        assert [batch_hash(stream.next_batch(size, length, 2, 0, 1)) for size, length in schedule[begin:]] == hashes[begin:]


def test_the_blend_is_exact_through_batches_and_changes_of_weight(datasets):
    drawn, stream = [], make_stream(datasets, {"a": 3, "b": 2, "c": 2})
    for size in (1, 5, 2, 30, 7):
        drawn += stream.plan_batch(size, 10)[0].tolist()
    for n in range(1, len(drawn) + 1):
        for i, weight in enumerate((3, 2, 2)):
            assert abs(drawn[:n].count(i) - n * weight / 7) < 1
    stream = resumed(stream, datasets, {"a": 1, "b": 0, "c": 1})
    for weights in ((1, 0, 1), (5, 0, 1)):
        stream = resumed(stream, datasets, dict(zip("abc", weights)))
        changed = np.concatenate([stream.plan_batch(size, 10)[0] for size in (1, 4, 33)])
        assert 1 not in changed
        assert all(abs((changed[:n] == 0).sum() - n * weights[0] / sum(weights)) < 1 for n in range(1, 39))


def test_moved_and_reordered_datasets_go_on(datasets, tmp_path):
    stream = make_stream(datasets, {"a": 1, "b": 1})
    stream.next_batch(5, 10, 1, 0, 1)
    moved = {**datasets, "a": write_dataset(tmp_path / "elsewhere", numbered_documents(LENGTHS["a"], FIRST_ID["a"]))}
    other = resumed(stream, moved, {"b": 1, "a": 1})
    first, second = ({row.pop("fingerprint"): row | {"prefix": ""} for row in s.state_dict()["sources"]} for s in (stream, other))
    assert first == second


def test_a_dataset_that_returns_goes_on_where_it_stood(datasets):
    stream = make_stream(datasets, {"a": 1, "b": 1})
    given_places = Given()
    given_places.plan(stream, 4, 10)
    stream = resumed(stream, datasets, {"b": 1})
    given_places.plan(stream, 4, 10)
    stream = resumed(stream, datasets, {"b": 1})
    assert [row["sequences_at_weights"] for row in stream.state_dict()["sources"]] == [4, 0]
    stream = resumed(stream, datasets, {"a": 1, "b": 1})
    given_places.plan(stream, 4, 10)
    assert [row["sequences_at_weights"] for row in resumed(stream, datasets, {"a": 1, "b": 1}).state_dict()["sources"]] == [2, 2]
    given_places.check(stream)


def test_going_on_with_another_seed_or_split_is_refused(datasets):
    state = make_stream(datasets, {"a": 1}).state_dict()
    with pytest.raises(UserError, match=r"--seed 2, but .* seed 1"):
        make_stream(datasets, {"a": 1}, seed=2).load_state_dict(state)
    part = TrainingStream([PackedDocuments(datasets["a"], 0, 10, 1)], [1], VOCAB, 1, 64)
    with pytest.raises(UserError, match="keep --split"):
        part.load_state_dict(state)


def test_a_checkpoint_of_the_old_order_goes_on_in_it(datasets):
    """Position and hashes as the version before blocks left and made them: the stream of documents as it is."""
    rows = [
        ("9837999b5c7f99b13d86274a92961b48", "a", [0, 18], 96, 489, 12, 3),
        ("a114294fb5f03409d7edc0fb3efa6f2a", "b", [0, 1], 64, 300, 8, 2),
    ]
    names = ("fingerprint", "prefix", "documents", "token_offset", "tokens_per_epoch", "sequences", "weight")
    saved = [dict(zip(names, row)) for row in rows]
    stream = make_stream(datasets, {"a": 3, "b": 2})
    stream.load_state_dict({"seed": 1, "sources": [row | {"epoch": 0, "sequences_at_weights": row["sequences"]} for row in saved]})
    hashes = []
    for size, length in [(4, 8), (6, 16), (2, 50), (6, 50)]:
        stream = resumed(stream, datasets, {"a": 3, "b": 2})
        stream.read_ahead(size, length, 2, 0, 1)
        hashes.append(batch_hash(stream.next_batch(size, length, 2, 0, 1))[:16])
    assert hashes == ["32db0b34092ee9be", "6545f5e8de4d68f1", "87653529f98c7a13", "49bb7026ed114da2"]


def test_longer_sequences_wait_for_whole_blocks_until_the_epoch_ends(datasets, caplog):
    stream = make_stream(datasets, {"a": 1}, longest=16)
    stream.next_batch(4, 16, 1, 0, 1)
    stream = resumed(stream, datasets, {"a": 1}, longest=32)
    assert "up to its epoch's end sequences are made of blocks of 16 tokens" in caplog.text
    lengths = []
    for _ in range(40):
        plan = stream.plan_batch(1, 32)
        lengths.append([stretch.length for stretch in stream.stretches(plan, 0)])
    assert lengths.count([16, 16]) >= 10
    assert sum(found != [32] for found in lengths[14:]) <= 3  # its 31 blocks end within a sequence: one a window is of two stretches
    caplog.clear()
    resumed(stream, datasets, {"a": 1}, longest=32)
    assert not caplog.text


def test_a_damaged_position_is_refused(datasets):
    stream = make_stream(datasets, {"a": 1})
    stream.plan_batch(1, 16)
    (row,) = stream.state_dict()["sources"]
    wrong = [(name, n) for name in row["blocks"] for n in (-1, 10**18, 0.5, "1") if (name, n) != ("block_length", 10**18)]
    damages = [{"token_offset": 10**18}, *({"blocks": row["blocks"] | {name: n}} for name, n in wrong)]
    damages += [{"blocks": {}}, {"blocks": row["blocks"] | {"block_length": 0}}, {"blocks": row["blocks"] | {"piece_length": 0}}]
    for damage in damages:
        with pytest.raises((TypeError, ValueError)):
            make_stream(datasets, {"a": 1}).load_state_dict({"seed": 1, "sources": [row | damage]})


def run_config(**data) -> RunConfig:
    config = RunConfig()
    config.model.vocab_size = VOCAB
    for name, value in data.items():
        setattr(config.data, name, value)
    return config


def test_built_from_a_config(datasets):
    paths = [datasets[name].prefix for name in "ac"]
    train, valid = build_train_and_valid_streams(run_config(data_path=["0.3", paths[0], "0.7", paths[1]], split="80,20,0"))
    assert train.weights == [3, 7]
    assert [(s.first, s.last) for s in train.sources + valid.sources] == [(0, 14), (0, 32), (14, 18), (32, 40)]
    first = batch_hash(valid.next_batch(2, 16, 1, 0, 1))
    valid.next_batch(2, 16, 1, 0, 1)
    valid.rewind()
    assert batch_hash(valid.next_batch(2, 16, 1, 0, 1)) == first
    train, valid = build_train_and_valid_streams(run_config(train_data_path=[paths[0]], valid_data_path=[paths[1]]))
    assert (train.sources[0].last, valid.sources[0].last) == (18, 40)


def test_no_validation_where_none_is_asked(datasets):
    path = [datasets["a"].prefix]
    assert build_train_and_valid_streams(run_config(data_path=path, split="1,0,0"))[1] is None
    assert build_train_and_valid_streams(run_config(train_data_path=path))[1] is None
    config = run_config(data_path=path, split="9,1,0")
    config.training.eval_iters = 0
    assert build_train_and_valid_streams(config)[1] is None


@pytest.mark.parametrize(
    "data, message",
    [
        ({}, "neither of them"),
        ({"data_path": ["a"], "train_data_path": ["a"]}, "both of them"),
        ({"data_path": ["a"], "valid_data_path": ["a"]}, "--valid-data-path goes with --train-data-path"),
        ({"data_path": ["/nowhere/a"]}, "/nowhere/a.idx: no such file"),
        ({"train_data_path": ["1", "a", "b", "2"]}, "--train-data-path"),
    ],
)
def test_bad_data_flags_are_one_line(data, message):
    with pytest.raises(UserError, match=message):
        build_train_and_valid_streams(run_config(**data))


def test_a_plan_is_of_whole_numbers(datasets):
    stream = make_stream(datasets, {"a": 2, "b": 1})
    for _ in range(2):
        sources, positions, *_ = stream.plan_batch(6, 5)
        assert (sources.dtype, positions.dtype, sources.shape, positions.shape) == (np.int64, np.int64, (6,), (6,))
