"""Every tiny model with an encoder runs packed, row by row, as transformers runs it."""

from __future__ import annotations

import pytest
import torch

from paceline.models.language_model import LanguageModel
from paceline.models.self_checks import check_packed_forward
from paceline.testing.tiny_models import ENCODER_DECODERS, tiny_model


@pytest.mark.parametrize("architecture", ENCODER_DECODERS)
def test_the_packed_forward_is_that_of_transformers(architecture: str) -> None:
    model = LanguageModel(tiny_model(architecture), architecture, "transformers")

    check_packed_forward(model)
    assert model.encoder is not None and model.encoder.start == 0


@pytest.mark.parametrize("architecture", ENCODER_DECODERS)
def test_tiny_models_are_random_everywhere_and_have_no_stop_token(architecture: str) -> None:
    model = tiny_model(architecture)

    assert model.config.eos_token_id is None
    for name, parameter in model.named_parameters():
        assert parameter.detach().std() > 0.05, name
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == (architecture != "mt5")
    same = tiny_model(architecture).state_dict()
    assert all(torch.equal(same[name], tensor) for name, tensor in model.state_dict().items())
