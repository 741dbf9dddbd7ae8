"""What a training run is told: `TrainConfig`, and the command-line arguments that fill it. No torch: the command line
imports this to print its help."""

import argparse
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from model.config import ModelConfig
from model.kinds import Kind, read_kind

Switches = dict[str, Any]
STREAMS = "millrace-streams"
"""The family whose layers may be of several kinds."""

FAMILIES: dict[str, Switches] = {
    "llama": {},
    "mistral": {},
    "qwen2": {"qkv_bias": True, "norm_eps": 1e-6},
    "qwen3": {"qk_norm": True, "norm_eps": 1e-6},
    "gpt2": {
        "norm": "layernorm",
        "position": "learned",
        "activation": "gelu_tanh",
        "gated_mlp": False,
        "qkv_bias": True,
        "out_bias": True,
        "mlp_bias": True,
    },
    "transformer": {
        "norm": "layernorm",
        "position": "sinusoidal",
        "activation": "relu",
        "gated_mlp": False,
        "qkv_bias": True,
        "out_bias": True,
        "mlp_bias": True,
        "post_norm": True,
        "scaled_embedding": True,
    },
    "t5": {
        "norm_eps": 1e-6,
        "position": "relative",
        "relative_buckets": 32,
        "relative_distance": 128,
        "activation": "gelu_tanh",
        "scaled_scores": False,
        "scaled_head": True,
    },
}
"""How each family's network differs from the plain one (`ModelConfig`'s defaults)."""
PAIRED = ("transformer", "t5")  # those that answer a source, and are taught with pairs

CLASSIFIERS: dict[str, Switches] = {
    "bert": {
        "role": "encoder",
        "norm": "layernorm",
        "norm_eps": 1e-12,
        "position": "learned",
        "activation": "gelu",
        "gated_mlp": False,
        "qkv_bias": True,
        "out_bias": True,
        "mlp_bias": True,
        "num_segments": 2,
        "pooling": "mean",
    },
}
"""The same of those that tell labels."""

DECODERS_ONLY = """num_kv_heads head_dim window untied short_context micro_tokens workers autocast compile""".split()  # noqa: SIM905


COUNTS = """hidden_size num_layers num_heads context batch_tokens steps eval_every eval_tokens report_every save_every
workers""".split()  # noqa: SIM905  # fields that are at least 1


class OptionError(ValueError):
    """Arguments that contradict each other, or data that can't be used: one line naming them."""


def option(default: Any, text: str, choices: tuple[str, ...] | None = None) -> Any:
    """A TrainConfig field with what its command-line argument needs."""
    return field(default=default, metadata={"help": text, "choices": choices})


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """One run: everything that decides its loss curve, and where it is kept. Raises OptionError for what can't be."""

    data: Path = field(
        metadata={
            "help": "a .txt or .txt.xz file, or a folder of them (valid* is for validation); for transformer and t5 "
            "pairs: a file with a tab in each line, or sources whose answers are in --target; to classify, a .csv or "
            ".tsv file with a column `label` and one other"
        }
    )
    out: Path = field(metadata={"help": "folder for the model; the run's own files go to its run/"})
    task: str = option("generate", "what to learn: to go on with texts, or to label them", ("generate", "classify"))
    target: str = option("", "file with the answer to each line of --data; .gz and .xz are unpacked")
    valid: str = option("", "pairs for validation, like --data; none: the last part of --data")
    valid_target: str = option("", "file with the answer to each line of --valid")
    family: str = option("llama", "architecture; of what labels it is bert", (*FAMILIES, *CLASSIFIERS))
    vocab_size: int = option(4096, "tokens of the byte-level BPE tokenizer, 257 to 65536")
    hidden_size: int = option(256, "width")
    num_layers: int = option(6, "depth")
    encoder_layers: int = option(0, "depth of the encoder of transformer and t5; 0 = as deep as the decoder")
    num_heads: int = option(4, "attention heads")
    num_kv_heads: int = option(0, "key and value heads; 0 = as many as heads")
    head_dim: int = option(0, "size of a head; 0 = width / heads")
    intermediate_size: int = option(0, "width of the MLP; 0 = 3 x width when gated, else 4 x")
    window: int = option(0, "sliding attention window in tokens (mistral only); 0 = none")
    attention: str = option(
        "", "kinds of the layers, repeated from the first on: full, window:SIZE:GLOBAL:RANDOM, recurrent-memory:"
        "SEGMENT:MEMORY, linear:FEATURES or lstm:WIDTH, joined by commas; empty = the family's own"
    )  # fmt: skip
    untied: bool = option(False, "give the head its own weights")
    context: int = option(1024, "longest sequence the model is trained for, in tokens")
    short_context: int = option(0, "sequence length of the first part of the run; 0 = context")
    short_fraction: float = option(0.8, "part of the steps done with --short-context")
    steps: int = option(2000, "optimiser steps; another number on resuming stretches or shortens the schedule")
    batch_tokens: int = option(8192, "tokens of one optimiser step")
    micro_tokens: int = option(0, "tokens computed at once, the rest is accumulated; 0 = all")
    optimizer: str = option("adamw", "for the layers' matrices; the rest is always AdamW's", ("adamw", "muon"))
    workers: int = option(1, "threads that each compute a part of the batch (CPU, without dropout)")
    lr: float = option(2e-3, "peak learning rate")
    warmup: int = option(100, "steps until the peak")
    schedule: str = option("cosine", "of the learning rate after the peak", ("cosine", "inverse-sqrt"))
    final_lr: float = option(0.1, "learning rate at the end, as a part of the peak")
    weight_decay: float = option(0.1, "on matrices only")
    clip: float = option(1.0, "largest norm of the gradient")
    dropout: float = option(0.0, "probability")
    label_smoothing: float = option(0.0, "part of each target that is spread over the vocabulary")
    seed: int = option(1, "of weights, data order and dropout")
    valid_fraction: float = option(0.01, "part held out when the data brings no valid* file")
    test_fraction: float = option(0.1, "to classify: part that is looked at once, at the end")
    masked_fraction: float = option(0.5, "to classify: part of the steps that fill in hidden words, before any label")
    eval_every: int = option(250, "steps between validations and samples")
    eval_tokens: int = option(32768, "validation tokens looked at on the way; the end looks at all")
    report_every: int = option(10, "steps between lines of progress")
    save_every: int = option(100, "steps between checkpoints")
    device: str = option("auto", "where to compute", ("auto", "cpu", "cuda"))
    autocast: str = option("auto", "bfloat16 products; auto: on CUDA only", ("auto", "on", "off"))
    compile: bool = option(False, "use torch.compile")
    dtype: str = option("bfloat16", "of the exported weights", ("float32", "bfloat16", "float16"))

    def __post_init__(self) -> None:
        for name in COUNTS:
            if getattr(self, name) < 1:
                raise OptionError(f"--{name.replace('_', '-')} {getattr(self, name)}: expected 1 or more")
        labels, plain = self.task == "classify", {item.name: item.default for item in fields(self)}
        idle = [name for name in DECODERS_ONLY if labels and getattr(self, name) != plain[name]]
        kv_heads, short = self.num_kv_heads or self.num_heads, self.short_context or self.context
        head_dim = self.head_dim or self.hidden_size // self.num_heads
        refusals: tuple[tuple[object, str], ...] = (
            (not 257 <= self.vocab_size <= 65536, f"--vocab-size {self.vocab_size}: expected 257 to 65536"),
            (self.num_heads % kv_heads, f"--num-kv-heads {kv_heads}: no divisor of --num-heads {self.num_heads}"),
            (self.family == "gpt2" and kv_heads != self.num_heads, f"--num-kv-heads {kv_heads}: gpt2 has all heads"),
            (self.is_paired and kv_heads != self.num_heads, f"--num-kv-heads {kv_heads}: {self.family} has all heads"),
            (
                not self.is_paired and (self.target or self.valid or self.encoder_layers),
                f"--family {self.family}: pairs and --encoder-layers are for {' and '.join(PAIRED)}",
            ),
            (bool(self.valid_target) and not self.valid, "--valid-target: expected --valid with it"),
            (not 0 <= self.label_smoothing < 1, f"--label-smoothing {self.label_smoothing}: expected 0 to below 1"),
            (head_dim % 2, f"--head-dim {head_dim}: expected an even number"),
            (self.attention and self.family != "llama", f"--attention: not in family {self.family}"),
            (self.window and self.family != "mistral", f"--window {self.window}: only mistral has one"),
            (self.context % short, f"--short-context {short}: no divisor of --context {self.context}"),
            (
                not self.is_paired and self.batch_tokens % self.context,
                f"--batch-tokens {self.batch_tokens}: no multiple of --context",
            ),
            (
                self.workers > 1 and self.dropout,
                f"--workers {self.workers}: not with --dropout, whose draws would vary",
            ),
        )
        refusals += (
            (labels != (self.family in CLASSIFIERS), f"--family {self.family}: not with --task {self.task}"),
            (idle, f"--{''.join(idle[:1]).replace('_', '-')}: not with --task {self.task}"),
            (not 0 <= self.masked_fraction < 1, f"--masked-fraction {self.masked_fraction}: expected 0 to below 1"),
        )
        for refused, message in refusals:
            if refused:
                raise OptionError(message)
        self.kinds()

    def kinds(self) -> tuple[Kind, ...]:
        """Each layer's kind, () if all are the family's own. Raises OptionError."""
        words = self.attention.split(",") if self.attention else []
        try:
            kinds = [read_kind(word.strip()) for word in words]
        except ValueError as error:
            raise OptionError(f"--attention {error}") from error
        return tuple(kinds[i % len(kinds)] for i in range(self.num_layers)) if kinds else ()

    @property
    def is_paired(self) -> bool:
        """Whether the data are pairs."""
        return self.family in PAIRED

    def network(self, vocab_size: int) -> ModelConfig:
        """The network asked for, over as many tokens as the tokenizer has."""
        switches = (FAMILIES | CLASSIFIERS)[self.family]
        inner = self.hidden_size * (3 if switches.get("gated_mlp", True) else 4)
        return ModelConfig(
            family=STREAMS if self.attention else self.family,
            vocab_size=vocab_size,
            hidden_size=self.hidden_size,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads or self.num_heads,
            head_dim=self.head_dim or self.hidden_size // self.num_heads,
            intermediate_size=self.intermediate_size or inner,
            max_position=self.context,
            tied_head=not self.untied,
            windows=(self.window,) * self.num_layers if self.window else (),
            attention=self.kinds(),
            bos_id=0,
            eos_ids=(0,),
            dtype=self.dtype,
            encoder_layers=(self.encoder_layers or self.num_layers) if self.is_paired else 0,
            start_id=0 if self.is_paired else None,
            **switches,
        )

    def length(self, step: int) -> int:
        """Tokens of each sequence of a step."""
        return self.short_context if self.short_context and step < self.short_fraction * self.steps else self.context


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Every field of TrainConfig as `--field-name`."""
    for item in fields(TrainConfig):
        name, kind = "--" + item.name.replace("_", "-"), type(item.default)
        if item.default is MISSING:
            parser.add_argument(name, type=Path, required=True, help=item.metadata["help"])
        elif kind is bool:
            parser.add_argument(name, action="store_true", help=item.metadata["help"])
        else:
            text = item.metadata["help"] + " (%(default)s)"
            choices = item.metadata["choices"]
            parser.add_argument(name, type=kind, default=item.default, choices=choices, help=text)


def from_arguments(namespace: argparse.Namespace) -> TrainConfig:
    """The parsed arguments as a TrainConfig. What labels is of another family than what goes on with texts."""
    given = {item.name: getattr(namespace, item.name) for item in fields(TrainConfig)}
    if given["task"] == "classify" and given["family"] == next(iter(FAMILIES)):
        given["family"] = next(iter(CLASSIFIERS))
    return TrainConfig(**given)
