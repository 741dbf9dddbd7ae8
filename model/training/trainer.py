"""The training loop: prepared text, optimiser steps on a schedule, validation on the way, checkpoints, the export.

A step is a function of (configuration, network and moments before it, its number): nothing else is remembered, so a
run that was killed and started again has the loss curve of one that was not.
"""

import json
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, fields
from pathlib import Path
from typing import cast

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from model.nn.bert import Encoder
from model.nn.decoder import Decoder, num_parameters
from model.nn.lstm import LstmMixer
from model.training import checkpoint, data
from model.training.evaluate import Apply
from model.training.export import export
from model.training.lesson import Examiner, Lesson, Part, TextLesson
from model.training.optimizer import make_optimizers
from model.training.options import OptionError, TrainConfig
from model.training.pairs import PairData, pair_tokenizer, read_pairs
from model.training.runlog import RunLog, plot
from model.training.translate import PairLesson

Report = Callable[[str], None]

# A run goes on only with these as they were; the others (say, `steps`) may be changed between two starts.
FIXED = (
    *("data", "target", "family", "encoder_layers", "vocab_size", "hidden_size", "num_layers", "num_heads"),
    *("num_kv_heads", "head_dim", "intermediate_size", "window", "attention", "untied", "context", "batch_tokens"),
    *("optimizer", "seed", "task", "masked_fraction", "valid_fraction", "test_fraction"),
)


def train(config: TrainConfig, report: Report) -> None:
    """Train until `config.steps` are done, going on from the folder's last checkpoint, and export to `config.out`.

    `report` gets a line at a time. Raises OptionError before any work when the arguments or the data can't be used.
    """
    folder = config.out / "run"
    open_folder(config, folder)
    lesson = prepare_pairs(config, folder, report) if config.is_paired else prepare(config, folder, report)
    run = Run(config, folder, lesson)
    report(
        f"{num_parameters(run.decoder):,} parameters on {run.device.type}, {lesson.num_tokens:,} training tokens; "
        f"step {run.step:,} of {config.steps:,}"
    )
    _loop(run, lesson.examiner(run.decoder, run.apply), report)
    export(run.decoder, lesson.tokenizer, config.dtype, config.out)
    report(plot(folder))
    report(f"wrote {config.out}: millrace serve --model {config.out}")


def open_folder(config: TrainConfig, folder: Path) -> None:
    """Make the run's folder, or see that the run in it is this one. Raises OptionError."""
    file = folder / "config.json"
    if (config.out / "config.json").exists() and not file.exists():
        raise OptionError(f"--out {config.out}: holds a model that no run of this command made; choose another folder")
    now = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(config).items()}
    before = {item.name: item.default for item in fields(config)}  # an option that the run did not know
    before |= json.loads(file.read_text()) if file.exists() else now
    for name in FIXED:
        if before.get(name) != now[name]:
            raise OptionError(f"--out {config.out}: holds a run with {name} {before.get(name)}, not {now[name]}")
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(now, indent=1) + "\n")


def prepare(config: TrainConfig, folder: Path, report: Report) -> TextLesson:
    """Tokenizer and tokenised texts, from the run's folder when they are there already."""
    files = folder / "train.bin", folder / "valid.bin"
    last = folder / "tokenizer.json"  # written last: if it is there, so are the others
    if not last.exists():
        report(f"reading {config.data}")
        texts = data.load_split(config.data, config.valid_fraction)
        report(f"training a tokenizer on {len(texts[0]):,} documents")
        tokenizer = data.train_tokenizer(texts[0], config.vocab_size)
        for file, documents in zip(files, texts, strict=True):
            data.pack(documents, tokenizer).tofile(file)
        temporary = last.with_suffix(".tmp")
        tokenizer.save(str(temporary))
        temporary.replace(last)
    ids, valid_ids = (np.memmap(file, np.uint16, "r") for file in files)
    return TextLesson(config, Tokenizer.from_file(str(last)), ids, valid_ids)


def prepare_pairs(config: TrainConfig, folder: Path, report: Report) -> PairLesson:
    """Tokenised pairs; the tokenizer is from the run's folder when it is there already."""
    report(f"reading {config.data}")
    pairs = read_pairs(config.data, Path(config.target) if config.target else None)
    if config.valid:
        valid = read_pairs(Path(config.valid), Path(config.valid_target) if config.valid_target else None, "valid")
    else:
        num = max(1, round(config.valid_fraction * len(pairs)))
        pairs, valid = pairs[:-num], pairs[-num:]
    last = folder / "tokenizer.json"
    if not last.exists():
        report(f"training a tokenizer on {len(pairs):,} pairs")
        temporary = last.with_suffix(".tmp")
        pair_tokenizer(pairs, config.vocab_size).save(str(temporary))
        temporary.replace(last)
    tokenizer = Tokenizer.from_file(str(last))
    return PairLesson(config, tokenizer, PairData.of(pairs, tokenizer, config.context), valid)


class Run:
    """The network, its optimisers and where they stand; one call makes one step."""

    def __init__(self, config: TrainConfig, folder: Path, lesson: Lesson) -> None:
        self.config, self.folder, self.lesson = config, folder, lesson
        cuda = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
        if cuda and not torch.cuda.is_available():
            raise OptionError("--device cuda: torch sees no CUDA device here")
        self.device = torch.device("cuda" if cuda else "cpu")
        self.apply: Apply = map
        if config.workers > 1:
            # One thread of products for each slice of the batch: no barrier after every operation, only one a step.
            torch.set_num_threads(1)
            self.apply = ThreadPoolExecutor(config.workers).map
        torch.manual_seed(config.seed)
        self.decoder = Decoder(config.network(lesson.tokenizer.get_vocab_size()), config.dropout)
        initialise(self.decoder)
        self.decoder.to(self.device)
        self.parameters = list(self.decoder.parameters())
        self.body = cast(nn.Module, torch.compile(self.decoder, dynamic=False)) if config.compile else self.decoder
        self.optimizers = make_optimizers(self.decoder, config.optimizer, config.weight_decay, self.apply)
        self.step = checkpoint.load(self._checkpoint, self.decoder, self.optimizers)

    @property
    def _checkpoint(self) -> Path:
        return self.folder / "checkpoint.safetensors"

    def save(self) -> None:
        """Keep what the next start goes on from."""
        checkpoint.save(self._checkpoint, self.step, self.decoder, self.optimizers)

    def one_step(self) -> float:
        """One optimiser step; the mean loss of its batch in nats per token."""
        config, total = self.config, 0.0
        torch.manual_seed(config.seed * 1_000_003 + self.step)  # dropout, too, is a function of (seed, step)
        parts = self.lesson.parts(self.step)
        self.decoder.train()
        for loss, grads in self.apply(self._gradients, parts):
            total += loss
            for parameter, grad in zip(self.parameters, grads, strict=True):
                parameter.grad = grad if parameter.grad is None else parameter.grad.add_(grad)
        nn.utils.clip_grad_norm_(self.parameters, config.clip)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, self.step)
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        return total

    def _gradients(self, part: Part) -> tuple[float, tuple[Tensor, ...]]:
        """Loss and gradients of some of a step's sequences, as their part of the step's mean."""
        with self._precision():
            loss = self.lesson.loss(self.decoder, self.body, part)
        return loss.item(), torch.autograd.grad(loss, self.parameters)

    def _precision(self) -> AbstractContextManager[object]:
        asked = self.config.autocast
        on = asked == "on" or (asked == "auto" and self.device.type == "cuda")
        return torch.autocast(self.device.type, torch.bfloat16) if on else nullcontext()


def initialise(decoder: Decoder | Encoder) -> None:
    """Normal(0, 0.02) matrices, those that write into the residual stream divided by sqrt(2 layers) so that its size
    does not grow with depth (GPT-2, Radford et al. 2019, 2.3), and zero biases. Where norms come after the sums, that
    size is theirs to set: matrices keep the size of what goes through them (Glorot and Bengio 2010)."""
    shrink = math.sqrt(2 * decoder.config.num_layers)
    for name, parameter in decoder.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif name == "embed.weight" and (decoder.config.scaled_embedding or decoder.config.scaled_head):
            nn.init.normal_(parameter, std=1.0 if decoder.config.scaled_head else parameter.shape[1] ** -0.5)
        elif parameter.ndim == 2 and decoder.config.post_norm:
            nn.init.xavier_uniform_(parameter)
        elif parameter.ndim == 2:
            residual = name.endswith(("attn.out.weight", "cross.out.weight", "mlp.down.weight"))
            nn.init.normal_(parameter, std=0.02 / shrink if residual else 0.02)
    for module in decoder.modules():
        if isinstance(module, LstmMixer):
            module.remember()


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up, then a cosine down to `final_lr` of the peak, or with the inverse square root of the step
    (arXiv 1706.03762, 5.3), which needs no end."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.schedule == "inverse-sqrt":
        return config.lr * math.sqrt(config.warmup / (step + 1))
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * (config.final_lr + (1 - config.final_lr) * (1 + math.cos(math.pi * done)) / 2)


def _loop(run: Run, evaluator: Examiner, report: Report) -> None:
    """Step until done, with the log, validation, samples and checkpoints on the way."""
    config, log, began = run.config, RunLog(run.folder / "loss.csv", run.step), time.monotonic()
    recent = [(began, run.step)]
    while run.step < config.steps:
        rate = learning_rate(config, run.step)
        loss = run.one_step()
        last, now = run.step == config.steps, time.monotonic()
        recent = [*recent[-20:], (now, run.step)]
        row: dict[str, float] = {"step": run.step, "tokens": run.step * config.batch_tokens, "lr": rate}
        row |= {"seconds": log.seconds + now - began, "train_nats": loss}
        if run.step % config.eval_every == 0 or last:
            row |= evaluator.validate(None if last else config.eval_tokens)
            for text in evaluator.samples():
                report(f"  | {text}")
        log.write(row)
        if run.step % config.report_every == 0 or "valid_nats" in row:
            report(_progress(config, row, (now - recent[0][0]) / (run.step - recent[0][1])))
        if run.step % config.save_every == 0 or last:
            run.save()


def _progress(config: TrainConfig, row: dict[str, float], pace_s: float) -> str:
    """One line: where the run is, how fast (`pace_s` a step), how long still."""
    valid = ""
    if "valid_nats" in row:
        valid = f", validation {row['valid_nats']:.4f} = {row['valid_bits_per_byte']:.4f} bits/byte"
    left_s = pace_s * (config.steps - row["step"])
    return (
        f"step {row['step']:,}/{config.steps:,}  loss {row['train_nats']:.4f}{valid}  "
        f"{config.batch_tokens / pace_s:,.0f} tokens/s  {left_s / 60:.0f} min left"
    )
