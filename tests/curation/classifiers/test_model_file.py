"""Classifiers are saved whole, load to the same numbers, and are refused where they do not fit."""

import numpy as np
import pytest

from megatron_llama3.config.errors import UserError
from megatron_llama3.curation.classifiers.model_file import load_classifier, save_classifier
from tests.curation.classifiers.models import change_description, examples, trained


@pytest.fixture(scope="module")
def model():
    return trained()


def test_saved_and_loaded_it_gives_the_same_numbers(model, tmp_path):
    model.save(tmp_path / "new" / "model.npz")
    texts = [*examples(3, 2)[0], ""]
    np.testing.assert_array_equal(load_classifier(tmp_path / "new" / "model.npz").probabilities(texts), model.probabilities(texts))
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["model.npz"]
    assert model.probabilities([]).shape == (0, 2)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"features": 0}, "version 0 of the features, this is 1"),
        ({"sha256": "0"}, "do not match their checksum"),
        ({"kind": "forest"}, "is of kind 'forest'"),
        ({"config": {"labels": ["a", "b", "c"]}}, "do not fit its configuration"),
        ({"config": {"colour": "red"}}, "do not fit its configuration"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(model, tmp_path, changes, message):
    path = tmp_path / "model.npz"
    model.save(path)
    change_description(path, **changes)
    with pytest.raises(UserError, match=f"model .*model.npz: .*{message}"):
        load_classifier(path)


def test_no_model_and_half_a_model_are_refused(model, tmp_path):
    path = tmp_path / "model.npz"
    with pytest.raises(UserError, match="is no classifier"):
        load_classifier(path)
    model.save(path)
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(UserError, match="is no classifier"):
        load_classifier(path)


def test_a_save_that_fails_leaves_the_old_model(tmp_path, monkeypatch):
    path = tmp_path / "model.npz"
    save_classifier(path, "linear", {}, {"a": np.ones(3)})
    before = path.read_bytes()

    def fails(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", fails)
    with pytest.raises(OSError, match="No space"):
        save_classifier(path, "linear", {}, {"a": np.zeros(3)})
    assert [file.name for file in tmp_path.iterdir()] == ["model.npz"]
    assert path.read_bytes() == before
