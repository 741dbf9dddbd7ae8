"""Small real engines for the tests: random weights, a byte tokenizer, everything else as in service."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers

from model.config import EngineConfig, ModelConfig
from model.engine.engine import Engine
from model.engine.runner import Runner
from model.families.registry import FAMILIES
from model.nn.decoder import Decoder
from model.tokenizer import Tokenizer

TINY = ModelConfig(
    family="llama",
    vocab_size=256,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=48,
    max_position=512,
)
MakeEngine = Callable[..., Engine]


def byte_library() -> Library:
    """256 ids, one for each byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    library = Library(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    return library


@pytest.fixture(scope="session")
def byte_tokenizer() -> Tokenizer:
    return Tokenizer(byte_library())


def save_folder(decoder: Decoder, folder: Path) -> Path:
    """The network with the byte tokenizer as a Hugging Face folder."""
    folder.mkdir(parents=True)
    family, parameters = FAMILIES[decoder.config.family], dict(decoder.named_parameters())
    tensors = {
        name: (part.t() if rule.transpose else part).contiguous()
        for rule in family.rules(decoder.config)
        for name, part in zip(rule.theirs, torch.split_with_sizes(parameters[rule.ours], rule.sizes), strict=True)
    }
    save_file(tensors, str(folder / "model.safetensors"))
    (folder / "config.json").write_text(json.dumps(family.write_config(decoder.config)))
    byte_library().save(str(folder / "tokenizer.json"))
    template = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return folder


def random_decoder(config: ModelConfig, seed: int = 0) -> Decoder:
    """Weights wide enough that the logits are far from uniform."""
    torch.manual_seed(seed)
    decoder = Decoder(config).eval().requires_grad_(False)
    for parameter in decoder.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=0.3)
    return decoder


@pytest.fixture
def make_engine(byte_tokenizer: Tokenizer) -> MakeEngine:
    """An engine over TINY with the plain runner; keyword arguments change its EngineConfig."""

    def make(decoder: Decoder | None = None, **changes: int) -> Engine:
        config = EngineConfig(**{"max_model_len": 512, "num_blocks": 256, **changes})  # type: ignore[arg-type]
        decoder = decoder or random_decoder(TINY)
        return Engine(decoder, byte_tokenizer, config, Runner(decoder, config))

    return make
