"""Places of texts, so that alike ones are near: by their words, by what a member makes of them, by sentence encoders.

Nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from glue.errors import GlueError

if TYPE_CHECKING:
    from glue.kinds import Running

WIDTH = 64  # of places by words
SENTENCES = "sentence-transformers/all-MiniLM-L6-v2"


def by_words(texts: Sequence[str], *, seed: int, width: int = WIDTH) -> np.ndarray:
    """Words and pairs of words, rare ones counting more, squeezed into few numbers; rows of length 1. [n, h]"""
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

    counted = TfidfVectorizer(ngram_range=(1, 2), token_pattern=r"\S+", sublinear_tf=True).fit_transform(texts)
    width = min(width, min(counted.shape) - 1)
    found = TruncatedSVD(width, random_state=seed).fit_transform(counted) if width > 0 else counted.toarray()
    return _even(found)


def by_member(running: Running, texts: Sequence[str], *, batch_size: int = 64) -> np.ndarray:
    """The mean over a text's tokens of what a model's last layer makes of them; rows of length 1. [n, h]"""
    import torch

    ids = running.tokenizer(list(texts))["input_ids"]
    longest = getattr(running.model.config, "max_position_embeddings", None)
    found: list[np.ndarray] = [np.empty(0)] * len(texts)
    order = sorted(range(len(texts)), key=lambda k: len(ids[k]))

    @torch.inference_mode()
    def means(some: Sequence[int]) -> list[np.ndarray]:
        rows = [ids[k][:longest] or [0] for k in some]
        width = max(map(len, rows))
        tokens = torch.tensor([row + row[-1:] * (width - len(row)) for row in rows], device=running.model.device)
        mask = torch.tensor([[1.0] * len(row) + [0.0] * (width - len(row)) for row in rows], device=tokens.device)
        seen = running.model(input_ids=tokens, output_hidden_states=True, use_cache=False).hidden_states[-1]
        seen, mask = seen.float(), mask.to(seen.device)
        return list(((seen * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)).double().cpu().numpy())

    while order:
        most = running.room.of(batch_size)
        some, order = order[:most], order[most:]
        for k, mean in zip(some, running.room.read(some, means), strict=True):
            found[k] = mean
    return _even(np.stack(found) - np.mean(found, axis=0))  # all share a large mean, beside which they differ little


def by_sentences(texts: Sequence[str]) -> np.ndarray:
    """Places by a sentence encoder, the one of the paper, if it is installed and on this machine; [n, h]"""
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise GlueError("embed: sentences needs the package sentence-transformers",
                        fix="pip install sentence-transformers, or write  embed: words") from None
    try:
        encoder = SentenceTransformer(SENTENCES, device="cpu", local_files_only=True)
    except OSError:
        raise GlueError(f"the encoder {SENTENCES} is not on this machine",
                        fix=f"download it:  hf download {SENTENCES},  or write  embed: words") from None
    return _even(np.asarray(encoder.encode(list(texts))))


def _even(places: np.ndarray) -> np.ndarray:
    """Rows of length 1; one without any length stays where it is. Near is then a cosine near 1."""
    lengths = np.linalg.norm(places, axis=1, keepdims=True)
    return (places / np.where(lengths > 0, lengths, 1)).astype(np.float32)
