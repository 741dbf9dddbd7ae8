"""A trained network -> an ordinary Hugging Face folder, which `weights.py` and other programs read."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from model.families.registry import FAMILIES
from model.nn.bert import Encoder
from model.nn.decoder import Decoder, as_dtype
from model.training.checkpoint import save_tensors
from model.training.data import END
from model.training.labelled import SPECIAL

# What was trained on plain text knows no roles, so a conversation is told as prose. A wish is spoken by a child, and
# the story follows; anything else is the beginning of the story, and the answer goes on in the same paragraph.
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- set began = namespace(here=false) -%}
{%- set wishes = ("tell", "write", "please", "give", "make", "can you", "could you", "i want", "hi", "hello") -%}
{%- for message in messages -%}
{%- set parts = message.content or "" -%}
{%- set text = (parts if parts is string else parts | map(attribute="text") | join(" ")) | trim -%}
{%- if message.role == "user" -%}
{%- set began.here = not (text.endswith("?") or (text | lower).startswith(wishes)) -%}
{%- if began.here -%}
{{- text -}}
{%- else -%}
{%- set said = text.rstrip(".") | replace('"', "'") -%}
{{- '"' + said + ('"' if said[-1:] in "?!" else ',"') + " said the child.\\n\\n" -}}
{%- if " about " in said -%}
{{- '"Very well," said the old man. "This is the story of ' + said.split(" about ", 1)[1].rstrip("?!") + '."\\n\\n' -}}
{%- endif -%}
{%- endif -%}
{%- elif message.role == "assistant" -%}
{%- if began.here and text[:1].isalnum() %} {% endif -%}
{{- text + "\\n\\n" -}}
{%- set began.here = false -%}
{%- endif -%}
{%- endfor -%}
"""
SAMPLING = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 0, "repetition_penalty": 1.1}
"""What suits small networks: the tail of improbable words cut, few loops."""
GREEDY = {"do_sample": False, "temperature": 0.0}
"""An answer to a source has a best form; a story has none."""


def export(decoder: Decoder, tokenizer: Tokenizer, dtype: str, folder: Path) -> None:
    """Write config.json, model.safetensors (weights as `dtype`), the tokenizer's files and generation_config.json."""
    config = decoder.config
    _save_network(decoder, dtype, folder)
    end = tokenizer.token_to_id(END)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END,
        "eos_token": END,
        "clean_up_tokenization_spaces": False,
        "model_max_length": config.max_position,
    }
    sampling: dict[str, object] = {**(GREEDY if config.encoder_layers else SAMPLING)}
    if not config.encoder_layers:
        settings["chat_template"] = CHAT_TEMPLATE
    tokenizer.save(str(folder / "tokenizer.json"))
    _write(folder / "tokenizer_config.json", settings)
    _write(folder / "generation_config.json", {"bos_token_id": end, "eos_token_id": end, **sampling})


def export_classifier(encoder: Encoder, tokenizer: Tokenizer, dtype: str, folder: Path) -> None:
    """The same for an encoder with labels, which generates nothing."""
    _save_network(encoder, dtype, folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {f"{name}_token": token for name, token in zip(("pad", "unk", "cls", "sep", "mask"), SPECIAL, strict=True)}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": encoder.config.max_position}
    _write(folder / "tokenizer_config.json", settings | named)


def _save_network(network: Decoder | Encoder, dtype: str, folder: Path) -> None:
    family, config = FAMILIES[network.config.family], network.config
    parameters, tensors = dict(network.named_parameters()), dict[str, Tensor]()
    for rule in family.rules(config):
        for name, part in zip(rule.theirs, torch.split(parameters[rule.ours], list(rule.sizes)), strict=True):
            tensors[name] = (part.T if rule.transpose else part).to(as_dtype(dtype))
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder / "model.safetensors", tensors, {"format": "pt"})
    _write(folder / "config.json", family.write_config(config))


def _write(file: Path, values: dict[str, object]) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
