"""What a family file says, and how it is used: config.json <-> `ModelConfig`, tensor names <-> parameter names.

Tables, not code: a family is one `Family` value. No torch and no files here; `weights.py` reads the tensors and
`registry.py` the folder. Facts about the published formats are those of transformers 5.23's config classes.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from model.config import CheckpointError, ModelConfig, Rope, RopeScaling
from model.families.fields import Fields, shown
from model.kinds import Full, Kind, Lstm, RecurrentMemory, read_kind

ACTIVATIONS: Mapping[str, Any] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
DTYPES: Mapping[str, str] = {name: name for name in ("float32", "bfloat16", "float16")}
ROPE_KINDS: Mapping[str, Literal["linear", "llama3"] | None] = {"default": None, "linear": "linear", "llama3": "llama3"}
# Beyond any checkpoint, and small enough that a mistyped config ends in a message, not in a full memory.
LARGEST_SIZE = 2**24
LIMITS: Mapping[str, int] = {"num_layers": 10_000}
IS_SLIDING: Mapping[str, bool] = {"full_attention": False, "sliding_attention": True}


@dataclass(frozen=True, slots=True)
class Rule:
    """Parameter `ours` is the checkpoint's tensors `theirs`, `sizes` rows each, one after another along dimension 0.
    With `transpose` the checkpoint stores each of them [in, out], ours being [out, in]. Works in both directions."""

    ours: str
    theirs: tuple[str, ...]
    sizes: tuple[int, ...]
    transpose: bool = False
    width: int | None = None  # numbers in a row; None for a vector

    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes that the checkpoint's tensors must have."""
        if self.width is None:
            return tuple((rows,) for rows in self.sizes)
        return tuple((self.width, rows) if self.transpose else (rows, self.width) for rows in self.sizes)


@dataclass(frozen=True, slots=True)
class Family:
    """One family's words. In `names`, `*` stands for a layer's number; a bias has its weight's names."""

    name: str  # config.json's model_type
    architecture: str
    prefix: str  # of every tensor but the head's; some folders leave it out
    keys: Mapping[str, str]  # ModelConfig field -> config.json key
    names: Mapping[str, tuple[str, ...]]  # our module -> the checkpoint's modules
    derived: tuple[str, ...]  # patterns of buffers, less the prefix, that old folders hold and nobody needs
    traits: Mapping[str, Any] = field(default_factory=dict)  # ModelConfig fields alike in the whole family
    defaults: Mapping[str, object] = field(default_factory=dict)  # what an absent key of config.json means
    switches: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # true-or-false key -> fields it sets
    only: Mapping[str, object] = field(default_factory=dict)  # keys of which one value is supported
    sliding: Literal["never", "all", "some"] = "never"  # which layers may have a window
    activations: Mapping[str, Any] = field(default_factory=lambda: ACTIVATIONS)
    plain: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # `names` where the MLP is not gated
    mixed: bool = False  # a key `attention` has a word for the kind of each layer
    transposed: frozenset[str] = frozenset()  # our modules whose weights the checkpoint stores [in, out]
    classifier: str = ""  # the architecture of those that have labels
    aliases: Mapping[str, str] = field(default_factory=dict)  # older endings of tensor names -> today's

    def read_config(self, raw: Mapping[str, object], source: str = "config.json") -> ModelConfig:
        """The meaning of a parsed config.json; unknown keys are ignored. Raises CheckpointError."""
        found = Fields({**self.defaults, **raw}, source)
        for key, value in {"quantization_config": None, **self.only}.items():
            if found.has(key) and found.raw[key] != value:
                found.fail(key, f"{shown(value)} (nothing else is supported)")
        values = dict(self.traits)
        for key, targets in self.switches.items():
            values.update(dict.fromkeys(targets, found.flag(key)))
        values |= self._sizes(found)
        if values.get("position", "rope") == "rope":
            values["rope"] = _read_rope(found, values["max_position"])
            if values["head_dim"] % 2:
                found.fail("head_dim", "an even number, which rotary positions need")
        return ModelConfig(
            family=self.name,
            norm_eps=found.number(self.keys["norm_eps"]),
            activation=found.word(self.keys["activation"], self.activations),
            tied_head=found.flag("tie_word_embeddings"),
            windows=_read_windows(found, self.sliding, values["num_layers"]),
            attention=_read_kinds(found, values["num_layers"]) if self.mixed else (),
            bos_id=next(iter(found.ids("bos_token_id", values["vocab_size"])), None),
            eos_ids=found.ids("eos_token_id", values["vocab_size"]),
            start_id=self._start(found, values["vocab_size"]),
            dtype=next((found.word(key, DTYPES) for key in ("dtype", "torch_dtype") if found.has(key)), "float32"),
            labels=_read_labels(found) if self._classifies(found) else (),
            **values,
        )

    def write_config(self, config: ModelConfig) -> dict[str, object]:
        """The config.json of a network of this family. Raises ValueError when the family has no words for it."""
        raw: dict[str, object] = {"model_type": self.name, "architectures": [self.architecture]}
        raw |= {key: getattr(config, name) for name, key in self.keys.items()}
        raw |= {key: getattr(config, targets[0]) for key, targets in self.switches.items()}
        raw[self.keys["activation"]] = next(k for k, v in self.activations.items() if v == config.activation)
        raw |= {"tie_word_embeddings": config.tied_head, "dtype": config.dtype, "bos_token_id": config.bos_id}
        raw["eos_token_id"] = list(config.eos_ids) or None
        if config.encoder_layers:
            raw |= {"is_encoder_decoder": True, "decoder_start_token_id": config.start_id}
        if config.position == "rope":
            raw["rope_parameters"] = _write_rope(config.rope)
        raw |= _write_windows(config, self.sliding)
        if self.mixed:
            raw["attention"] = [kind.word for kind in config.attention]
        if config.labels:
            raw["architectures"] = [self.classifier]
            raw["id2label"] = {str(i): label for i, label in enumerate(config.labels)}
            raw["label2id"] = {label: i for i, label in enumerate(config.labels)}
        back = self.read_config(raw)
        lost = [f.name for f in fields(config) if getattr(back, f.name) != getattr(config, f.name)]
        if lost:
            found = ", ".join(f"{name}={getattr(config, name)!r}" for name in lost)
            raise ValueError(f"a {self.name} checkpoint can't express {found}")
        return raw

    def rules(self, config: ModelConfig) -> tuple[Rule, ...]:
        """One rule for each parameter of the decoder that `config` describes."""
        return tuple(self._rules(config))

    def _classifies(self, found: Fields) -> bool:
        architectures = found.raw.get("architectures")
        return bool(self.classifier) and isinstance(architectures, list) and self.classifier in architectures

    def _sizes(self, found: Fields) -> dict[str, Any]:
        keys = self.keys

        def size(name: str, default: int | None = None) -> int:
            return found.integer(keys[name], default, most=LIMITS.get(name, LARGEST_SIZE))

        hidden, heads = size("hidden_size"), size("num_heads")
        sizes = {name: size(name) for name in ("vocab_size", "num_layers", "max_position")}
        extras = ("encoder_layers", "relative_buckets", "relative_distance", "num_segments")
        sizes |= {name: size(name) for name in extras if name in keys}
        # A plain MLP is four times as wide as the network unless said; a gated one has no such custom.
        inner = None if self.traits.get("gated_mlp", True) else 4 * hidden
        sizes["intermediate_size"] = size("intermediate_size", inner)
        sizes["num_kv_heads"] = kv_heads = size("num_kv_heads", heads) if "num_kv_heads" in keys else heads
        if heads % kv_heads:
            found.fail(keys["num_kv_heads"], f"a divisor of {keys['num_heads']}, {heads}")
        if "head_dim" in keys and found.has(keys["head_dim"]):
            sizes["head_dim"] = size("head_dim")
        elif hidden % heads:
            found.fail(keys["hidden_size"], f"a multiple of {keys['num_heads']}, {heads}")
        else:
            sizes["head_dim"] = hidden // heads
        return {**sizes, "hidden_size": hidden, "num_heads": heads}

    def _start(self, found: Fields, vocab_size: int) -> int | None:
        """The id that a decoder beside an encoder begins with; a decoder alone begins with its prompt."""
        if "encoder_layers" not in self.keys:
            return None
        ids = found.ids("decoder_start_token_id", vocab_size)
        if len(ids) != 1:
            found.fail("decoder_start_token_id", f"one token id below {vocab_size}")
        return ids[0]

    def _rules(self, config: ModelConfig) -> Iterator[Rule]:
        names = self.names if config.gated_mlp else {**self.names, **self.plain}
        modules = _modules(config) if config.role == "decoder" else _encoder_modules(config)
        for ours, sizes, width, bias in modules:
            layer = next((part for part in ours.split(".") if part.isdecimal()), "")
            pattern = ours.replace(f".{layer}.", ".*.", 1) if layer else ours
            theirs = tuple(name.replace("*", layer) for name in names[pattern])
            sizes = sizes if len(theirs) == len(sizes) else (sum(sizes),)
            transpose = pattern in self.transposed
            yield Rule(f"{ours}.weight", tuple(f"{name}.weight" for name in theirs), sizes, transpose, width)
            if bias:
                yield Rule(f"{ours}.bias", tuple(f"{name}.bias" for name in theirs), sizes)


def _modules(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...], int | None, bool]]:
    """The network's modules with parameters: name, rows of the parts it is made of, their width, is there a bias."""
    hidden, bias = config.hidden_size, config.norm == "layernorm"
    yield "embed", (config.vocab_size,), hidden, False
    if config.position == "learned":
        yield "positions", (config.max_position,), hidden, False
    for side, num_layers in (("encoder.", config.encoder_layers), ("", config.num_layers)):
        if num_layers and config.position == "relative":
            yield f"{side}relative", (config.relative_buckets,), config.num_heads, False
        for i in range(num_layers):
            kind = Full() if side else config.kind(i)
            yield from _layer(config, f"{side}layers.{i}", kind, reads=bool(config.encoder_layers) and not side)
        if num_layers and not config.post_norm:
            yield f"{side}norm", (hidden,), None, bias
    if not config.tied_head:
        yield "head", (config.vocab_size,), hidden, False


def _layer(
    config: ModelConfig, name: str, kind: Kind, reads: bool
) -> Iterator[tuple[str, tuple[int, ...], int | None, bool]]:
    """The modules of one layer; `reads`: it attends to what an encoder made."""
    hidden, inner, bias = config.hidden_size, config.intermediate_size, config.norm == "layernorm"
    heads, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    yield f"{name}.attn_norm", (hidden,), None, bias
    if isinstance(kind, Lstm):
        yield f"{name}.attn.input", (4 * kind.width,), hidden, True
        yield f"{name}.attn.recurrent", (4 * kind.width,), kind.width, False
    else:
        yield f"{name}.attn.qkv", (heads, kv, kv), hidden, config.qkv_bias
    if config.qk_norm:
        yield f"{name}.attn.q_norm", (config.head_dim,), None, False
        yield f"{name}.attn.k_norm", (config.head_dim,), None, False
    if isinstance(kind, RecurrentMemory):
        yield f"{name}.attn.relative", (kv,), hidden, False
        yield f"{name}.attn.shift", (2,), heads, False
    yield f"{name}.attn.out", (hidden,), kind.width if isinstance(kind, Lstm) else heads, config.out_bias
    if reads:
        yield f"{name}.cross_norm", (hidden,), None, bias
        yield f"{name}.cross.q", (heads,), hidden, config.qkv_bias
        yield f"{name}.cross.kv", (kv, kv), hidden, config.qkv_bias
        yield f"{name}.cross.out", (hidden,), heads, config.out_bias
    yield f"{name}.mlp_norm", (hidden,), None, bias
    yield f"{name}.mlp.up", (inner,) * (2 if config.gated_mlp else 1), hidden, config.mlp_bias
    yield f"{name}.mlp.down", (hidden,), inner, config.mlp_bias


def _encoder_modules(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...], int | None, bool]]:
    """The same of an encoder; what turns the first row into labels is there where there are labels."""
    hidden, inner = config.hidden_size, config.intermediate_size
    yield "embed", (config.vocab_size,), hidden, False
    yield "positions", (config.max_position,), hidden, False
    yield "segments", (config.num_segments,), hidden, False
    yield "embed_norm", (hidden,), None, True
    for i in range(config.num_layers):
        yield f"layers.{i}.attn.qkv", (hidden,) * 3, hidden, config.qkv_bias
        yield f"layers.{i}.attn.out", (hidden,), hidden, config.out_bias
        yield f"layers.{i}.attn_norm", (hidden,), None, True
        yield f"layers.{i}.mlp.up", (inner,), hidden, config.mlp_bias
        yield f"layers.{i}.mlp.down", (hidden,), inner, config.mlp_bias
        yield f"layers.{i}.mlp_norm", (hidden,), None, True
    if config.labels:
        yield "pooler", (hidden,), hidden, True
        yield "classifier", (len(config.labels),), hidden, True


def _read_kinds(found: Fields, num_layers: int) -> tuple[Kind, ...]:
    """Each layer's kind."""
    words = found.raw.get("attention")
    if not isinstance(words, list) or len(words) != num_layers:
        found.fail("attention", f"a list with a word for each of {num_layers} layers")
    try:
        return tuple(read_kind(str(word)) for word in words)
    except ValueError as error:
        raise CheckpointError(f"{found.source}: attention: {error}") from error


def _read_labels(found: Fields) -> tuple[str, ...]:
    """The labels in the order of their numbers; unnamed ones are two, as transformers has it."""
    named = found.section("id2label")
    if named is None:
        return tuple(f"LABEL_{i}" for i in range(found.integer("num_labels", 2)))
    labels = [named.raw.get(str(i)) for i in range(len(named.raw))]
    if len(labels) < 2 or not all(isinstance(label, str) for label in labels) or len(set(labels)) < len(labels):
        found.fail("id2label", "two or more different labels by number, from 0 on")
    return tuple(str(label) for label in labels)


def _read_rope(found: Fields, max_position: int) -> Rope:
    """Rotary settings in today's spelling (`rope_parameters`) or the older one (`rope_theta`, `rope_scaling`)."""
    today = found.section("rope_parameters") or Fields({}, found.source)
    block = found.section("rope_scaling") or today  # both at once: the older one counts, as in transformers
    for key, value in block.raw.items():
        if isinstance(value, dict):
            block.fail(key, "one setting for all layers")
    for each in (found, block):
        if each.number("partial_rotary_factor", 1.0) != 1.0:
            each.fail("partial_rotary_factor", "1.0 (nothing else is supported)")
    theta = next(
        (each.number("rope_theta", least=1) for each in (block, today, found) if each.has("rope_theta")), 10_000.0
    )
    named = next((key for key in ("rope_type", "type") if block.has(key)), None)
    kind = block.word(named, ROPE_KINDS) if named else None
    if kind is None:
        return Rope(theta)
    if kind == "linear":
        return Rope(theta, RopeScaling(kind, block.number("factor", least=1)))
    low = block.number("low_freq_factor")
    if block.number("high_freq_factor") <= low:
        block.fail("high_freq_factor", f"more than low_freq_factor, {low}")
    original = block.integer("original_max_position_embeddings", max_position)
    return Rope(
        theta, RopeScaling(kind, block.number("factor", least=1), low, block.number("high_freq_factor"), original)
    )


def _write_rope(rope: Rope) -> dict[str, object]:
    written: dict[str, object] = {"rope_theta": rope.theta, "rope_type": "default"}
    if rope.scaling is not None:
        written |= {"rope_type": rope.scaling.kind, "factor": rope.scaling.factor}
    if rope.scaling is not None and rope.scaling.kind == "llama3":
        written["low_freq_factor"] = rope.scaling.low_freq_factor
        written["high_freq_factor"] = rope.scaling.high_freq_factor
        written["original_max_position_embeddings"] = rope.scaling.original_max_position
    return written


def _read_windows(found: Fields, sliding: str, num_layers: int) -> tuple[int | None, ...]:
    """Each layer's window, () when no layer has one."""
    if sliding == "never" or (sliding == "some" and not found.flag("use_sliding_window")):
        size = None
    else:
        size = found.integer("sliding_window") if found.has("sliding_window") else None
    if sliding == "some" and found.has("layer_types"):
        kinds = found.words("layer_types", IS_SLIDING)
        if len(kinds) != num_layers:
            found.fail("layer_types", f"one item for each of {num_layers} layers")
        if any(kinds) and size is None:
            found.fail("sliding_window", "a whole number with use_sliding_window true, as layer_types asks for windows")
    else:
        first = found.integer("max_window_layers", least=0) if sliding == "some" else 0
        kinds = tuple(i >= first for i in range(num_layers))
    windows = tuple(size if kind else None for kind in kinds)
    return windows if any(windows) else ()


def _write_windows(config: ModelConfig, sliding: str) -> dict[str, object]:
    size = next((window for window in config.windows if window), None)
    if sliding == "all":
        return {"sliding_window": size}
    if sliding == "never":
        return {}
    names = {value: key for key, value in IS_SLIDING.items()}
    kinds = [names[config.window(i) is not None] for i in range(config.num_layers)]
    return {"use_sliding_window": size is not None, "sliding_window": size, "layer_types": kinds}
