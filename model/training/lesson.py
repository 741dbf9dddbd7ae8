"""What a network is taught and how it is examined, as the trainer sees it; and the plain case, going on with a text.

The trainer knows steps, optimisers and files. A lesson knows what a step's batch is and what its loss is.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from model.nn.decoder import Decoder
from model.training import data
from model.training.evaluate import Apply, Evaluator
from model.training.loss import next_token_loss
from model.training.options import TrainConfig

Part = tuple[Any, ...]
"""Some of a step's batch, as its lesson understands it."""


class Examiner(Protocol):
    """Looks at a network now and then."""

    def validate(self, limit: int | None = None) -> dict[str, float]:
        """`valid_nats` per token and `valid_bits_per_byte`, over about `limit` tokens (None: all)."""
        ...

    def samples(self) -> list[str]:
        """Some lines to read."""
        ...


class Lesson(Protocol):
    """What a run teaches."""

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def num_tokens(self) -> int:
        """Of what is taught."""
        ...

    def parts(self, step: int) -> Sequence[Part]:
        """A step's batch, cut as the run computes it; a function of the step alone."""
        ...

    def loss(self, decoder: Decoder, body: nn.Module, part: Part) -> Tensor:
        """What a part adds to the step's mean loss, nats. `body` computes hidden rows in the decoder's stead."""
        ...

    def examiner(self, decoder: Decoder, apply: Apply) -> Examiner: ...


@dataclass(frozen=True, slots=True)
class TextLesson:
    """To go on with a text: the next token after each."""

    config: TrainConfig
    tokenizer: Tokenizer
    ids: data.Ids
    valid_ids: data.Ids

    @property
    def num_tokens(self) -> int:
        """Of the training text."""
        return len(self.ids)

    def parts(self, step: int) -> Sequence[Part]:
        """Slices of inputs, targets, and what part of the batch they are."""
        config = self.config
        batches = data.Batches(self.ids, config.seed)
        inputs, targets = batches.draw(step, config.batch_tokens, config.length(step))
        at_once = min(config.micro_tokens or config.batch_tokens, config.batch_tokens // config.workers)
        rows = max(1, at_once // inputs.shape[1])
        slices = [slice(first, first + rows) for first in range(0, len(inputs), rows)]
        return [(inputs[part], targets[part], len(inputs[part]) / len(inputs)) for part in slices]

    def loss(self, decoder: Decoder, body: nn.Module, part: Part) -> Tensor:
        """See `Lesson`."""
        inputs, targets, share = part
        device = decoder.embed.weight.device
        x, y = (torch.from_numpy(rows).to(device) for rows in (inputs, targets))
        mean = next_token_loss(decoder, x, y, self.config.dropout, body, self.config.label_smoothing)
        return mean * float(share)

    def examiner(self, decoder: Decoder, apply: Callable[..., Iterable[Any]]) -> Examiner:
        """See `Lesson`."""
        few = max(1, self.config.batch_tokens // self.config.workers // self.config.context)
        return Evaluator(decoder, self.tokenizer, self.valid_ids, self.config.context, few, apply)
