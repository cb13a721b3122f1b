"""Encoders: their inputs, their independence of anything else, and the identity of sentence encoders."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from transformers import AutoModel, BertConfig, BertModel

from paceline.config import Config, ModelSection, SelectionSection
from paceline.contracts import Context, SamplingParams
from paceline.errors import ConfigError, ModelError, RequestError
from paceline.selection.encoders import (
    HashedNgrams,
    Sentence,
    build_encoder,
    kept_encoders,
    spans_of,
)
from paceline.selection.features import feature_vector
from paceline.testing.tokenizers import byte_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable

D = 5
WIDTH = 16


def context(tokens: list[int], text: str | None = None) -> Context:
    mean, last = np.arange(D, dtype=np.float32), -np.arange(D, dtype=np.float32)
    found = Context(tokens, mean, last, SamplingParams(temperature=0.5), rows_in_flight=3)
    return found if text is None else replace(found, text=lambda: text)


@pytest.fixture
def sentence_folder(tmp_path: Path) -> Callable[..., Path]:
    """Save a tiny encoder as transformers does, or with the files that sentence-transformers adds."""

    def save(name: str, pooling: dict[str, object] | None = None, *more: str) -> Path:
        folder = tmp_path / name
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=260, hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=8, max_position_embeddings=32,
        )  # fmt: skip
        BertModel(config).save_pretrained(folder)
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = None  # sentence-transformers would apply it
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(258)
        tokenizer.save_pretrained(folder)
        if pooling is not None:
            modules = [("", "Transformer"), ("1_Pooling", "Pooling"), *((m, m) for m in more)]
            listed = [
                {
                    "idx": i,
                    "name": str(i),
                    "path": path,
                    "type": f"sentence_transformers.models.{kind}",
                }
                for i, (path, kind) in enumerate(modules)
            ]
            (folder / "modules.json").write_text(json.dumps(listed))
            for path, _ in modules[1:]:
                (folder / path).mkdir()
            config = {"word_embedding_dimension": WIDTH} | pooling
            (folder / "1_Pooling" / "config.json").write_text(json.dumps(config))
        return folder

    return save


def states(folder: Path, text: str) -> np.ndarray:
    """[n, D] as transformers itself gives them."""
    model = AutoModel.from_pretrained(folder).eval()
    ids = torch.tensor([byte_tokenizer()(text)["input_ids"]])
    with torch.no_grad():
        return model(input_ids=ids).last_hidden_state[0].numpy()


def test_the_default_is_hidden_states_then_statistics() -> None:
    encode = build_encoder(D)
    seen = context([1, 2, 1, 2, 9])
    assert np.array_equal(encode(seen), feature_vector(seen))
    assert encode.spans == {"target_hidden": slice(0, 2 * D), "text_stats": slice(2 * D, 2 * D + 6)}
    assert encode.num_features == len(encode(seen))
    assert list(encode.identities()) == ["target_hidden", "text_stats"]


def test_the_order_is_the_configurations() -> None:
    section = SelectionSection(encoders=("text_stats", "hashed_ngrams", "target_hidden"))
    encode = build_encoder(D, section)
    found = encode(context([4, 4, 5]))
    parts = {name: found[span] for name, span in encode.spans.items()}
    assert list(parts) == list(section.encoders)
    assert np.array_equal(parts["target_hidden"], feature_vector(context([4, 4, 5]))[: 2 * D])
    assert np.array_equal(parts["hashed_ngrams"], HashedNgrams().encode(context([4, 4, 5])))


def test_spans_are_side_by_side() -> None:
    assert spans_of({"a": 2, "b": 0, "c": 3}) == {
        "a": slice(0, 2), "b": slice(2, 2), "c": slice(2, 5)
    }  # fmt: skip


def test_hashed_ngrams_tell_texts_apart_by_what_they_hold() -> None:
    encode = HashedNgrams().encode
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, 50_000, 60).tolist() for _ in range(40)]
    vectors = np.stack([encode(context(text)) for text in texts])
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, rtol=1e-5)
    likeness = vectors @ vectors.T
    others = likeness[~np.eye(len(texts), dtype=bool)]
    # independent texts have nothing in common on average; the spread is that of 256 places
    assert abs(others.mean()) < 0.02
    assert others.std() < 0.1
    half_shared = [*texts[0][:30], *texts[1][30:]]
    assert 0.3 < float(vectors[0] @ encode(context(half_shared))) < 0.7


def test_hashed_ngrams_see_order_and_ids_but_no_place() -> None:
    encode = HashedNgrams().encode
    assert not np.array_equal(encode(context([1, 2, 3])), encode(context([3, 2, 1])))
    assert not np.array_equal(encode(context([1, 2, 3])), encode(context([1, 2, 4])))
    # a pair is no token: its two halves do not collide with a single id
    pair = encode(context([0, 7]))
    assert np.count_nonzero(pair) >= 2
    one = encode(context([7]))
    assert np.count_nonzero(one) == 1 and abs(one).max() == 1.0
    again = encode(replace(context([1, 2, 3]), rows_in_flight=9, request_id="x"))
    assert np.array_equal(encode(context([1, 2, 3])), again)


def test_hashed_ngrams_are_the_same_everywhere() -> None:
    """A policy learned on one machine is served on another."""
    found = HashedNgrams().encode(context([1, 2, 3, 2, 1]))
    places = np.flatnonzero(found)
    assert [(int(i), round(float(found[i]), 4)) for i in places] == EXPECTED


EXPECTED = [
    (14, -0.3333),
    (30, -0.3333),
    (41, 0.3333),
    (86, 0.4714),
    (134, -0.3333),
    (189, -0.3333),
    (219, -0.4714),
]


def vector(model: Sentence, text: str) -> np.ndarray:
    return model.encode(context([1], text))


def test_a_plain_encoder_gives_the_mean_of_its_states(
    sentence_folder: Callable[..., Path],
) -> None:
    folder = sentence_folder("plain")
    model = Sentence(str(folder))
    assert model.num_features == WIDTH
    np.testing.assert_allclose(
        vector(model, "hello there"), states(folder, "hello there").mean(axis=0), atol=1e-6
    )
    assert vector(model, "hello there").dtype == np.float32
    long = "x" * 500
    assert np.isfinite(vector(model, long)).all()
    assert np.array_equal(vector(model, long), vector(model, long + "y"))  # its beginning


def test_a_models_own_limit_of_tokens_holds(sentence_folder: Callable[..., Path]) -> None:
    folder = sentence_folder("short", {"pooling_mode": "mean"})
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 3}')
    short = vector(Sentence(str(folder)), "hello there")
    np.testing.assert_allclose(short, states(folder, "hel").mean(axis=0), atol=1e-6)


@pytest.mark.parametrize(
    ("pooling", "by_first"),
    [
        ({"pooling_mode": "cls"}, True),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, True),
        ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, False),
    ],
)
def test_a_saved_sentence_transformer_is_read(
    sentence_folder: Callable[..., Path], pooling: dict[str, object], by_first: bool
) -> None:
    folder = sentence_folder("saved", pooling, "Normalize")
    own = states(folder, "hello")
    expected = own[0] if by_first else own.mean(axis=0)
    found = vector(Sentence(str(folder)), "hello")
    np.testing.assert_allclose(found, expected / np.linalg.norm(expected), atol=1e-6)


def test_a_folder_with_an_unknown_module_is_refused(
    sentence_folder: Callable[..., Path],
) -> None:
    with pytest.raises(ModelError, match="no usable sentence encoder") as caught:
        Sentence(str(sentence_folder("odd", {"pooling_mode": "mean"}, "NoSuchModule")))
    assert "\n" not in str(caught.value)


def test_without_the_package_the_line_that_installs_it_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ConfigError, match=r"pip install 'paceline\[sentence\]'"):
        Sentence("anything")


def test_the_sentence_encoder_reads_the_text_and_names_its_weights(
    sentence_folder: Callable[..., Path],
) -> None:
    folder = sentence_folder("a")
    section = SelectionSection(encoders=("sentence",), sentence_model=str(folder))
    encode = build_encoder(D, section)
    assert encode.num_features == WIDTH
    one, other = encode(context([1], "one text")), encode(context([1], "another"))
    assert not np.allclose(one, other)
    with pytest.raises(RequestError, match="'sentence' needs the prompt's text"):
        encode(context([1]))
    before = encode.identities()["sentence"]
    assert before == build_encoder(D, section).identities()["sentence"]
    model = BertModel.from_pretrained(folder)
    with torch.no_grad():
        model.embeddings.word_embeddings.weight.add_(0.01)
    model.save_pretrained(folder)
    assert before != build_encoder(D, section).identities()["sentence"]


def test_a_collection_keeps_what_runs_no_model_and_a_configured_sentence_encoder(
    sentence_folder: Callable[..., Path],
) -> None:
    free = ["target_hidden", "text_stats", "hashed_ngrams"]
    assert list(kept_encoders(SelectionSection(), D).identities()) == free
    section = SelectionSection(sentence_model=str(sentence_folder("a")))
    assert list(kept_encoders(section, D).identities()) == [*free, "sentence"]


def test_mistakes_are_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no encoder 'magic'; there are: target_hidden"):
        build_encoder(D, names=["magic"])
    with pytest.raises(ConfigError, match=r"'sentence' needs 'selection.sentence_model'"):
        build_encoder(D, names=["sentence"])
    with pytest.raises(ModelError, match="no usable sentence encoder") as caught:
        Sentence(str(tmp_path / "nowhere" / "at" / "all"))
    assert "\n" not in str(caught.value)
    with pytest.raises(RequestError, match="prompt is empty"):
        build_encoder(D)(context([]))
    for wrong in ({"encoders": ()}, {"encoders": ("text_stats",) * 2}, {"encoders": ("sentence",)}):
        with pytest.raises(ValueError, match=r"encoder"):
            Config(target=ModelSection(model="t"), selection=SelectionSection(**wrong))
