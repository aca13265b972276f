"""The merges that tiktoken's ranks imply, spelled out as Hugging Face's `tokenizer.json` wants them."""


def merges_of(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Every split of every token into two tokens, by the whole's rank: what tiktoken's ranks mean, spelled out for Hugging Face."""
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        splits = [(left, right) for i in range(1, len(token)) if (left := token[:i]) in ranks and (right := token[i:]) in ranks]
        if len(splits) > 1:
            splits.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        merges += splits
    return merges


def reachable_merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The last merge of each token, in order of rank: half of what `merges_of` gives, and the same ids in half the loading time.

    Encoding merges the pair of lowest rank first. Where a token comes out of a text, every merge within its bytes was the lowest of the
    text, and so of these bytes: they went as they go when the token is encoded alone, and the last merge is the same one.
    """
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        splits = [i for i in range(1, len(token)) if token[:i] in ranks and token[i:] in ranks]
        last = _last_merge(token, ranks) if len(splits) > 1 else splits[0] if splits else None
        if last is not None:
            merges.append((token[:last], token[last:]))
    return merges


def _last_merge(token: bytes, ranks: dict[bytes, int]) -> int | None:
    """Where the two parts meet that `token` is merged from at the end; None if merging never gets to two parts."""
    never = len(ranks)
    borders = list(range(len(token) + 1))
    pairs = [ranks.get(token[start : start + 2], never) for start in range(len(token) - 1)]
    while len(pairs) > 1:
        k = pairs.index(lowest := min(pairs))
        if lowest == never:
            return None
        del borders[k + 1], pairs[k]
        for i in (k - 1, k):
            if 0 <= i < len(pairs):
                pairs[i] = ranks.get(token[borders[i] : borders[i + 2]], never)
    return borders[1]
