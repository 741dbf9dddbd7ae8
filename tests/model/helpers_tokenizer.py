"""Tiny tokenizers of the kinds that are in use, made on the spot."""

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

from model.tokenizer import Tokenizer

TEXT = [
    "Once upon a time there was a small river.",
    "“Ça va?” — naïve 河 川 😀 été, she said.",
    "the then than that",
] * 3
CONTROL = ["<s>", "</s>", "<|user|>"]


def byte_level_backend() -> tokenizers.Tokenizer:
    """As GPT-2, Llama 3 and Qwen have it: merges over letters that stand for bytes."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, special_tokens=CONTROL, show_progress=False),
    )
    return backend


def byte_fallback_backend(*, normalized: bool = False) -> tokenizers.Tokenizer:
    """As Llama 2 and Mistral have it: SentencePiece-like, with byte tokens for what the vocabulary lacks."""
    letters = [*CONTROL, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁thena"]
    merges = [("t", "h"), ("▁", "th"), ("th", "e"), ("▁th", "e"), ("a", "n"), ("▁", "▁")]
    vocab = {token: i for i, token in enumerate([*letters, *("".join(pair) for pair in merges)])}
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing(single=["<s>", "$A"], special_tokens=[("<s>", 0)])
    backend.add_special_tokens([AddedToken(token, normalized=normalized) for token in CONTROL])
    return backend


def unigram_backend() -> tokenizers.Tokenizer:
    """As T5 has it: SentencePiece's likeliest pieces, the control tokens among them, with the best of scores."""
    pieces = [(token, 0.0) for token in (*CONTROL, "<unk>")] + [("▁the", -3.0), ("▁", -2.0), ("an", -4.0)]
    pieces += [(letter, -5.0) for letter in "abcdefghijklmnopqrstuvwxyz<>/|"]
    backend = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=3, byte_fallback=False))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.post_processor = processors.TemplateProcessing(single=["$A", "</s>"], special_tokens=[("</s>", 1)])
    backend.add_special_tokens(CONTROL)
    return backend


def byte_level() -> Tokenizer:
    return Tokenizer(byte_level_backend(), {"bos_token": "<s>", "eos_token": "</s>"})


def byte_fallback() -> Tokenizer:
    return Tokenizer(byte_fallback_backend(), {"bos_token": "<s>", "eos_token": {"content": "</s>"}})
