"""The commands that write to a terminal: `generate`, `chat`, `train`. Parts of the composition root, like `cli.py`."""

import argparse
import json
import secrets
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

from model.assemble import Assembler
from model.engine.engine import Engine
from model.families.registry import read_config, read_generation_defaults
from model.request import Request, SamplingParams, begun
from model.tokenizer import Tokenizer
from model.training.options import from_arguments
from model.training.tasks import train_for_task
from service.errors import InvalidRequest, Unavailable
from service.settings import BUNDLED


def generate(args: argparse.Namespace) -> None:
    """Stream one text to stdout; figures go to stderr."""
    folder = Path(args.model or BUNDLED)
    chosen = ("device", "dtype", "quantize", "deterministic", "max_model_len", "cache_gib")
    flags = {name: getattr(args, name) for name in chosen if getattr(args, name)}
    engine = Engine.load(folder, max_num_seqs=1, native=args.native is not False, **flags)
    request = _request(engine, folder, args)
    assembler = Assembler(engine.tokenizer, request)
    engine.add(request)
    started_s, num_tokens = time.perf_counter(), 0
    print(args.prompt, end="", flush=True)
    while engine.has_work():
        for delta in engine.step():
            num_tokens += len(delta.token_ids)
            print("".join(map(assembler.push, delta.token_ids)), end="", flush=True)
            if delta.finish is not None and delta.finish.error:
                raise Unavailable(delta.finish.error)
    elapsed_s = time.perf_counter() - started_s
    print(assembler.finish())
    rate = num_tokens / elapsed_s
    print(
        f"[{num_tokens} tokens in {elapsed_s:.2f} s, {rate:.1f} tokens/s, seed {request.sampling.seed}]",
        file=sys.stderr,
    )


def _request(engine: Engine, folder: Path, args: argparse.Namespace) -> Request:
    defaults = read_generation_defaults(folder)
    eos_ids = read_config(folder).eos_ids
    prompt_ids = tuple(engine.tokenizer.encode(args.prompt))
    if not 0 < len(prompt_ids) < engine.config.max_model_len:
        raise InvalidRequest("prompt", f"{len(prompt_ids)} tokens", f"1 to {engine.config.max_model_len - 1} tokens")
    sampling = SamplingParams(
        temperature=defaults.temperature,
        top_k=defaults.top_k,
        top_p=defaults.top_p,
        min_p=defaults.min_p,
        repetition_penalty=defaults.repetition_penalty,
        seed=secrets.randbits(63) if args.seed is None else args.seed,
        max_tokens=args.max_tokens,
        stop_token_ids=eos_ids,
        eos_ids=eos_ids,
    )
    given = {name: getattr(args, name) for name in ("temperature", "top_p") if getattr(args, name) is not None}
    prompt_ids, source_ids = begun(prompt_ids, engine.start_id)
    return Request("generate", prompt_ids, replace(sampling, **given), source_ids=source_ids)


def chat(args: argparse.Namespace) -> None:
    """Read lines from stdin, stream the answers of a running server. An empty line or end of input ends it."""
    tokenizer = Tokenizer.load(Path(args.model or BUNDLED))
    messages: list[dict[str, object]] = []
    print("Type a line and press Enter; an empty line ends the chat.", file=sys.stderr)
    while line := _ask():
        messages.append({"role": "user", "content": line})
        answer = ""
        body = {"prompt": tokenizer.encode_chat(messages), "max_tokens": args.max_tokens}
        for text in _stream(args.url, args.api_key, body):
            answer += text
            print(text, end="", flush=True)
        print()
        messages.append({"role": "assistant", "content": answer})


def _ask() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""


def _stream(url: str, key: str | None, body: dict[str, object]) -> Iterator[str]:
    """Texts of a streamed answer. Raises `Unavailable` in words when the server can't be reached or refuses."""
    parts = urlsplit(url)
    connection = HTTPConnection(parts.hostname or "127.0.0.1", parts.port or 80)
    try:
        headers = {"content-type": "application/json", **({"authorization": f"Bearer {key}"} if key else {})}
        connection.request("POST", "/generate", json.dumps({**body, "stream": True}), headers)
        response = connection.getresponse()
        if response.status != 200:
            problem = json.loads(response.read())
            raise Unavailable(f"{url} answered {response.status}: {problem.get('detail', problem)}")
        for line in response:
            if line.startswith(b"data: {"):
                event = json.loads(line[6:])
                if "error" in event:
                    raise Unavailable(f"{url}: {event['error']}")
                yield "".join(choice["text"] for choice in event["choices"])
    except OSError as error:
        raise Unavailable(f"no server answers at {url} ({error.strerror}); start one with: millrace serve") from error
    finally:
        connection.close()


def train(args: argparse.Namespace) -> None:
    """Train a model, telling its progress on stderr."""
    train_for_task(from_arguments(args), lambda line: print(line, file=sys.stderr, flush=True))
