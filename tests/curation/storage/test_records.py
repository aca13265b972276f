"""Records of equal keys meet in one partition, whatever was spilled, and documents keep their numbers."""

import numpy as np
import pytest

from megatron_llama3.curation.storage import records
from megatron_llama3.curation.storage.records import RecordReader, RecordWriter

_DTYPE = np.dtype([("key", "<u8"), ("document", "<u4")])


@pytest.fixture(params=[1 << 21, 7], ids=["in memory", "spilled"])
def written(request, tmp_path, monkeypatch):
    """(folder, [(key, document number)]) of 3 ranks with 10, 0 and 25 documents, and 3 partitions."""
    monkeypatch.setattr(records, "_SPILL_RECORDS", request.param)
    random, all_records, first = np.random.default_rng(0), [], 0
    for rank, count in enumerate((10, 0, 25)):
        writer = RecordWriter(str(tmp_path), rank, 3, _DTYPE)
        for document in range(count):
            keys = random.integers(0, 12, 4)
            writer.append(np.array([(key, document) for key in keys], _DTYPE))
            all_records += [(int(key), first + document) for key in keys]
        writer.close(count)
        first += count
    return tmp_path, all_records


def test_every_record_is_in_the_partition_of_its_key(written):
    folder, all_records = written
    reader = RecordReader(str(folder), 3, _DTYPE)
    assert reader.first.tolist() == [0, 10, 10, 35]
    found = []
    for partition in range(3):
        rows, numbers = reader.partition(partition)
        assert (rows["key"] % 3 == partition).all()
        assert (np.diff(numbers) >= 0).all()
        found += zip(rows["key"].tolist(), numbers.tolist())
    assert sorted(found) == sorted(all_records)


def test_buckets_are_of_successive_documents_across_ranks(written):
    folder, all_records = written
    reader = RecordReader(str(folder), 3, _DTYPE)
    buckets = [sorted(rows["key"].tolist()) for rows in reader.buckets(1, 8)]
    expected = [sorted(k for k, d in all_records if k % 3 == 1 and b <= d < b + 8) for b in range(0, 35, 8)]
    assert buckets == expected


def test_nothing_is_there_before_close(tmp_path):
    RecordWriter(str(tmp_path), 0, 2, _DTYPE).append(np.zeros(3, _DTYPE))
    assert list(tmp_path.iterdir()) == []
