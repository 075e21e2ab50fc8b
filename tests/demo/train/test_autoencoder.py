from pathlib import Path

import pytest
import torch

from demo.art import Art
from demo.train import autoencoder
from demo.train.loop import Schedule

WIDTHS = (8, 8, 8)
SHORT = Schedule(steps=2, batch=4, rate=1e-3, warmup=1)


def test_trained_autoencoder_has_latents_of_unit_spread(art: Art, tmp_path: Path) -> None:
    model = autoencoder.train(art, tmp_path, schedule=SHORT, widths=WIDTHS)
    latents = autoencoder.latents(model, art)
    assert latents.mean.shape == (len(art), 2, 4, 8, 8)
    assert latents.mean[:, 0].std().item() == pytest.approx(1, abs=0.01)
    assert (tmp_path / "grids" / "autoencoder-2.png").is_file()


def test_a_warm_start_begins_at_the_weights_given(art: Art, tmp_path: Path) -> None:
    given = autoencoder.build(WIDTHS)
    given.save_pretrained(tmp_path / "pipeline" / "vae")
    still = Schedule(steps=1, batch=2, rate=0.0, warmup=1, weight_decay=0.0)
    model = autoencoder.train(art, tmp_path, schedule=still, widths=WIDTHS, warm_start=tmp_path / "pipeline")
    assert all(torch.equal(value, given.state_dict()[key]) for key, value in model.state_dict().items())


def test_the_loss_sees_edges() -> None:
    wanted = torch.zeros(1, 3, 32, 32)
    flat, striped = wanted + 0.1, wanted + 0.1
    striped[..., ::2] *= -1
    assert autoencoder.reconstruction_loss(wanted, wanted) == 0
    assert autoencoder.reconstruction_loss(striped, wanted) > autoencoder.reconstruction_loss(flat, wanted)
