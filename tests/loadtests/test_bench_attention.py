"""The comparison of kinds of layers: what is compared is alike, and what is not known is not told."""

from pathlib import Path

import pytest
import torch

from loadtests.attention.lengths import Measured, measure
from loadtests.bench_attention import KINDS, SIZES, run_config, table
from model.nn.decoder import Decoder, num_parameters


@pytest.mark.parametrize("name", KINDS)
def test_networks_have_as_many_parameters(name: str) -> None:
    sizes = []
    for word in ("full", KINDS[name]):
        with torch.device("meta"):
            sizes.append(num_parameters(Decoder(run_config(Path(), Path(), word, 1).network(SIZES["vocab_size"]))))
    assert abs(sizes[1] - sizes[0]) < 0.003 * sizes[0]


def test_a_table_has_a_dash_for_what_is_not_known() -> None:
    lines = list(table({"LSTM": {"parameters": 1000}}, {"LSTM": [Measured(1024, 2048, 2.0, 9.0)]}))
    assert lines[-2] == "| LSTM | 1,000 | - | - | - | 2 | - | 500 | - |"
    assert len(lines) == 2 + len(KINDS)


def test_memory_is_that_of_the_stream_after_its_prompt() -> None:
    shape = run_config(Path(), Path(), "window:128", 1).network(SIZES["vocab_size"])
    few, many = measure(shape, [600, 1200])
    assert few.num_bytes == many.num_bytes < 600 * 2 * 3 * 2 * 32 * 4  # fewer than all tokens would take
