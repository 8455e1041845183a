"""Members to serve, and servers in processes of their own, for tests."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import uvicorn
from fastapi import FastAPI
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from glue.member import Member
from glue.serve.server import listen

TEXTS = ["the snake is green", "a red fox and an owl", "what pet has Zoë ?", "sort : d b a c =", "one two three 🙂"]


def byte_pairs(size: int = 320, *, start: bool = True) -> PreTrainedTokenizerFast:
    """A tokenizer whose words are often several tokens, and rare characters several bytes."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    inner.train_from_iterator(TEXTS * 4, trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    if start:
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
                                   clean_up_tokenization_spaces=False)


def small_member(folder: Path, *, positions: int = 128, seed: int = 0, name: str = "small", ends: bool = True,
                 template: str | None = None) -> Member:
    """A two-layer Llama with random weights, large enough that no two tokens are as likely. ends: it may write </s>."""
    tokenizer = byte_pairs()
    tokenizer.chat_template = template
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=positions, initializer_range=0.3,
            bos_token_id=1, eos_token_id=2, pad_token_id=2))
        if not ends:
            model.generation_config.eos_token_id = None
            tokenizer.eos_token = None
    model.save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / name)
    return Member(name, "model", str(folder / name))


@contextmanager
def server(zoo: Path, member: str, *options: str, key: str = "") -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """`glue serve` in a process of its own -> where it listens, and the process. It is gone afterwards."""
    process = subprocess.Popen(
        [sys.executable, "-m", "glue.cli", "serve", member, "--zoo", str(zoo), "--port", "0", *options], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLUE_API_KEY": key, "HF_HUB_OFFLINE": "1"})
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("listening on http://127.0.0.1:"), line
        yield line.split()[-1], process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.wait(30)
        process.stdout.close()


@contextmanager
def server_here(app: FastAPI) -> Iterator[str]:
    """An application on a free port of this machine, in a thread of this process -> where it listens."""
    bound = listen("127.0.0.1", 0)
    one = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="on", timeout_graceful_shutdown=5))
    thread = threading.Thread(target=lambda: one.run([bound]))
    thread.start()
    try:
        while not one.started and thread.is_alive():
            time.sleep(0.01)
        yield "http://{}:{}".format(*bound.getsockname())
    finally:
        one.should_exit = True
        thread.join(30)
        bound.close()
