"""Training a byte-level BPE vocabulary with Llama 3's split pattern, and extending one (paper 3.2: 28K tokens on top of 100K).

`train` gives ranks from text; `extend` keeps a base vocabulary's ids and learns more tokens, merging from where the base's merges end.
"""

from collections import Counter
from collections.abc import Iterable, Iterator

import regex

from megatron_llama3.config.errors import UserError
from megatron_llama3.tokenizer.llama3 import NUM_SPECIAL_TOKENS, Tokenizer
from megatron_llama3.tokenizer.vocabulary_files import SPLIT_PATTERN, byte_to_unicode

# Where `extend` writes base tokens as single characters for the trainer: private planes, so that none is whitespace.
_FIRST_STAND_IN = 0x20000


def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A tokenizer of exactly `vocab_size` entries, the 256 special tokens included. Raises UserError where the text is too small."""
    from tokenizers import Regex, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as HuggingFaceTokenizer

    n_bpe = vocab_size - NUM_SPECIAL_TOKENS
    if n_bpe < 256:
        raise UserError(f"--vocab-size {vocab_size}: needs at least 512 (256 bytes and 256 special tokens)")
    model = HuggingFaceTokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated")
    model.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    model.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=n_bpe, initial_alphabet=alphabet, show_progress=False))
    to_byte = {char: byte for byte, char in byte_to_unicode().items()}
    ranks = {bytes(to_byte[char] for char in token): rank for token, rank in model.get_vocab().items()}
    if len(ranks) < n_bpe:
        found = len(ranks) + NUM_SPECIAL_TOKENS
        raise UserError(f"--vocab-size {vocab_size}: the text yields only {found} entries; give more text or a smaller size")
    return Tokenizer(ranks)


def extend(base: Tokenizer, texts: Iterable[str], num_tokens: int) -> Tokenizer:
    """`base` plus `num_tokens` tokens learned on `texts`. Base ids stay; the new ids follow them, and special tokens come after.

    Every word is first encoded with the base; each base token then stands as one character in what the trainer sees,
    so that it learns merges of base tokens only.
    """
    from tokenizers import Tokenizer as HuggingFaceTokenizer
    from tokenizers import models, pre_tokenizers, trainers

    stand_ins = {token: chr(_FIRST_STAND_IN + rank) for token, rank in base.ranks.items()}
    original = {char: token for token, char in stand_ins.items()}
    token_bytes = base.token_bytes
    words = {
        "".join(stand_ins[token_bytes[id_]] for id_ in base.encoding.encode_ordinary(word)): count
        for word, count in _count_words(texts).items()
    }
    alphabet = set().union(*words)
    # A learned string may spell a token already there; a few spare merges make up for it.
    size = len(alphabet) + num_tokens + num_tokens // 50 + 16
    model = HuggingFaceTokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(vocab_size=size, show_progress=False)
    model.train_from_iterator(_repeated(words), trainer)
    learned = sorted((id_, word) for word, id_ in model.get_vocab().items() if len(word) > 1)
    ranks = dict(base.ranks)
    for _, word in learned:
        if len(ranks) < base.n_bpe + num_tokens:
            ranks.setdefault(b"".join(original[char] for char in word), len(ranks))
    if len(ranks) < base.n_bpe + num_tokens:
        raise UserError(f"--add {num_tokens}: the text yields only {len(ranks) - base.n_bpe} new tokens; give more text or add fewer")
    return Tokenizer(ranks)


def _count_words(texts: Iterable[str]) -> Counter[str]:
    """How often each piece of the split pattern occurs."""
    pattern = regex.compile(SPLIT_PATTERN)
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(pattern.findall(text))
    return counts


def _repeated(words: dict[str, int], at_once: int = 10_000) -> Iterator[str]:
    """Each word as often as it was counted, in texts of bounded length: the trainer takes no counts."""
    for word, count in words.items():
        for start in range(0, count, at_once):
            yield " ".join([word] * min(at_once, count - start))


def characters_per_token(tokenizer: Tokenizer, texts: Iterable[str]) -> float:
    """The paper's measure of compression (3.2: 3.17 for Llama 2, 3.94 for Llama 3, on English)."""
    characters = tokens = 0
    for text in texts:
        characters += len(text)
        tokens += len(tokenizer.encode(text))
    return characters / max(tokens, 1)
