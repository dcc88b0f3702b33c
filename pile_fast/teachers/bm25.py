"""BM25, a teacher without a network."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np


class BM25:
    """Lexical scores of documents for a query (bm25s, its "lucene" variant), with a collection's statistics.

    Words are runs of two or more letters or digits, lower-cased; no stop words and no stemming, whatever the language.

    Args:
        documents: the collection; equal documents count once. Their distinct texts are kept in memory.
        k1: how slowly repeated words saturate, >= 0.
        b: how far long documents are discounted, 0 to 1.

    Raises:
        ImportError: bm25s is not installed.

    >>> bm25 = BM25(["a black cat", "two dogs", "a cat and a dog"])
    >>> [round(float(score), 3) for score in bm25.score("cat", ["a black cat", "two dogs"])]
    [0.201, 0.0]
    """

    def __init__(self, documents: Iterable[str], *, k1: float = 1.5, b: float = 0.75):
        import bm25s

        self._number = {document: i for i, document in enumerate(dict.fromkeys(documents))}
        tokens = bm25s.tokenize(list(self._number), stopwords=None, show_progress=False)
        self._index = None  # bm25s takes no collection without a word
        if tokens.vocab:
            self._index = bm25s.BM25(k1=k1, b=b)
            self._index.index(tokens, show_progress=False)

    def score(self, query: str, documents: Sequence[str]) -> np.ndarray:
        """(n,) float32, >= 0; 0 = no word in common.

        Raises:
            KeyError: a document is not in the collection.
        """
        import bm25s

        places = [self._number[document] for document in documents]
        words = bm25s.tokenize(query, stopwords=None, show_progress=False, return_ids=False)[0]
        if self._index is None or not words:
            return np.zeros(len(places), np.float32)
        return self._index.get_scores(words)[places]
