"""Training a classifier from labelled texts: first hidden words are filled in, then labels are told.

A step is a function of (configuration, network and moments before it, its number), as in `trainer.py`. What the text
alone teaches costs no labels, and a few thousand of these are too few to learn words from.
"""

import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F

from model.config import ModelConfig
from model.nn.bert import Encoder, SpanAttention, text_positions
from model.nn.decoder import num_parameters
from model.training import checkpoint
from model.training.baseline import bag_of_words
from model.training.export import export_classifier
from model.training.labelled import Labelled, Split, load_labelled, masked, thinned, train_word_pieces
from model.training.loss import cross_entropy
from model.training.optimizer import make_optimizers
from model.training.options import OptionError, TrainConfig
from model.training.runlog import RunLog, plot
from model.training.trainer import Report, initialise, learning_rate, open_folder

THINNED = 0.1  # part of the words that are masked while labels are told
TEXTS_AT_ONCE = 64  # of those that are only looked at


def train_classifier(config: TrainConfig, report: Report) -> None:
    """Train until `config.steps` are done, going on from the folder's last checkpoint, and export to `config.out`.

    `report` gets a line at a time. Raises OptionError before any work when the arguments or the data can't be used.
    """
    folder = config.out / "run"
    open_folder(config, folder)
    split = load_labelled(config.data, config.valid_fraction, config.test_fraction)
    tokenizer = _tokenizer(config, folder, split)
    parts = (split.train, split.valid, split.test)
    train, valid, test = (Labelled.of(part, split.labels, tokenizer, config.context) for part in parts)
    shape = config.network(tokenizer.get_vocab_size())
    run = Run(config, folder, replace(shape, labels=split.labels, bos_id=None, eos_ids=()), train)
    report(
        f"{num_parameters(run.encoder):,} parameters, {len(train.texts):,} texts with the labels "
        f"{', '.join(split.labels)}; {len(valid.texts):,} to validate, {len(test.texts):,} to test; "
        f"step {run.step:,} of {config.steps:,}"
    )
    _loop(run, valid, report)
    export_classifier(run.encoder, tokenizer, config.dtype, config.out)
    result = {
        "texts": len(test.texts),
        "accuracy": run.look_at(test)[1],
        "majority": test.majority(),
        "bag_of_words": bag_of_words(train, valid, test),
        "bag_of_pairs": bag_of_words(train, valid, test, pairs=True),
    }
    (folder / "result.json").write_text(json.dumps(result) + "\n")
    report(
        f"of {len(test.texts):,} texts never seen, {result['accuracy']:.1%} right; always the most frequent label: "
        f"{result['majority']:.1%}; logistic regression over words: {result['bag_of_words']:.1%}, "
        f"over words and pairs: {result['bag_of_pairs']:.1%}"
    )
    report(plot(folder))
    report(f"wrote {config.out}: millrace serve --model {config.out}")


def _tokenizer(config: TrainConfig, folder: Path, split: Split) -> Tokenizer:
    file = folder / "tokenizer.json"
    if not file.exists():
        temporary = file.with_suffix(".tmp")
        train_word_pieces([text for _, text in split.train], config.vocab_size).save(str(temporary))
        temporary.replace(file)
    return Tokenizer.from_file(str(file))


class Run:
    """The network, its optimisers and where they stand; one call makes one step."""

    def __init__(self, config: TrainConfig, folder: Path, shape: ModelConfig, train: Labelled) -> None:
        self.config, self.train = config, train
        cuda = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
        if cuda and not torch.cuda.is_available():
            raise OptionError("--device cuda: torch sees no CUDA device here")
        self.device = torch.device("cuda" if cuda else "cpu")
        torch.manual_seed(config.seed)
        self.encoder = Encoder(shape, config.dropout)
        initialise(self.encoder)
        self.encoder.to(self.device)
        self.optimizers = make_optimizers(self.encoder, config.optimizer, config.weight_decay)
        self.file = folder / "checkpoint.safetensors"
        self.step = checkpoint.load(self.file, self.encoder, self.optimizers)
        self.num_texts = max(1, config.batch_tokens * len(train.texts) // sum(map(len, train.texts)))
        self.num_masked = int(config.steps * config.masked_fraction)  # steps that see no label

    def rate(self) -> float:
        """The learning rate: each half of the run has the whole schedule."""
        if self.step < self.num_masked:
            return learning_rate(replace(self.config, steps=self.num_masked), self.step)
        rest = replace(self.config, steps=self.config.steps - self.num_masked)
        return learning_rate(rest, self.step - self.num_masked)

    def one_step(self) -> float:
        """One optimiser step; the mean loss of its batch in nats per hidden word, or per text."""
        config = self.config
        torch.manual_seed(config.seed * 1_000_003 + self.step)  # dropout, too, is a function of (seed, step)
        draws = np.random.default_rng((config.seed, self.step))
        batch, rate = self.train.draw(config.seed, self.step, self.num_texts), self.rate()
        self.encoder.train()
        loss = self._words(batch, draws) if self.step < self.num_masked else self._labels(batch, draws)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.encoder.parameters(), config.clip)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        return loss.item()

    def look_at(self, texts: Labelled) -> tuple[float, float]:
        """Nats per text, and how many of the labels are right."""
        self.encoder.eval()
        nats, num_right = 0.0, 0
        for first in range(0, len(texts.texts), TEXTS_AT_ONCE):
            part = slice(first, first + TEXTS_AT_ONCE)
            labels = torch.from_numpy(texts.labels[part]).to(self.device)
            with torch.no_grad():
                scores = self._scores(texts.texts[part])
            nats += F.cross_entropy(scores, labels, reduction="sum").item()
            num_right += int((scores.argmax(-1) == labels).sum())
        return nats / len(texts.texts), num_right / len(texts.texts)

    def save(self) -> None:
        """Keep what the next start goes on from."""
        checkpoint.save(self.file, self.step, self.encoder, self.optimizers)

    def _words(self, batch: Labelled, draws: np.random.Generator) -> Tensor:
        ids = np.concatenate(batch.texts)
        seen, hidden = masked(ids, self.encoder.config.vocab_size, draws)
        rows, _ = self._rows(np.split(seen, np.cumsum([len(text) for text in batch.texts])[:-1]))
        at = torch.from_numpy(hidden).to(self.device)
        return cross_entropy(rows[at], self.encoder.embed.weight, torch.from_numpy(ids).to(self.device)[at])

    def _labels(self, batch: Labelled, draws: np.random.Generator) -> Tensor:
        scores = self._scores([thinned(text, THINNED, draws) for text in batch.texts])
        return F.cross_entropy(scores, torch.from_numpy(batch.labels).to(self.device))

    def _scores(self, texts: list[np.ndarray[tuple[int, ...], np.dtype[np.int64]]]) -> Tensor:
        rows, ops = self._rows(texts)
        firsts = torch.tensor([0, *np.cumsum([len(text) for text in texts])[:-1]], device=self.device)
        return self.encoder.scores(rows[firsts], ops)

    def _rows(self, texts: list[np.ndarray[tuple[int, ...], np.dtype[np.int64]]]) -> tuple[Tensor, SpanAttention]:
        lengths = [len(text) for text in texts]
        ops = SpanAttention(lengths)  # no dropout of weights: on a CPU that keeps every score of every text in memory
        ids = torch.from_numpy(np.concatenate(texts)).to(self.device)
        return self.encoder(ids, text_positions(lengths).to(self.device), ops), ops


def _loop(run: Run, valid: Labelled, report: Report) -> None:
    """Step until done, with the log, validation and checkpoints on the way."""
    config, log, began = run.config, RunLog(run.file.parent / "loss.csv", run.step), time.monotonic()
    while run.step < config.steps:
        what, rate = "words" if run.step < run.num_masked else "labels", run.rate()
        loss = run.one_step()
        last = run.step == config.steps
        row: dict[str, float] = {"step": run.step, "tokens": run.step * config.batch_tokens, "lr": rate}
        row |= {"seconds": log.seconds + time.monotonic() - began, "train_nats": loss}
        told = f"step {run.step:,}/{config.steps:,}  loss of {what} {loss:.4f}"
        if last or (what == "labels" and run.step % config.eval_every == 0):
            row["valid_nats"], accuracy = run.look_at(valid)
            told += f", validation {row['valid_nats']:.4f}, {accuracy:.1%} right"
        log.write(row)
        if run.step % config.report_every == 0 or "valid_nats" in row:
            report(told)
        if run.step % config.save_every == 0 or last:
            run.save()
