"""A block is counted from outside, whatever it does; a document that breaks it is one row, not the end."""

import numpy as np
import pytest
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.filters.base_filter import BaseFilter

from megatron_llama3.config.errors import UserError
from megatron_llama3.curation.observe import SAMPLES, Observed, Tally, WriteTallies, read_tallies
from megatron_llama3.curation.storage.documents import ReadDocuments, WriteDocuments
from tests.curation.runs import documents


class Short(BaseFilter):
    """Drops "short" texts, breaks at "bad" ones."""

    name = "short"

    def __init__(self, error=None, **options):
        super().__init__(**options)
        self.error = error or ValueError("bad\ntext")

    def filter(self, doc):
        if doc.text == "bad":
            raise self.error
        doc.text = doc.text.strip()
        return (False, "too short") if doc.text == "short" else True

    def filter_batch(self, batch):
        return [self.filter(document) for document in batch]


class Swallows(PipelineStep):
    """Drops without a word every second document, and changes the others."""

    name, type = "swallows", "TEST"

    def run(self, data, rank=0, world_size=1):
        for number, document in enumerate(data):
            document.text += "!"
            if number % 2:
                yield document


class Judges(BaseFilter):
    """Keeps from a score of 0.5 on; the text is the score, or none."""

    name, score, score_threshold, notes = "judges", ("sureness", 0.25), 0.5, ("as told",)

    def filter(self, doc):
        if doc.text != "none":
            doc.metadata["sureness"] = float(doc.text)
        return doc.metadata.get("sureness", 1.0) >= 0.5 or (False, "unsure")


def test_scores_languages_and_notes_add_up_over_tasks(tmp_path):
    texts, languages = ["0.1", "0.2", "0.5", "0.9", "0.8", "none", "nan"], ["de", "en", "en", "de", "en", "en", "de"]
    for rank, share in enumerate(np.array_split(np.array(documents(texts, language=languages)), 2)):
        step = Observed("judges", Judges())
        WriteTallies(str(tmp_path), [step]).run(step.run(iter(share)), rank, 2)
    total = read_tallies(str(tmp_path), 2)[0]
    assert (total.score, total.score_width, total.threshold, total.notes) == ("sureness", 0.25, 0.5, ["as told"])
    assert total.scores == {"0": [0, 2], "2": [1, 0], "3": [2, 0]}
    assert total.kinds == {"language": {"en": [3, 10], "de": [1, 3]}}
    assert total.reasons == {"unsure": 3}


@pytest.mark.parametrize("batch_size", [1, 3])
def test_kept_changed_dropped_and_broken(batch_size):
    step = Observed("short", Short(batch_size=batch_size))
    kept = list(step.run(iter(documents(["one", " two", "bad", "short", "three", "bad", "short"]))))
    assert [document.text for document in kept] == ["one", "two", "three"]
    tally = step.tally
    assert (tally.documents_in, tally.documents_out, tally.changed) == (7, 3, 1)
    assert (tally.characters_in, tally.characters_out) == (28, 11)
    assert tally.reasons == {"error: ValueError: bad\ntext": 2, "too short": 2}
    assert {sample[1:][0] for sample in tally.samples["too short"]} == {"3", "6"}
    assert tally.samples["changed"][0][1:] == ["1", " two", "two"]


def test_what_a_step_drops_without_a_word_is_seen():
    step = Observed("swallows", Swallows())
    assert [document.text for document in step.run(iter(documents(list("abcde"))))] == ["b!", "d!"]
    assert step.tally.reasons == {"dropped": 3}
    assert step.tally.changed == 2


def test_errors_about_the_run_and_of_earlier_steps_are_not_a_documents():
    with pytest.raises(UserError):
        list(Observed("short", Short(UserError("no model"))).run(iter(documents(["bad"]))))

    def failing():
        yield from documents(["one"])
        raise KeyError("reader")

    step = Observed("short", Short())
    with pytest.raises(KeyError):
        list(step.run(failing()))
    assert step.tally.reasons == {}


def test_a_step_that_counts_documents_is_never_begun_again():
    block = Short()
    block.positional = True
    with pytest.raises(ValueError):
        list(Observed("short", block).run(iter(documents(["bad", "good"]))))


def test_samples_and_sums_do_not_depend_on_the_number_of_tasks(tmp_path):
    texts = ["short" if number % 3 else f" text {number}" for number in range(50)]
    sums = []
    for tasks in (1, 4):
        folder = str(tmp_path / str(tasks))
        for rank, share in enumerate(np.array_split(np.array(documents(texts)), tasks)):
            step = Observed("short", Short())
            WriteTallies(folder, [step]).run(step.run(iter(share)), rank, tasks)
        sums += read_tallies(folder, tasks)
    assert sums[0] == sums[1]
    assert len(sums[0].samples["too short"]) == SAMPLES


def test_reasons_without_number_stay_few():
    tally = Tally("x")
    for number in range(1000):
        tally.drops(str(number), "text", f"score {number}")
    assert len(tally.reasons) == 201
    assert sum(tally.reasons.values()) == 1000


def test_a_document_that_cannot_be_written_is_counted(tmp_path):
    step = WriteDocuments(str(tmp_path))
    given = documents(["good", "lone \ud800 surrogate", "last"])
    assert [document.text for document in step.run(iter(given), 3)] == ["good", "last"]
    assert [document.text for document in ReadDocuments(str(tmp_path)).run(None, 3)] == ["good", "last"]
    assert sum(step.tally.reasons.values()) == 1


def test_a_writer_that_is_interrupted_leaves_nothing(tmp_path):
    stream = WriteDocuments(str(tmp_path)).run(iter(documents(["a", "b"])))
    next(stream)
    stream.close()
    assert list(tmp_path.iterdir()) == []


def test_what_a_block_takes_out_of_a_document_is_no_dropped_text():
    tally, (short, same) = Tally("x"), documents(["left", "same"])
    tally.leaves(short, "<b>left</b>")
    tally.leaves(same, "same")
    tally.drops("c", "gone with its document", "why")
    other = Tally("x", characters_removed=5)
    other.add(tally)
    assert (tally.characters_removed, other.characters_removed) == (7, 12)
