"""`distill`, `improve` and `--suggest` with a target that has an encoder."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from support.distillation import distill_settings, tiny_tokenizer, write_prompts
from support.encoder_decoders import START, TINY_T5, tiny_encoder_decoder
from support.logged import answer, header_of, logged, random_prompts
from support.training import TINY
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    LlamaForCausalLM,
    T5ForConditionalGeneration,
)

from paceline.assembly import Pace, build_from_objects
from paceline.config import Config, ModelSection
from paceline.distillation import distill
from paceline.distillation.improve import DrafterFolder, improve
from paceline.distillation.improve_settings import ImproveSettings
from paceline.distillation.model_folders import load_float32
from paceline.distillation.preparation import PairEncoder
from paceline.distillation.replays import replay_validation
from paceline.distillation.student import build_student
from paceline.distillation.texts import pair_example, read_pairs
from paceline.errors import ConfigError
from paceline.models.language_model import LanguageModel
from paceline.models.self_checks import check_packed_forward
from paceline.models.vocabulary import Vocabulary
from paceline.store import TrainedOn
from paceline.verbs import distillation as verbs

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel


def pace_of(target: PreTrainedModel, **drafters: PreTrainedModel) -> Pace:
    config = Config(target=ModelSection(model="unused"))
    return Pace(build_from_objects(target, tiny_tokenizer(), drafters, config))


@pytest.fixture
def pace() -> Pace:
    return pace_of(tiny_encoder_decoder())


def write_references(path: Path, count: int) -> Path:
    """Write a prompt file whose rows have references."""
    rows = [
        json.loads(line)
        for line in write_prompts(path, "pears", count).read_text().split("\n")
        if line
    ]
    lines = [json.dumps({**row, "reference": row["prompt"][:5]}) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("teacher", ["cached", "live"])
def test_a_t5_drafter_is_written_and_drafts_what_was_measured(
    teacher: str, pace: Pace, tmp_path: Path
) -> None:
    apples = write_prompts(tmp_path / "apples.jsonl", "apples", 40)
    pears = write_references(tmp_path / "pears.jsonl", 40)
    settings = distill_settings(
        tmp_path, loss="kl", teacher=teacher, teacher_top_k=8, events=None, dtype="float32",
        shape=TINY_T5.model_dump(), pretrain_text=[str(pears)], pretrain_tokens=200,
        samplings=[{"temperature": 0.0}, {"temperature": 0.8}],
    )  # fmt: skip
    out = tmp_path / "draft"
    report = distill(pace, [apples], out, settings)

    model = AutoModelForSeq2SeqLM.from_pretrained(out)
    assert type(model) is T5ForConditionalGeneration
    assert model.generation_config.decoder_start_token_id == START
    assert model.generation_config.eos_token_id == 0
    check_packed_forward(LanguageModel(model, "draft"))
    assert Vocabulary.of(AutoTokenizer.from_pretrained(out)) == pace.parts.vocabulary
    assert TrainedOn.load(out)
    assert report.measures.mean.acceptance > 0
    facts = json.loads((out / "training.json").read_text())
    assert facts["settings"]["prompt_weight"] == 0.0
    assert facts["history"][0]["phase"] == "pretrain"
    card = (out / "README.md").read_text()
    for word in (
        "pipeline_tag: text2text-generation", "2 encoder and 1 decoder layers", "temperature 0.8",
    ):  # fmt: skip
        assert word in card, word

    # in the engine, it drafts as its measures say, and the text is the target's own
    both = pace_of(tiny_encoder_decoder(), draft=model)
    for prompt in ("w3 w5 w7", "w11 w2"):
        plain = both.complete(prompt, max_new_tokens=8, drafter="none", generation_config="none")
        drafted = both.complete(prompt, max_new_tokens=8, drafter="draft", generation_config="none")
        assert drafted.token_ids == plain.token_ids
        example = pair_example("p", "d", both.encode(prompt), plain.token_ids)
        [found] = replay_validation(load_float32(out), [example], None)
        scores = both.parts.drafters["draft"].would_accept(both.encode(prompt), plain.token_ids)
        assert scores.scores.match.tolist() == found.matches.tolist()


def test_a_causal_drafter_reads_prompt_and_answer_as_one_text(pace: Pace, tmp_path: Path) -> None:
    apples = write_prompts(tmp_path / "apples.jsonl", "apples", 40)
    settings = distill_settings(
        tmp_path, loss="kl", teacher_top_k=8, events=None, architecture="llama",
        shape=TINY.model_dump(),
    )  # fmt: skip
    distill(pace, [apples], tmp_path / "draft", settings)
    model = load_float32(tmp_path / "draft")
    assert type(model) is LlamaForCausalLM
    card = (tmp_path / "draft" / "README.md").read_text()
    assert "pipeline_tag: text-generation" in card
    both = pace_of(tiny_encoder_decoder(), draft=model)
    plain, drafted = (
        both.complete("w3 w5", max_new_tokens=8, drafter=name, generation_config="none").token_ids
        for name in ("none", "draft")
    )
    assert drafted == plain


def test_the_verb_measures_prices_of_a_student_with_an_encoder(pace: Pace, tmp_path: Path) -> None:
    apples = write_prompts(tmp_path / "apples.jsonl", "apples", 40)
    settings = distill_settings(tmp_path, events=None, target_layers=[1], target_encoder_layers=[0])
    report = verbs.distill(pace, [apples], tmp_path / "draft", settings)
    assert report.measures.is_priced
    assert (
        "Started as layers 1 and of the encoder 0" in (tmp_path / "draft" / "README.md").read_text()
    )


def test_shapes_are_not_suggested_for_a_target_with_an_encoder(
    pace: Pace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verbs, "build", lambda config: pace.parts)
    with pytest.raises(ConfigError, match=r"T5ForConditionalGeneration has an encoder.*'shape'"):
        verbs.suggest_shapes(pace.parts.config)


def test_plain_text_teaches_no_student_with_an_encoder(pace: Pace, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("w1 w2 w3", encoding="utf-8")
    apples = write_prompts(tmp_path / "apples.jsonl", "apples", 40)
    settings = distill_settings(
        tmp_path, pretrain_text=[str(text)], pretrain_tokens=50, events=None
    )
    with pytest.raises(ConfigError, match=r"text.txt: has no prompts with references"):
        distill(pace, [apples], tmp_path / "draft", settings)


def test_pairs_are_prompts_as_the_target_reads_them_and_references_with_an_end(
    pace: Pace, tmp_path: Path
) -> None:
    path = write_references(tmp_path / "pears.jsonl", 30)
    prompts = [json.loads(line)["prompt"] for line in path.read_text().splitlines()]
    encode = PairEncoder(pace.parts.tokenizer, pace.stop_token_ids())
    found = read_pairs([path], encode, 64, 10_000, 0, prompts[:20])
    assert len(found) == 20
    for example in found:
        message = pace.parts.tokenizer.decode(example.tokens[: example.num_prompt])
        assert message in prompts[:20]
        assert example.tokens[-1] == 0
    assert len(read_pairs([path], encode, 64, 30, 0, prompts)) < 6
    with pytest.raises(ConfigError, match=r"none of the 30 prompts .* is shorter"):
        read_pairs([path], encode, 3, 10_000, 0, prompts)


def test_a_drafter_with_an_encoder_is_improved_on_logged_requests(
    pace: Pace, tmp_path: Path
) -> None:
    folder = tmp_path / "mine"
    torch.set_num_threads(1)
    student = build_student(tiny_encoder_decoder(), TINY_T5, "random", 0, "t5")
    student.to(torch.bfloat16).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    header = header_of(pace)
    # the answers have the same words, so that a short training learns them
    same = answer([9], length=6)
    decisions = [logged(header, prompt, same) for prompt in random_prompts(80)]
    settings = ImproveSettings(
        learning_rate=2e-2, epochs=6.0, batch_tokens=256, least_held_out=8, teacher_top_k=4,
        validate_every=3.0,
    )  # fmt: skip
    report = improve(pace, DrafterFolder("mine", folder, 3), decisions, settings)
    assert report.is_adopted
    model = AutoModelForSeq2SeqLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    check_packed_forward(LanguageModel(model.float(), "draft"))
