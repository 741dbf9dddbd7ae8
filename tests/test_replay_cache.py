"""The replay of traces: what it makes of the two forms, and that the scheduler finds what an LRU cache finds."""

import json
import random
from pathlib import Path

import pytest

from loadtests.replay_cache import Asked, Found, azure, main, mooncake, read, replay, simulate
from model.config import EngineConfig

SMALL = EngineConfig(max_model_len=1000, max_num_seqs=4, max_batch_tokens=256, block_size=16, num_blocks=300)


def mooncake_file(folder: Path, num: int) -> Path:
    """Conversations that go on, in Mooncake's form: 64 tokens a hash at a scale of eight."""
    rng, talks, next_hash, lines = random.Random(3), [[0]], 1, list[str]()
    for i in range(num):
        talk = [*rng.choice(talks)[:8], next_hash]
        next_hash += 1
        talks = [*talks, talk][-12:]
        length = len(talk) * 512 - rng.randrange(500)
        told = {"timestamp": i * 500, "input_length": length, "output_length": 80, "hash_ids": talk}
        lines.append(json.dumps(told))
    path = folder / "trace.jsonl"
    path.write_text("\n".join(lines))
    return path


def test_equal_hashes_are_equal_ids(tmp_path: Path) -> None:
    trace = list(mooncake(mooncake_file(tmp_path, 50), 8))
    first = trace[0].prompt
    assert first[:64] == tuple(range(64)) and all(one.prompt[:64] == first[:64] for one in trace)
    assert trace[3].arrives_s == 1.5 and trace[3].num_output == 10


def test_lengths_become_conversations(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    lengths = [100, 40, 240, 400]
    rows = [f"2023-11-16 18:15:{46 + i}.6805900,{n},8" for i, n in enumerate(lengths)]
    path.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]))
    trace = list(azure(path, 1, 4))
    assert [len(one.prompt) for one in trace] == lengths
    assert trace[1].arrives_s - trace[0].arrives_s == pytest.approx(1.0)
    assert trace[2].prompt[:40] in (trace[0].prompt[:40], trace[1].prompt)


def test_by_hand() -> None:
    one, other = tuple(range(40)), (*range(32), *range(100, 108))
    trace = [Asked(at, prompt, 2) for at, prompt in enumerate((one, one, other))]
    assert replay(trace, SMALL, 0.01) == Found(120, 64)
    assert simulate(trace, 16, 300) == Found(120, 64)
    assert simulate(trace, 16, 2).num_found == 64 and simulate(trace, 16, 1).num_found == 32


@pytest.mark.parametrize("num_blocks", [100, 300])
def test_the_scheduler_finds_what_an_lru_cache_finds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], num_blocks: int
) -> None:
    path = mooncake_file(tmp_path, 300)
    main([str(path), "--blocks", str(num_blocks), "--seats", "2"])
    assert "300 requests" in capsys.readouterr().out
    trace = read(path, 8, 1, 300)
    real = replay(trace, EngineConfig("cpu", "float32", 1000, 2, 256, 16, num_blocks), 0.01)
    ideal = simulate(trace, 16, num_blocks)
    assert 0.2 < ideal.rate < 0.95 and abs(real.rate - ideal.rate) < 0.02
