"""Tiny models made on the spot: two-layer Llamas with random weights and a tokenizer of 37 words."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from glue.member import Member

# a slow machine is no failure, and a run that fails can be repeated
settings.register_profile("house", deadline=None, derandomize=True)
settings.load_profile("house")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what needs an accelerator where there is none; pytest counts it as deselected."""
    left = [] if torch.cuda.is_available() else [item for item in items if item.get_closest_marker("gpu")]
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if item not in left]


WORDS = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"w{k}": k for k in range(3, 40)}}


@pytest.fixture
def one_thread():
    """Torch on one thread, as in a worker: what is trained has the same bits then."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tiny(tmp_path) -> Callable[..., Member]:
    """tiny("name", seed=1, hidden_size=24, ...) writes a model folder and returns its member."""
    def make(name: str, *, seed: int = 0, words: dict[str, int] = WORDS, dtype: torch.dtype = torch.float32,
             spread: float = 0.3, **shape) -> Member:
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(**{"vocab_size": len(words), "hidden_size": 32, "intermediate_size": 48,
                                "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
                                "max_position_embeddings": 64, "initializer_range": spread, **shape})
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = LlamaForCausalLM(config).to(dtype)
        folder = tmp_path / name
        model.save_pretrained(folder)
        word_tokenizer(words).save_pretrained(folder)
        return Member(name, "model", str(folder))

    return make


def word_tokenizer(words: dict[str, int]):
    """One token a word, <s> in front, nothing to pad with."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.fixture
def asked_zoo(tmp_path, tiny) -> Path:
    """A zoo of two tiny models, m and n, and a suite `own` of 40 questions."""
    lines = [{"question": f"w{3 + k % 37} w{3 + k // 7} w5 w9", "choices": [f"w{8 + k % 11}", f"w{20 + k % 9}", "w7"],
              "gold": k % 3, "answer": "w7"} for k in range(40)]
    lines = [{**line, "answer": line["choices"][line["gold"]]} for line in lines]
    (tmp_path / "data").mkdir()
    for split in ("dev", "test"):
        (tmp_path / f"data/{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "zoo.yaml").write_text(f"members:\n  m: {{path: {tiny('m').path}}}\n  n: {{path: "
                                       f"{tiny('n', seed=1).path}}}\n  asked: {{path: data, kind: dataset}}\n")
    (tmp_path / "benchmarks/suites").mkdir(parents=True)
    (tmp_path / "benchmarks/suites/own.yaml").write_text(
        "tasks:\n  t: {data: asked, output: choice, metric: acc, chance: 0.33}\n")
    return tmp_path


@pytest.fixture
def model_folder(tmp_path) -> Callable[..., Path]:
    """model_folder("name", seed=1) writes one tensor and a configuration: enough to have an identity."""
    def make(name: str, *, seed: int = 0, config: str = '{"model_type": "llama"}') -> Path:
        from glue.checkpoint import Header
        from glue.writer import Writer

        folder = tmp_path / name
        folder.mkdir(parents=True)
        with Writer(folder, {"w": Header(torch.float32, (4,))}) as writer:
            writer.write("w", torch.arange(4.0) + seed)
        (folder / "config.json").write_text(config)
        return folder

    return make


LAYER = {"self_attn.q_proj": (32, 32), "self_attn.k_proj": (32, 32), "self_attn.v_proj": (32, 32),
         "self_attn.o_proj": (32, 32), "mlp.up_proj": (48, 32), "mlp.gate_proj": (48, 32), "mlp.down_proj": (32, 48),
         "input_layernorm": (32,), "post_attention_layernorm": (32,)}
PLAIN = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32, "intermediate_size": 48,
         "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 64, "torch_dtype": "bfloat16",
         "tie_word_embeddings": False}


@pytest.fixture(scope="session")
def plain_model() -> Callable[..., Path]:
    """plain_model(folder, seed, base) writes a three-layer Llama in bf16, near another one where that is given."""
    def make(folder: Path, seed: int, base: Path | None = None) -> Path:
        from glue.checkpoint import Checkpoint, Header
        from glue.writer import Writer

        shapes = {"model.embed_tokens.weight": (64, 32), "model.norm.weight": (32,), "lm_head.weight": (64, 32),
                  **{f"model.layers.{k}.{word}.weight": shape for k in range(3) for word, shape in LAYER.items()}}
        folder.mkdir(parents=True)
        random = torch.Generator().manual_seed(seed)
        below = Checkpoint(base) if base else None
        with Writer(folder, {name: Header(torch.bfloat16, shape) for name, shape in shapes.items()}) as writer:
            for name, shape in shapes.items():
                numbers = (0.01 if below else 0.1) * torch.randn(shape, generator=random)
                writer.write(name, (numbers + below[name].float() if below else numbers).bfloat16())
        (folder / "config.json").write_text(json.dumps(PLAIN))
        return folder

    return make
