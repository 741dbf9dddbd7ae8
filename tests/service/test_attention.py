"""`millrace attention`: a picture with one small map for each head, and refusals in a line."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread

from model.kinds import Full, Linear
from service.attention import Maps, draw, looker, maps_of
from service.cli import main
from service.errors import StartupError
from service.settings import BUNDLED
from tests.model.conftest import TINY, random_decoder, save_folder
from tests.model.test_encoder_decoder import VANILLA


def test_the_command_draws_every_head(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_folder(random_decoder(TINY), tmp_path / "tiny")
    main(["attention", "It was $too$ tired.", "--model", str(folder), "--out", str(tmp_path / "maps.png")])
    assert "2 layers of 4 heads" in capsys.readouterr().err
    assert imread(tmp_path / "maps.png").std() > 0.05


def test_a_head_that_there_is_not_and_a_text_too_long_are_refused(tmp_path: Path) -> None:
    folder = save_folder(random_decoder(TINY), tmp_path / "tiny")
    with pytest.raises(SystemExit):
        main(["attention", "a", "--model", str(folder), "--layer", "2", "--out", str(tmp_path / "maps.png")])
    with pytest.raises(StartupError, match="513 tokens"):
        maps_of(folder, "a" * 513)


def test_the_head_shown_large_is_the_one_that_looks_elsewhere() -> None:
    weights = torch.eye(4).expand(2, 3, 4, 4).clone()
    weights[1, 2] = torch.eye(4).roll(2, dims=1)
    tokens = ("a", "b", "c", "d")
    assert Maps(weights, tokens, tokens).most_telling() == (1, 2)


def test_a_translators_answer_is_aligned_with_its_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_folder(random_decoder(replace(VANILLA, vocab_size=257, eos_ids=(256,))), tmp_path / "translator")
    maps = maps_of(folder, "Ein Hund läuft.")
    assert len(maps.columns) == 16 and len(maps.rows) == 128 and maps.weights.shape == (2, 4, 128, 16)
    main(["attention", "Ein Hund.", "--model", str(folder), "--out", str(tmp_path / "maps.png")])
    assert "2 layers of 4 heads" in capsys.readouterr().err
    with pytest.raises(StartupError, match="with an encoder"):
        looker(folder)


def test_layers_without_maps_are_refused(tmp_path: Path) -> None:
    folder = save_folder(
        random_decoder(replace(TINY, family="millrace-streams", attention=(Full(), Linear()))), tmp_path / "stream"
    )
    with pytest.raises(StartupError, match="no maps"):
        maps_of(folder, "a")


def test_an_alignment_of_two_texts_is_drawn_too(tmp_path: Path) -> None:
    draw(Maps(torch.rand(1, 2, 3, 5), ("x", "y", "z"), tuple("abcde")), 0, 1, tmp_path / "maps.png")
    assert (tmp_path / "maps.png").stat().st_size > 5000


def test_the_bundled_model_is_the_default() -> None:
    maps = maps_of(BUNDLED, "The animal didn't cross the street because it was too tired.")
    assert maps.rows == maps.columns and len(maps.rows) == maps.weights.shape[-1]
