"""How good the network is by now: its loss on the validation text, and a few samples to read."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer

from model.nn.attention import DenseAttention
from model.nn.decoder import Decoder
from model.training.data import Ids, Rows, token_sizes, windows
from model.training.loss import bits_per_byte, next_token_loss

PROMPTS = ("Once upon a time", '"Where are you going?" said', "The little girl looked out of the window and")
TEMPERATURE = 0.8

Apply = Callable[..., Iterable[Any]]
"""`map`, or a thread pool's."""


@dataclass(frozen=True, slots=True)
class Evaluator:
    """Looks at a decoder with a validation text `ids`, in windows of `context` tokens, `num_windows` at once."""

    decoder: Decoder
    tokenizer: Tokenizer
    ids: Ids
    context: int
    num_windows: int
    apply: Apply

    def validate(self, limit: int | None = None) -> dict[str, float]:
        """Loss on the text's first `limit` tokens (None: all): nats per token, and bits per byte of what they spell.

        Windows do not overlap, so each starts without a past; the marks between documents must be predicted but count
        no bytes. Both make the figure a little worse than it could be told.
        """
        self.decoder.eval()
        ids = self.ids if limit is None else self.ids[: limit + 1]
        nats = sum(self.apply(self._nats, windows(ids, self.context, self.num_windows)))
        num_bytes = int(token_sizes(self.tokenizer)[ids[1:]].sum())
        return {"valid_nats": nats / (len(ids) - 1), "valid_bits_per_byte": bits_per_byte(nats, num_bytes)}

    @torch.no_grad()
    def _nats(self, batch: tuple[Rows, Rows]) -> float:
        device = self.decoder.embed.weight.device
        inputs, targets = (torch.from_numpy(rows).to(device) for rows in batch)
        return next_token_loss(self.decoder, inputs, targets).item() * targets.numel()

    def samples(self, num_tokens: int = 60) -> list[str]:
        """How the network goes on after each of PROMPTS, a line each."""
        texts = []
        for prompt in PROMPTS:
            ids = self.tokenizer.encode(prompt).ids
            texts.append(self.tokenizer.decode(ids + self._sample(ids, num_tokens)).replace("\n\n", " / "))
        return texts

    @torch.no_grad()
    def _sample(self, ids: list[int], num_tokens: int) -> list[int]:
        """Plain sampling, the whole text computed again for every token: slow, and enough for a look."""
        self.decoder.eval()
        device, out = self.decoder.embed.weight.device, list[int]()
        draws = torch.Generator().manual_seed(1)
        end = ids[0]
        while len(out) < num_tokens:
            row = torch.tensor((ids + out)[-self.context :], device=device)
            ops = DenseAttention(self.decoder.config, 1, len(row))
            hidden = self.decoder(row, torch.arange(len(row), device=device), ops)
            chances = (self.decoder.logits(hidden[-1:], ops).float() / TEMPERATURE).softmax(-1)
            token = int(torch.multinomial(chances.cpu(), 1, generator=draws))
            if token == end:
                break
            out.append(token)
        return out
