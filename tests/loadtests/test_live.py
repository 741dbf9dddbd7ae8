"""Locust against a real, tiny server: each kind of visit, each kind of load, and what is written down of them."""

import json
from pathlib import Path

from loadtests.load.records import LEFT, OK
from tests.loadtests.conftest import ROOT, Run
from tests.test_serve import Served

SYNTHETIC = ROOT / "loadtests" / "load" / "synthetic_mooncake.jsonl"


def test_users_read_leave_and_come_back(locust: Run, tiny: Served) -> None:
    before = tiny.metrics()["millrace_streams_resumed_total"]
    code, records, said = locust(
        "-u",
        "6",
        "-t",
        "4s",
        "--shape",
        "ramp",
        "--steps",
        "2",
        "--think-s",
        "0.1",
        "--leave",
        "0.2",
        "--come-back",
        "0.4",
    )
    assert code == 0, said
    assert {record.kind for record in records} == {"generate", "chat", "conversation"}
    assert {record.outcome for record in records} == {OK, LEFT}
    returned = [record for record in records if record.num_returns]
    assert returned and tiny.metrics()["millrace_streams_resumed_total"] - before == len(returned)
    whole = [record for record in records if record.outcome == OK]
    assert all(record.ttft_s and record.e2e_s and record.num_prompt for record in whole)
    native = [record for record in whole if record.kind == "generate" and not record.num_returns]
    assert native and all(len(record.gaps_s) == record.num_output - 1 for record in native)
    assert all(row in said for row in ("TTFT, ms", "between tokens, ms", "tokens/s"))


def test_a_trace_is_played_by_two_processes_with_its_lengths_and_prefixes(locust: Run, tiny: Served) -> None:
    before = tiny.metrics()["millrace_prefix_found_tokens_total"]
    flags = ["--trace", str(SYNTHETIC), "--speed", "4", "--scale", "16", "-t", "3s", "--processes", "2"]
    code, records, said = locust("Generate", *flags)
    assert code == 0, said
    lines = [json.loads(line) for line in SYNTHETIC.read_text().splitlines()]
    due = [line for line in lines if line["timestamp"] / 1000 / 4 < 3.0]
    wished = sorted((line["input_length"] // 16, line["output_length"] // 16 or 1) for line in due)
    assert sorted((record.num_prompt, record.num_output) for record in records) == wished
    assert tiny.metrics()["millrace_prefix_found_tokens_total"] > before


def test_another_dialect_and_a_promise_that_can_not_be_kept(locust: Run) -> None:
    flags = ["--dialect", "openai", "--rate", "8", "-t", "3s", "--shape", "ramp", "--steps", "3"]
    code, records, said = locust("Generate", "Chat", *flags, "--slo", "ttft:0.001")
    assert code == 1 and "SLO broken: TTFT" in said
    assert {record.kind for record in records} == {"generate", "chat"}
    assert {record.outcome for record in records} == {OK} and all(record.late_s >= 0 for record in records)


def test_a_server_that_is_not_there(locust: Run, tmp_path: Path) -> None:
    code, records, said = locust("-u", "1", "-t", "3s", "--host", "http://127.0.0.1:9")
    assert code == 1 and all(record.is_error for record in records) and "can't be asked" in said
