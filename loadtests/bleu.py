"""`make bleu`: how good a served encoder-decoder translates, by sacrebleu, with everything through HTTP.

    millrace serve --model path/to/folder
    python -m loadtests.bleu --source test.de --reference test.en

Each line of the source file is a prompt, sent alone, many at a time; the answers, in order, are compared with the lines
of the reference. The signature says what the figure means (Post 2018, arXiv 1804.08771). Files may be packed by gzip.
"""

import argparse
import asyncio
import gzip
import time
from pathlib import Path
from typing import Any

import httpx
from sacrebleu.metrics import BLEU


def read_lines(file: Path) -> list[str]:
    """The lines of a text file in UTF-8."""
    raw = file.read_bytes()
    return (gzip.decompress(raw) if file.suffix == ".gz" else raw).decode().removesuffix("\n").split("\n")


async def translate(url: str, sources: list[str], body: dict[str, Any], num_at_once: int) -> list[str]:
    """The answers to all sources, in order."""
    gate = asyncio.Semaphore(num_at_once)
    async with httpx.AsyncClient(timeout=600, limits=httpx.Limits(max_connections=num_at_once)) as client:

        async def one(source: str) -> str:
            async with gate:
                answer = await client.post(f"{url}/generate", json={**body, "prompt": source})
            answer.raise_for_status()
            return str(answer.json()["choices"][0]["text"]).strip()

        return await asyncio.gather(*map(one, sources))


def main() -> None:
    parser = argparse.ArgumentParser(description="BLEU of a served encoder-decoder.")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--source", type=Path, required=True, help="a sentence in each line")
    parser.add_argument("--reference", type=Path, required=True, help="its translation in each line")
    parser.add_argument("--num", type=int, help="only so many lines")
    parser.add_argument("--at-once", type=int, default=32, help="requests at a time (%(default)s)")
    parser.add_argument("--max-tokens", type=int, default=128, help="of an answer (%(default)s)")
    parser.add_argument("--beam-width", type=int, default=1, help="1 is greedy (%(default)s)")
    parser.add_argument("--length-penalty", type=float, default=1.0, help="of a search (%(default)s)")
    parser.add_argument("--out", type=Path, help="file for the answers")
    args = parser.parse_args()
    sources, references = (read_lines(file)[: args.num] for file in (args.source, args.reference))
    body = {"temperature": 0, "max_tokens": args.max_tokens, "beam_width": args.beam_width}
    body["length_penalty"] = args.length_penalty
    began_s = time.perf_counter()
    answers = asyncio.run(translate(args.url, sources, body, args.at_once))
    elapsed_s = time.perf_counter() - began_s
    if args.out:
        args.out.write_text("\n".join(answers) + "\n", encoding="utf-8")
    bleu = BLEU()
    print(bleu.corpus_score(answers, [references]))
    print(bleu.get_signature())
    print(f"{len(answers)} answers in {elapsed_s:.0f} s, {len(answers) / elapsed_s:.1f}/s")


if __name__ == "__main__":
    main()
