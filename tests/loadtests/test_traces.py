"""The two published forms of traces, line by line, and the synthetic ones that are kept here."""

from pathlib import Path

import pytest

from loadtests.load.prompts import Prompts
from loadtests.load.traces import Arrival, TraceError, as_azure, as_mooncake, azure, mooncake, read, smaller, synthetic

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
"""
MOONCAKE = """{"timestamp": 3000, "input_length": 1100, "output_length": 52, "hash_ids": [46, 47, 48]}
{"timestamp": 4500, "input_length": 600, "output_length": 26, "hash_ids": [46, 99]}
"""
FOLDER = Path(__file__).parent.parent.parent / "loadtests" / "load"


def test_azures_lines() -> None:
    first, second = azure(AZURE.splitlines())
    assert first == Arrival(0.0, 374, 44)
    assert (second.num_prompt, second.num_output) == (396, 109) and second.at_s == pytest.approx(4.314579)


def test_mooncakes_lines() -> None:
    assert list(mooncake(MOONCAKE.splitlines())) == [
        Arrival(0.0, 1100, 52, (46, 47, 48)),
        Arrival(1.5, 600, 26, (46, 99)),
    ]


@pytest.mark.parametrize(
    ("form", "line"),
    [
        (azure, "2023-11-16 18:15:46.6805900,many,44"),
        (azure, "yesterday,1,2"),
        (mooncake, '{"timestamp": 1, "input_length": 2}'),
        (mooncake, "[1, 2]"),
    ],
)
def test_another_line_is_refused_by_its_number(form: type, line: str) -> None:
    head = AZURE.splitlines()[0] if form is azure else MOONCAKE.splitlines()[0]
    with pytest.raises(TraceError, match="line 2"):
        list(form([head, line]))


def test_smaller_lengths_keep_what_is_shared() -> None:
    arrival = Arrival(1.0, 1100, 52, (46, 47, 48))
    assert smaller(arrival, 8) == Arrival(1.0, 137, 6, (46, 47, 48), 64)
    assert smaller(arrival, 8, longest=100).num_prompt == 94
    with pytest.raises(ValueError, match="does not divide"):
        smaller(arrival, 3)


def test_the_kept_traces_are_what_the_module_makes(tmp_path: Path) -> None:
    made = synthetic()
    assert (FOLDER / "synthetic_azure.csv").read_text() == as_azure(made)
    assert (FOLDER / "synthetic_mooncake.jsonl").read_text() == as_mooncake(made)
    assert read(FOLDER / "synthetic_mooncake.jsonl") == made
    assert [one.num_prompt for one in read(FOLDER / "synthetic_azure.csv")] == [one.num_prompt for one in made]
    assert len(read(FOLDER / "synthetic_azure.csv", most=5)) == 5


def test_equal_hashes_are_equal_beginnings_and_lengths_are_exact() -> None:
    prompts = Prompts("", list(range(1000)))
    one, other = (Arrival(0, 200, 1, hashes, 64) for hashes in ((5, 6, 7), (5, 6, 8)))
    ids, others = prompts.ids(one), prompts.ids(other)
    assert len(ids) == len(others) == 200
    assert ids[:128] == others[:128] and ids[128:130] != others[128:130]
    assert prompts.ids(one)[:192] == ids[:192] and ids[192:] != others[192:]
    assert len(prompts.ids(Arrival(0, 3000, 1))) == 3000


def test_text_has_the_words_that_make_the_tokens() -> None:
    prompts = Prompts("a b c d e f g h " * 40)
    prompts.counted(80)
    assert len(prompts.text(Arrival(0, 100, 1)).split()) == 50
