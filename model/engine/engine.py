"""The engine: requests in, deltas out, one step at a time.

It ties the scheduler (who), the runner (what) and the stop strings (until when) together. One thread, no asyncio, no
service types; the same object serves HTTP and five lines of library code:

    engine = Engine.load("model/bundled")
    prompt_ids = tuple(engine.tokenizer.encode("Once upon a time"))
    engine.add(Request("a", prompt_ids, SamplingParams(max_tokens=40, seed=7)))
    text = engine.tokenizer.detokenizer(prompt_ids)
    while engine.has_work():
        print("".join(text.push(id) for delta in engine.step() for id in delta.token_ids), end="", flush=True)
"""

import time
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from model.assemble import Assembler
from model.config import EngineConfig
from model.engine.beams import Beams
from model.engine.paths import Network, StepRunner, make_runner
from model.engine.runner import Computed
from model.engine.scheduler import Chunk, Outcome, Scheduler, StepPlan
from model.engine.sequence import Sequence
from model.engine.sizing import check_quantize, choose_device, choose_dtype, size_engine, with_needs
from model.families.registry import read_config
from model.grammar import Grammars
from model.nn.decoder import as_dtype
from model.request import Delta, Finish, FinishReason, Request, TokenLogprob
from model.tokenizer import Tokenizer
from model.weights import load_network

LENGTH = Finish(FinishReason.LENGTH)
LOOK_S = 0.05  # between two looks for something to do
NOT_FINITE = Finish(FinishReason.ERROR, error="the network produced a number that is not finite")


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Gauges now, and counters since the start (`_total`). `last_rows` is the number of tokens of the last step."""

    num_waiting: int
    num_running: int
    num_blocks: int
    num_free_blocks: int
    preemptions_total: int
    steps_total: int
    prompt_tokens_total: int
    output_tokens_total: int
    last_rows: int
    prefix_asked_total: int = 0  # prompt tokens looked for in the cache, and found there
    prefix_found_total: int = 0


@dataclass(frozen=True, slots=True)
class _Step:
    """A plan, what the runner made of it, and when; None: there was nothing to compute."""

    plan: StepPlan
    flight: Any
    started_s: float


class Engine:
    """Continuous batching over one network. Every added request ends with exactly one delta that has a `finish`, unless
    it is cancelled: then its blocks are free at once and no more is said of it."""

    def __init__(
        self, decoder: Network, tokenizer: Tokenizer, config: EngineConfig, runner: StepRunner | None = None
    ) -> None:
        config = with_needs(config, decoder.config)
        self.tokenizer, self.config = tokenizer, config
        self.start_id, self._searches = decoder.config.start_id, decoder.config.searches
        self.scheduler = Scheduler(config)
        self.runner = runner or make_runner(decoder, config)
        self._beams = Beams(self.scheduler, config, self.runner.fork)
        self._flying: _Step | None = None  # started, while the one before it is told
        self._planned: StepPlan | None = None  # to be started once the one before it is told
        self._assemblers: dict[str, Assembler] = {}  # of requests with stop strings only
        self._tasks, self._is_whole = decoder.config.tasks, decoder.config.role == "encoder"
        shape, control = decoder.config, tokenizer.control_ids.union(decoder.config.eos_ids)
        self._grammars = Grammars(tokenizer.token_bytes, tokenizer.vocab_size, control, shape.vocab_size)
        self._unmatched: dict[str, Sequence] = {}  # their matchers are being made
        self._ended: list[Delta] = []  # complete when they were added; told by the next step
        self._steps = self._prompt_tokens = self._output_tokens = self._last_rows = 0
        self._collected_s = 0.0

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        device: str = "auto",
        dtype: str = "auto",
        quantize: str = "none",
        max_model_len: int | None = None,
        max_num_seqs: int = 64,
        cache_gib: float | None = None,
        deterministic: bool = False,
        prefix_cache: bool = True,
        native: bool = True,
    ) -> "Engine":
        """An engine for a Hugging Face folder; for the last four see `EngineConfig`.

        Raises `CheckpointError` and `EngineConfigError`, one line each.
        """
        check_quantize(quantize)
        folder = Path(folder)
        config = read_config(folder)
        tokenizer = Tokenizer.load(folder)
        device = choose_device(device)
        dtype = choose_dtype(dtype, device, config.dtype)
        decoder = load_network(folder, config, as_dtype(dtype), torch.device(device), quantize == "int8")
        sized = size_engine(
            config,
            device=device,
            dtype=dtype,
            quantize=quantize,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            cache_gib=cache_gib,
        )
        engine = replace(sized, deterministic=deterministic, prefix_cache=prefix_cache, native=native)
        return cls(decoder, tokenizer, engine, make_runner(decoder, engine, drop=True))

    def add(self, request: Request, so_far: Seq[int] = ()) -> None:
        """Take a request in; `so_far` are output ids that it already has, which are not told again."""
        if (wrong := self._unreadable(request)) is not None:
            self._ended.append(Delta(request.id, len(so_far), finish=Finish(FinishReason.ERROR, error=wrong)))
            return
        if request.sampling.beam_width > 1:
            told = self._beams.add(request)
            self._ended += [] if told is None else [told]
            return
        if request.text.stop:
            assembler = Assembler(self.tokenizer, request)
            for token_id in so_far:
                assembler.push(token_id)
            if assembler.stopped is not None:
                finish = Finish(FinishReason.STOP, stop_reason=assembler.stopped)
                self._ended.append(Delta(request.id, len(so_far), finish=finish))
                return
            self._assemblers[request.id] = assembler
        sequence = Sequence(request, self.config.max_model_len, list(so_far), is_whole=self._is_whole)
        if request.grammar is None or sequence.end() not in (None, LENGTH):
            self.scheduler.add(sequence)
        else:
            self._unmatched[request.id] = sequence
            self._grammars.begin(request.id, request.grammar, request.sampling.stop_token_ids, so_far)

    def _unreadable(self, request: Request) -> str | None:
        """What keeps this network from a request, None if nothing does."""
        if request.task not in self._tasks:
            return f"this network can't {request.task}: it can {', '.join(self._tasks)}"
        if request.sampling.beam_width > 1 and not self._searches:
            return "beams share blocks of keys and values, and not all layers of this network have them"
        num, most = len(request.source_ids), self.config.max_model_len
        if self.start_id is None:
            return f"{num} source tokens, and this network reads none" if num else None
        return None if 0 < num <= most else f"{num} source tokens, expected 1 to {most}"

    def cancel(self, id: str) -> None:
        """Forget a request, waiting or running; its blocks are free on return. An unknown id is no error."""
        self.scheduler.finish(id)
        self._beams.cancel(id)
        self._assemblers.pop(id, None)
        if self._unmatched.pop(id, None):
            self._grammars.forget(id)

    def has_work(self) -> bool:
        """Whether `step` has anything to do."""
        waits = self._ended or self._unmatched or self._flying or self._planned or self._beams.num_waiting
        return self.scheduler.has_work or bool(waits)

    def room(self) -> int:
        """How many more requests are welcome: the seats, and a few to take the place of those that end."""
        spare = max(1, self.config.max_num_seqs // 8)
        num_here = self.scheduler.num_running + self.scheduler.num_waiting + len(self._unmatched)
        num_here += self._beams.num_waiting
        return max(0, self.config.max_num_seqs + spare - num_here)

    def step(self) -> list[Delta]:
        """Compute one step: at most one new id for each running request, who ended, and of a prompt that takes several
        steps how far it has come.

        A device that can run ahead is given the next step before this one's ids are looked at, so that it never waits
        for the host. Whoever turns out to have ended by then is computed once more, in vain.
        """
        if self._unmatched:
            self._take_matchers()
        self._beams.begin()
        step = self._flying or self._start(self._alive(self._planned) or self.scheduler.plan())
        self._flying = self._planned = None
        if step.flight is not None and self.runner.can_run_ahead(step.plan):
            self.scheduler.advance(step.plan)
            following = self.scheduler.plan()
            if self.runner.can_run_ahead(following):
                self._flying = self._start(following) if following.chunks else None
            else:
                self._planned = following
        return self._tell(step)

    def _alive(self, plan: StepPlan | None) -> StepPlan | None:
        """A plan made earlier, without the sequences that have ended since."""
        if plan is None or all(self.scheduler.owns(chunk.sequence) for chunk in plan.chunks):
            return plan
        return replace(plan, chunks=tuple(chunk for chunk in plan.chunks if self.scheduler.owns(chunk.sequence)))

    def _start(self, plan: StepPlan) -> _Step:
        now_s = time.perf_counter()
        return _Step(plan, self.runner.start(plan) if plan.chunks else None, now_s)

    def _is_reading(self, chunk: Chunk) -> bool:
        sequence = chunk.sequence
        return not chunk.draws and self.scheduler.owns(sequence) and not self._beams.has(sequence)

    def _tell(self, step: _Step) -> list[Delta]:
        done = Computed() if step.flight is None else self._collect(step)
        deltas, self._ended = self._ended, []
        for sequence in done.failed:
            if self.scheduler.owns(sequence):
                self.scheduler.spoil(sequence)
                if self._beams.has(sequence):
                    deltas.append(self._beams.failed(sequence, NOT_FINITE))
                    continue
                self.cancel(sequence.id)
                finish = (sequence.matcher and sequence.matcher.finish) or NOT_FINITE
                num_cached = sequence.num_cached
                deltas.append(Delta(sequence.id, len(sequence.output_ids), finish=finish, num_cached=num_cached))
        for outcome in self.scheduler.commit(step.plan, done.token_ids):
            id = outcome.sequence.id
            if outcome.sequence.request.sampling.beam_width == 1:
                deltas.append(self._delta(outcome, done.logprobs.get(id), done.results.get(id, b"")))
            elif (told := self._beams.drew(outcome.sequence, done.logprobs.get(id), outcome.finish)) is not None:
                deltas.append(told)
        deltas += [_progress(chunk.sequence) for chunk in step.plan.chunks if self._is_reading(chunk)]
        self._count(step.plan, sum(len(delta.token_ids) for delta in deltas))
        return deltas

    def _collect(self, step: _Step) -> Computed:
        """What a step brought. It has taken since it was started, or since the one before it was done."""
        done = self.runner.collect(step.flight)
        now_s = time.perf_counter()
        read = [(chunk.start, chunk.num_tokens) for chunk in step.plan.chunks if chunk.num_tokens > 1]
        num_single = len(step.plan.chunks) - len(read)
        positions = sum((start + num // 2) * num for start, num in read)
        seconds = now_s - max(step.started_s, self._collected_s)
        self.scheduler.pace.told(num_single, step.plan.num_tokens - num_single, seconds, positions)
        self._collected_s = now_s
        return done

    def stats(self) -> EngineStats:
        """A snapshot, cheap enough for every step."""
        pool = self.scheduler.pool
        return EngineStats(
            self.scheduler.num_waiting + len(self._unmatched) + self._beams.num_waiting,
            self.scheduler.num_running,
            pool.num_blocks,
            pool.num_free,
            self.scheduler.num_preemptions,
            self._steps,
            self._prompt_tokens,
            self._output_tokens,
            self._last_rows,
            self.scheduler.prefixes.num_asked,
            self.scheduler.prefixes.num_found,
        )

    def _take_matchers(self) -> None:
        """Schedule those whose matchers have been made; without other work, wait a little for them."""
        idle = not (self.scheduler.has_work or self._ended or self._flying or self._planned)
        for id, matcher in self._grammars.take(LOOK_S if idle else 0):
            sequence = self._unmatched.pop(id)
            if isinstance(matcher, Finish):
                self._assemblers.pop(id, None)
                self._ended.append(Delta(id, len(sequence.output_ids), finish=matcher))
            else:
                sequence.matcher = matcher
                self.scheduler.add(sequence)

    def _delta(self, outcome: Outcome, logprob: TokenLogprob | None, result: bytes) -> Delta:
        sequence, finish = outcome.sequence, outcome.finish
        new = tuple(sequence.output_ids[len(sequence.output_ids) - outcome.num_new :])
        assembler = self._assemblers.get(sequence.id)
        if assembler is not None:
            for token_id in new:
                assembler.push(token_id)
            if assembler.stopped is not None:
                self.scheduler.finish(sequence.id)
                finish = Finish(FinishReason.STOP, stop_reason=assembler.stopped)
        if sequence.matcher is not None and finish in (None, LENGTH):
            finish = self._matched(sequence, new) or finish
        if finish is not None:
            self._assemblers.pop(sequence.id, None)
        start = len(sequence.output_ids) - len(new)
        told = (logprob,) if new and logprob is not None else ()
        num_cached = sequence.num_cached if finish else 0
        return Delta(sequence.id, start, new, told, finish, num_cached=num_cached, result=result)

    def _matched(self, sequence: Sequence, new: Seq[int]) -> Finish | None:
        """How the grammar ends the sequence: complete with the last of the tokens that there may be, it is complete."""
        assert sequence.matcher is not None
        for token_id in new:
            sequence.matcher.push(token_id)
        finish = sequence.matcher.finish
        if finish is not None:
            self.scheduler.finish(sequence.id)
        return finish

    def _count(self, plan: StepPlan, num_drawn: int) -> None:
        self._steps += bool(plan.chunks)
        self._output_tokens += num_drawn
        self._last_rows = plan.num_tokens
        for chunk in plan.chunks:
            self._prompt_tokens += max(0, min(chunk.start + chunk.num_tokens, chunk.sequence.num_prompt) - chunk.start)
            self._prompt_tokens += 0 if chunk.start else chunk.sequence.num_source


def _progress(sequence: Sequence) -> Delta:
    return Delta(sequence.id, len(sequence.output_ids), num_computed=min(sequence.num_computed, sequence.num_prompt))
