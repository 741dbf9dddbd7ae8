"""Workers die under the rest of the family: encoder-decoders, and layers that carry states instead of caches."""

from dataclasses import replace
from pathlib import Path

import pytest

from model.config import ModelConfig
from model.kinds import Linear, Lstm, RecurrentMemory, Window
from tests.faults.conftest import STORYTELLER, MakeRedis
from tests.faults.history import Unfailed
from tests.faults.load import Load, bodies, num_take_overs
from tests.faults.procs import Cluster
from tests.model.conftest import random_decoder, save_folder
from tests.model.test_encoder_decoder import VANILLA

KINDS = (Window(32, 4, 1), Linear(32), RecurrentMemory(16, 16), Lstm(32))
NETWORKS = {
    "encoder-decoder": replace(VANILLA, vocab_size=256, hidden_size=128, num_layers=6, head_dim=32, eos_ids=()),
    "streams": replace(STORYTELLER, family="millrace-streams", num_layers=4, attention=KINDS),
}


@pytest.mark.parametrize("config", NETWORKS.values(), ids=NETWORKS)
async def test_streams_go_on_at_another_worker(config: ModelConfig, make_redis: MakeRedis, tmp_path: Path) -> None:
    folder = save_folder(random_decoder(config), tmp_path / "network")
    oracle, redis = Unfailed(folder, 200), make_redis()
    with Cluster(redis, folder, tmp_path) as cluster:
        cluster.api()
        first = cluster.worker()
        cluster.until_ready()
        async with Load(cluster.ports, bodies(8, 200)) as load:
            await load.until_tokens(20)
            first.kill_both()
            second = cluster.worker()
            await load.until_tokens(20)
            second.kill_engine()
            await load.all_exact(oracle)
        assert num_take_overs(redis, load.readings) >= 8
