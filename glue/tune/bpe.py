"""A byte-level BPE tokenizer, trained on texts and saved as Hugging Face tokenizers are."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

SPECIAL = ["<unk>", "<s>", "</s>"]
# Words keep the blank before them; digits stand alone, so that a number is spelled and not looked up.
WORDS = r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]|\s+"


def train_tokenizer(texts: Iterable[str], folder: Path, *, vocab_size: int = 1536) -> None:
    """Train on `texts` and write the tokenizer's files into `folder`. Every text begins with <s>; any byte has a token.

    vocab_size  the most tokens it may have; it has fewer where every word is one token before that
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token=SPECIAL[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
                            pad_token="</s>", clean_up_tokenization_spaces=False).save_pretrained(folder)
