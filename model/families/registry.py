"""The families there are, and reading what a model folder says about itself. No torch: an API process imports this."""

import difflib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from model.config import CheckpointError, GenerationDefaults, ModelConfig, Pooling
from model.families.base import Family
from model.families.bert import BERT
from model.families.fields import Fields, read_json
from model.families.gpt2 import GPT2
from model.families.llama import LLAMA
from model.families.mistral import MISTRAL
from model.families.qwen2 import QWEN2
from model.families.qwen3 import QWEN3
from model.families.streams import STREAMS
from model.families.t5 import T5
from model.families.transformer import TRANSFORMER

POOLINGS: Mapping[str, Pooling] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "last",
}
FAMILIES: Mapping[str, Family] = {
    family.name: family for family in (GPT2, LLAMA, MISTRAL, QWEN2, QWEN3, T5, TRANSFORMER, BERT, STREAMS)
}


def read_config(folder: Path) -> ModelConfig:
    """What the checkpoint in a folder is; `eos_ids` are those of config.json and then of generation_config.json.

    Raises CheckpointError in one line.
    """
    _check_folder(folder)
    path = folder / "config.json"
    raw = read_json(path)
    family = Fields(raw, str(path)).word("model_type", FAMILIES)
    config = family.read_config(raw, str(path))
    also = _generation_fields(folder).ids("eos_token_id", config.vocab_size)
    eos_ids = tuple(dict.fromkeys(config.eos_ids + also))
    return replace(config, eos_ids=eos_ids, pooling=_read_pooling(folder) or config.pooling)


def read_generation_defaults(folder: Path) -> GenerationDefaults:
    """The sampling settings of a folder's generation_config.json, neutral where it or the file is silent.

    `do_sample` is not read: files that only list token ids say (or mean) false, and making every such checkpoint greedy
    is not what a person who asks for text expects. Raises CheckpointError.
    """
    found, neutral = _generation_fields(folder), GenerationDefaults()
    return GenerationDefaults(
        temperature=found.number("temperature", neutral.temperature, least=0),
        top_k=found.integer("top_k", neutral.top_k, least=0),
        top_p=found.number("top_p", neutral.top_p, most=1),
        min_p=found.number("min_p", neutral.min_p, least=0, most=1),
        repetition_penalty=found.number("repetition_penalty", neutral.repetition_penalty),
    )


def _read_pooling(folder: Path) -> Pooling | None:
    """What sentence-transformers wrote down beside the network; None where it did not. Raises CheckpointError."""
    path = folder / "1_Pooling" / "config.json"
    if not path.exists():
        return None
    found = Fields(read_json(path), str(path))
    known = [pooling for key, pooling in POOLINGS.items() if found.flag(key)]
    if len(known) != 1:
        raise CheckpointError(f"{path}: found {len(known)} of {', '.join(POOLINGS)} true, expected one")
    return known[0]


def _generation_fields(folder: Path) -> Fields:
    path = folder / "generation_config.json"
    return Fields(read_json(path) if path.exists() else {}, str(path))


def _check_folder(folder: Path) -> None:
    if folder.is_dir():
        return
    if folder.exists():
        raise CheckpointError(f"{folder}: found a file, expected a model folder with config.json and model.safetensors")
    siblings = [path.name for path in folder.parent.iterdir() if path.is_dir()] if folder.parent.is_dir() else []
    near = difflib.get_close_matches(folder.name, siblings, n=1)
    hint = f"; did you mean {folder.parent / near[0]}?" if near else ""
    raise CheckpointError(f"{folder}: no such model folder{hint}")
