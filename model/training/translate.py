"""Teaching an encoder-decoder to answer a source: teacher forcing (every id of the true answer after the true ones
before it), and how well it does."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from model.nn.decoder import Decoder
from model.nn.encoder import DenseEncoding
from model.nn.reading import DenseReading
from model.training.evaluate import Apply
from model.training.lesson import Examiner, Part
from model.training.loss import bits_per_byte, cross_entropy
from model.training.options import TrainConfig
from model.training.pairs import NOTHING, Pair, PairBatch, PairData

NUM_SAMPLES, LONGEST_SAMPLE = 3, 60


def pair_loss(decoder: Decoder, batch: PairBatch, dropout: float = 0.0, smoothing: float = 0.0) -> Tensor:
    """Mean nats per real target of a batch; `dropout` is attention's."""
    device = decoder.embed.weight.device
    source, lengths, inputs, targets = (
        torch.from_numpy(rows).to(device) for rows in (batch.source, batch.lengths, batch.inputs, batch.targets)
    )
    hidden = _hidden(decoder, source, lengths, inputs, dropout)
    real = targets.flatten() != NOTHING
    if decoder.config.scaled_head:
        hidden = hidden * decoder.config.hidden_size**-0.5
    weight = decoder.embed.weight if decoder.head is None else decoder.head.weight
    return cross_entropy(hidden[real], weight, targets.flatten()[real], smoothing)


def _hidden(decoder: Decoder, source: Tensor, lengths: Tensor, inputs: Tensor, dropout: float = 0.0) -> Tensor:
    """Final rows [b * t, hidden] of inputs [b, t] that read sources [b, s]."""
    (b, s), t, device = source.shape, inputs.shape[1], source.device
    encoding = DenseEncoding(decoder.config, b, s, lengths, dropout)
    rows = decoder.encode(source.flatten(), torch.arange(s, device=device).repeat(b), encoding)
    reading = DenseReading(decoder.config, b, t, decoder.memory(rows, encoding), lengths, dropout)
    hidden: Tensor = decoder(inputs.flatten(), torch.arange(t, device=device).repeat(b), reading)
    return hidden


@dataclass(frozen=True, slots=True)
class PairLesson:
    """To answer sources. A step's mean is over its real targets; sequences end where they end."""

    config: TrainConfig
    tokenizer: Tokenizer
    pairs: PairData
    valid: Sequence[Pair]

    @property
    def num_tokens(self) -> int:
        """Of the training pairs, both sides."""
        return int(self.pairs.sizes.sum())

    def parts(self, step: int) -> Sequence[Part]:
        """Batches of some rows each, and what part of the step's targets they have."""
        whole = self.pairs.draw(self.config.seed, step, self.config.batch_tokens)
        at_once = min(self.config.micro_tokens or self.config.batch_tokens, self.config.batch_tokens)
        num = max(self.config.workers, -(-self.config.batch_tokens // at_once))
        size = -(-len(whole.source) // num)
        cuts = [slice(first, first + size) for first in range(0, len(whole.source), size)]
        batches = [PairBatch(whole.source[c], whole.lengths[c], whole.inputs[c], whole.targets[c]) for c in cuts]
        return [(batch, batch.num_targets / whole.num_targets) for batch in batches]

    def loss(self, decoder: Decoder, body: nn.Module, part: Part) -> Tensor:
        """See `Lesson`; the decoder computes in any case."""
        batch, share = part
        return pair_loss(decoder, batch, self.config.dropout, self.config.label_smoothing) * float(share)

    def examiner(self, decoder: Decoder, apply: Apply) -> Examiner:
        """See `Lesson`."""
        return PairExaminer(decoder, self.tokenizer, self.valid, self.config, apply)


@dataclass(frozen=True, slots=True)
class PairExaminer:
    """Looks at a network with pairs that it is not taught."""

    decoder: Decoder
    tokenizer: Tokenizer
    pairs: Sequence[Pair]
    config: TrainConfig
    apply: Apply

    def validate(self, limit: int | None = None) -> dict[str, float]:
        """Nats per target, its end included and without smoothing, and bits per byte of the target texts; of the first
        pairs that have about `limit` tokens together."""
        self.decoder.eval()
        pairs = list(self.pairs)
        if limit is not None:
            share = limit / max(1, int(self._data(pairs).sizes.sum()))
            pairs = pairs[: max(1, int(len(pairs) * share))] if share < 1 else pairs
        batches = self._data(pairs).batches(self.config.batch_tokens)
        nats = sum(self.apply(self._nats, batches))
        num_bytes = sum(len(target.encode()) for _, target in pairs)
        num_targets = sum(batch.num_targets for batch in batches)
        return {"valid_nats": nats / num_targets, "valid_bits_per_byte": bits_per_byte(nats, num_bytes)}

    def _data(self, pairs: Sequence[Pair]) -> PairData:
        return PairData.of(pairs, self.tokenizer, self.config.context)

    @torch.no_grad()
    def _nats(self, batch: PairBatch) -> float:
        return pair_loss(self.decoder, batch).item() * batch.num_targets

    def samples(self) -> list[str]:
        """The likeliest answers, id by id, to the first sources."""
        return [f"{source} -> {self._answer(source)}" for source, _ in self.pairs[:NUM_SAMPLES]]

    @torch.no_grad()
    def _answer(self, text: str) -> str:
        """Every id from the beginning again: slow, and enough for a look."""
        self.decoder.eval()
        device = self.decoder.embed.weight.device
        source = torch.tensor([self.tokenizer.encode(text).ids], device=device)
        start_id = self.decoder.config.start_id
        assert start_id is not None, "an encoder-decoder has a starting id"
        out, lengths = [start_id], torch.tensor([source.shape[1]], device=device)
        while len(out) < min(LONGEST_SAMPLE, self.config.context):
            hidden = _hidden(self.decoder, source, lengths, torch.tensor([out], device=device))
            weight = self.decoder.embed.weight if self.decoder.head is None else self.decoder.head.weight
            out.append(int((hidden[-1] @ weight.T).argmax()))
            if out[-1] in self.decoder.config.eos_ids:
                break
        return str(self.tokenizer.decode(out))
