"""Language identification without a download: py3langid, whose model of 139 languages is in its 4 MB wheel.

Beside it were considered: fastText's lid.176 and GlotLID (a download; datatrove has them as `LanguageFilter`), lingua (a wheel of 96 MB).
"""

from datatrove.data import Document
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.pipeline.writers.disk_base import DiskWriter

from megatron_llama3.config.errors import UserError

# Written alike; the model tells them apart, a corpus wants them together.
_SAME_LANGUAGE = {"wuu": "zh", "yue": "zh", "nb": "no", "nn": "no"}
_PARTS, _PART = 5, 1_000  # a long text is judged by so many pieces of so many characters, spread over it


class LanguageFilter(BaseFilter):
    """Keeps documents in one of `languages` with at least that language's threshold; drops with `language_LABEL` or `language_uncertain`.

    languages: ISO 639-1 codes, as a list or with thresholds, `{en: 0.65, ja: 0.5}`; none given: every language that is sure enough.
    threshold: for languages without one of their own. The model's `zxx` is text in no language: tables, code, noise.
    Leaves `language` and `language_score` in the metadata.
    """

    name = "Language"
    score = ("language_score", 0.05)

    def __init__(
        self, languages: list[str] | dict[str, float] | None = None, threshold: float = 0.65, exclusion_writer: DiskWriter | None = None
    ):
        super().__init__(exclusion_writer)
        known = {_SAME_LANGUAGE.get(label, label) for label in _identifier().nb_classes}
        if unknown := set(languages or ()) - known:
            raise UserError(f"languages: {', '.join(sorted(unknown))} is none the model knows; give codes such as en or zh")
        self.threshold = threshold
        self.thresholds = dict(languages) if isinstance(languages, dict) else dict.fromkeys(languages or (), threshold)
        thresholds = {*self.thresholds.values()} or {threshold}
        self.score_threshold = thresholds.pop() if len(thresholds) == 1 else None

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        language, score = identify(doc.text)
        doc.metadata["language"], doc.metadata["language_score"] = language, round(score, 4)
        if self.thresholds and language not in self.thresholds:
            return False, f"language_{language}"
        if score < self.thresholds.get(language, self.threshold):
            return False, "language_uncertain"
        return True


def identify(text: str) -> tuple[str, float]:
    """The most probable language and its probability."""
    scores: dict[str, float] = {}
    for label, score in _identifier().rank(_sample(text)):
        label = _SAME_LANGUAGE.get(label, label)
        scores[label] = scores.get(label, 0.0) + score
    best = max(scores, key=scores.get)
    return best, float(scores[best])


def _sample(text: str) -> str:
    if len(text) <= _PARTS * _PART:
        return text
    step = (len(text) - _PART) // (_PARTS - 1)
    return " ".join(text[i * step : i * step + _PART] for i in range(_PARTS))


_LOADED = []


def _identifier():
    """One model a process, loaded when first asked for (0.1 s)."""
    if not _LOADED:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier

        _LOADED.append(LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True))
    return _LOADED[0]
