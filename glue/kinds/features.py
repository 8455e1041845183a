"""What a router by text sees of a text: counts of its words, pairs of words and triples of bytes, hashed to numbers.

Nothing is learnt and nothing is looked up, so the definition is this file and two numbers, which a mixture by text
keeps. No tokenizer is asked: the text of one question is the same to experts that read it in different tokens.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

BITS = 11
DEFINITION = {"version": 1, "width": 1 << BITS}  # a file that says otherwise was made for other features
SPREAD = np.uint32(2654435761)  # 2**32 over the golden ratio: neighbouring codes land far from each other


def text_features(texts: Sequence[str], definition: Mapping[str, int] = DEFINITION) -> Tensor:
    """The features of each text, a row of length 1: square roots of the shares of its hashed parts. [m] -> [m, h] fp32

    A text without any byte gets zeros. The numbers are the same bits on every machine. Raises ValueError for a
    definition that is not the one of this file.
    """
    if dict(definition) != DEFINITION:
        raise ValueError(f"features {dict(definition)} are asked for, known are {DEFINITION}")
    rows = np.zeros((len(texts), DEFINITION["width"]), dtype=np.float32)
    for row, text in zip(rows, texts, strict=True):
        if text:
            counts = np.bincount(_parts(text), minlength=len(row))
            row[:] = np.sqrt(counts / counts.sum())
    return torch.from_numpy(rows)


def _parts(text: str) -> np.ndarray:
    """The number of each part of a text: its words, its pairs of words with both ends marked, its triples of bytes."""
    data = text.encode(errors="surrogatepass")
    words = data.split()
    named = [*words, *(b"%b %b" % pair for pair in pairwise([b"", *words, b""]))]
    hashed = np.array([zlib.crc32(word) for word in named], dtype=np.uint32)
    wide = np.frombuffer(b" %b " % data, dtype=np.uint8).astype(np.uint32)
    triples = (wide[:-2] << 16 | wide[1:-1] << 8 | wide[2:]) * SPREAD
    return np.concatenate([hashed, triples]) >> np.uint32(32 - BITS)
