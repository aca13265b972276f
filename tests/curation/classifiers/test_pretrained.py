"""The pretrained classifier, fine-tuned from a small random encoder that lies in a folder as Hugging Face's do."""

import subprocess
import sys
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch

from megatron_llama3.config.errors import UserError
from megatron_llama3.curation.blocks.quality import QualityFilter
from megatron_llama3.curation.classifiers.model_file import load_classifier
from tests.curation import planted
from tests.curation.blocks.test_quality import write_records
from tests.curation.classifiers.models import change_description
from tests.curation.steps import document, judge

TOOL = Path(__file__).parents[3] / "tools" / "train_quality.py"
LONG = " word" * 2000


def examples(count: int, seed: int) -> tuple[list[str], list[str]]:
    rng = Random(seed)
    texts = [text for _ in range(count) for text in (planted.prose(rng, 3), planted.gibberish(rng, 40))]
    return texts, ["good", "bad"] * count


@pytest.fixture(scope="module", params=["roberta", "distilbert"])
def base(request, tmp_path_factory):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp(request.param)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    special = ["<s>", "<pad>", "</s>"]
    tokenizer.train_from_iterator(examples(50, 9)[0], trainers.BpeTrainer(vocab_size=600, special_tokens=special))
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    names = {"bos_token": "<s>", "cls_token": "<s>", "eos_token": "</s>", "sep_token": "</s>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **names).save_pretrained(folder)
    sizes = {
        "roberta": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64},
        "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64},
    }[request.param]
    config = AutoConfig.for_model(request.param, vocab_size=600, max_position_embeddings=66, pad_token_id=1, **sizes)
    AutoModel.from_config(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def model(base):
    from megatron_llama3.curation.classifiers.pretrained import PretrainedClassifier

    return PretrainedClassifier.train_on(*examples(60, 0), base=base, epochs=4, lr=3e-3)


def test_it_learns_is_saved_whole_and_filters(model, tmp_path):
    model.save(tmp_path / "model.npz")
    texts, labels = examples(30, 1)
    loaded = load_classifier(tmp_path / "model.npz")
    np.testing.assert_array_equal(loaded.probabilities([*texts, "", LONG]), model.probabilities([*texts, "", LONG]))
    assert loaded.probabilities([]).shape == (0, 2)
    step = QualityFilter(str(tmp_path / "model.npz"))
    documents = [document(text, str(i)) for i, text in enumerate(texts)]
    kept = {doc.id for doc in step.run(iter(documents))}
    assert np.mean([(doc.id in kept) == (label == "good") for doc, label in zip(documents, labels)]) > 0.9
    assert judge(QualityFilter(str(tmp_path / "model.npz"), min_score=1.01), texts[0])[0] == "low_quality"
    change_description(tmp_path / "model.npz", config={"labels": ["bad", "good"]})
    with pytest.raises(UserError, match=r"model\.npz: its weights do not fit its configuration"):
        load_classifier(tmp_path / "model.npz")


def test_company_in_a_batch_changes_nothing(model):
    """Padding is masked: a text beside a long one scores what it scores alone, to rounding."""
    texts = examples(4, 2)[0]
    np.testing.assert_allclose(
        model.probabilities([*texts, LONG])[:-1], np.concatenate([model.probabilities([text]) for text in texts]), atol=1e-6
    )


def test_training_is_a_function_of_its_input(base):
    from megatron_llama3.curation.classifiers.pretrained import PretrainedClassifier

    numbers = []
    for _ in range(2):
        torch.rand(7)  # the state of others does not count, nor is it touched
        before = torch.get_rng_state()
        numbers.append(PretrainedClassifier.train_on(*examples(20, 0), base=base, epochs=1).probabilities(["a text"]))
        assert torch.equal(torch.get_rng_state(), before)
    np.testing.assert_array_equal(*numbers)


def test_what_folders_of_models_may_lack(base, tmp_path):
    """A tokenizer that does not say how long a text may be, and a head of other labels, which goes."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from megatron_llama3.curation.classifiers.pretrained import PretrainedClassifier

    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.model_max_length = int(1e30)
    tokenizer.save_pretrained(tmp_path)
    AutoModelForSequenceClassification.from_pretrained(base, num_labels=5).save_pretrained(tmp_path)
    model = PretrainedClassifier.train_on(*examples(10, 0), base=str(tmp_path), epochs=1)
    assert model.config.max_tokens == 64
    assert model.probabilities([LONG, "a \ud800 b"]).shape == (2, 2)


@pytest.mark.slow
def test_the_tool_fine_tunes_and_refuses_what_is_no_model(base, tmp_path):
    texts, labels = examples(60, 0)
    judged = write_records(tmp_path / "judged.jsonl", [{"text": t, "score": 4 if n == "good" else 1} for t, n in zip(texts, labels)])
    command = [sys.executable, TOOL, "--judgements", judged, "--min-score", "3", "--output", tmp_path / "model.npz", "--kind", "pretrained"]
    result = subprocess.run([*command, "--pretrained", base], capture_output=True, text=True, check=True)
    assert "area under the ROC curve" in result.stdout
    assert load_classifier(tmp_path / "model.npz").config.labels == ["bad", "good"]
    (tmp_path / "empty").mkdir()
    for flags, message in [
        ([], "needs --pretrained"),
        (["--pretrained", tmp_path / "empty"], "no encoder and tokenizer"),
    ]:
        refused = subprocess.run([*command, *flags], capture_output=True, text=True, env={"HF_HUB_OFFLINE": "1"})
        assert (refused.returncode, len(refused.stderr.splitlines())) == (2, 1), refused.stderr
        assert message in refused.stderr
