"""Maps of attention: rows that add up to 1, that see what the network sees, and give what the network gives."""

from dataclasses import replace

import torch

from model.nn.attention import DenseAttention
from model.nn.bert import SpanAttention
from model.nn.maps import WatchedAttention, attention_maps
from tests.model.conftest import TINY, random_decoder
from tests.model.test_pooling import random_encoder

IDS = [7, 3, 250, 9, 9, 14, 80]


def test_a_watched_pass_gives_what_an_unwatched_one_gives() -> None:
    ids, at = torch.tensor(IDS), torch.arange(len(IDS))
    decoder, encoder = random_decoder(replace(TINY, windows=(3, None))), random_encoder()
    for network, ops in ((decoder, DenseAttention(decoder.config, 1, 7)), (encoder, SpanAttention([7]))):
        watched = network(ids, at, WatchedAttention(network.config))
        torch.testing.assert_close(watched, network(ids, at, ops), atol=1e-4, rtol=1e-4)


def test_a_decoders_rows_see_only_what_came_before_within_the_window() -> None:
    maps = attention_maps(random_decoder(replace(TINY, windows=(3, None))), IDS)
    assert maps.shape == (2, 4, 7, 7)
    torch.testing.assert_close(maps.sum(-1), torch.ones(2, 4, 7))
    assert not maps.triu(1).any() and not maps[0].tril(-3).any() and maps[1].tril(-3).any()


def test_an_encoders_rows_see_the_whole_text() -> None:
    assert (attention_maps(random_encoder(), IDS) > 0).all()
