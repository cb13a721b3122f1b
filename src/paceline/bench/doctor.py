"""Checks a configuration before weights are read: vocabularies, memory, dtype, predicted pay.

Shapes come from the models' configurations on torch's meta device. What a drafter should pay
comes from the collection and the cost table if both are there; from the cost table alone follows
how many tokens a round must emit to break even.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM

from paceline.assembly import steps_to_policy
from paceline.config import ModelSection
from paceline.contracts import NONE
from paceline.costs.table import CostTable
from paceline.drafting.catalog import CATALOG, check_settings, find_kind
from paceline.drafting.cross_vocabulary import CrossVocabularySettings, check_bridge
from paceline.errors import ArtefactError, PacelineError, StoreError
from paceline.models.loading import DTYPES, load_config, load_tokenizer, resolve_device
from paceline.models.model_facts import cache_bytes_per_position
from paceline.models.vocabulary import Vocabulary
from paceline.replay import price_stops, rounds_of
from paceline.rewards import request_seconds
from paceline.selection import PolicyIdentity, is_policy, load_policy
from paceline.selection.artefact import read_card
from paceline.store.collection import load_collection

if TYPE_CHECKING:
    from pydantic import BaseModel

    from paceline.config import Config
    from paceline.drafting.base import Drafter
    from paceline.models.vocabulary import Tokenizer


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """Size of a model as it would be loaded."""

    parameters: int
    dtype: str
    weight_bytes: int
    cache_bytes_per_token: int
    context: int
    num_logits: int
    hidden_size: int


@dataclass(slots=True)
class DrafterCheck:
    """One drafter: its facts, its vocabulary against the target's, and what it should pay."""

    name: str
    kind: str
    facts: ModelFacts | None = None
    vocabulary: str = "not needed"
    predicted: str = "unknown"
    problem: str | None = None


@dataclass(slots=True)
class DoctorReport:
    """Everything `paceline doctor` prints. `problems` is empty if the configuration can run."""

    target: str
    device: str
    facts: ModelFacts
    num_tokens: int
    chat_template: bool
    drafters: list[DrafterCheck]
    notes: list[str] = field(default_factory=list)
    why_not_auto: str | None = None  # None if no obstacle was found

    @property
    def problems(self) -> list[str]:
        return [f"drafter '{d.name}': {d.problem}" for d in self.drafters if d.problem]


def doctor(config: Config) -> DoctorReport:
    """Check a configuration. Raises PacelineError if the target itself cannot be used."""
    device = resolve_device(config.target.device)
    facts = model_facts(config.target)
    tokenizer = load_tokenizer(config.target)
    vocabulary = Vocabulary.of(tokenizer)
    report = DoctorReport(
        target=config.target.model,
        device=str(device),
        facts=facts,
        num_tokens=vocabulary.num_tokens,
        chat_template=getattr(tokenizer, "chat_template", None) is not None,
        drafters=[],
    )
    if facts.num_logits < vocabulary.num_tokens:
        report.notes.append(
            f"the tokenizer has {vocabulary.num_tokens} tokens, the head {facts.num_logits}"
        )
    pay, notes = _predictions(config)
    report.notes += notes
    for name in config.drafters:
        report.drafters.append(_check_drafter(config, name, tokenizer, facts, pay))
    if not report.problems:
        report.why_not_auto = _why_not_auto(config, vocabulary, facts)
    return report


def _why_not_auto(config: Config, vocabulary: Vocabulary, facts: ModelFacts) -> str | None:
    """Return why no policy can choose, as far as that shows before weights are read; None if one can."""
    folder, path = config.paths.policy, config.paths.costs
    if not is_policy(folder):
        return steps_to_policy(config)
    try:
        card = read_card(folder)
        lines = {
            name: line_before_weights(
                section.kind, check_settings(name, section), card.drafters.get(name, "")
            )
            for name, section in config.drafters.items()
        }
        expect = PolicyIdentity(
            target=card.target,
            tokenizer=vocabulary.hash(),
            hidden_size=facts.hidden_size,
            drafters={NONE: card.drafters.get(NONE, ""), **lines},
        )
        costs = CostTable.load(path) if path.is_file() or config.selection.is_adaptive else None
        load_policy(folder, expect, costs, selection=config.selection)
    except ArtefactError as error:
        return str(error)
    return None


def line_before_weights(kind: str, settings: BaseModel, recorded: str) -> str:
    """Return a drafter's identity line from its settings, with the recorded line for the rest.

    The line of a kind from outside the catalogue is unknown here, so the recorded one is returned.
    """
    if kind not in CATALOG:
        return recorded
    line = re.sub(r"\bkind=[^,]*", f"kind={kind}", recorded, count=1)
    length = getattr(settings, "num_draft_tokens", None)
    if length is None:
        return line
    return re.sub(r"\bnum_draft_tokens=\d+", f"num_draft_tokens={length}", line, count=1)


def model_facts(section: ModelSection) -> ModelFacts:
    """Sizes from the configuration file alone."""
    raw = load_config(section)
    from_config: Any = AutoModelForCausalLM.from_config
    with torch.device("meta"):
        model = from_config(raw)
    parameters = sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())
    text = raw.get_text_config()
    stored = getattr(raw, "dtype", None) or torch.float32
    dtype = stored if section.dtype == "auto" else DTYPES[section.dtype]
    return ModelFacts(
        parameters=parameters,
        dtype=str(dtype).removeprefix("torch."),
        weight_bytes=parameters * dtype.itemsize,
        cache_bytes_per_token=cache_bytes_per_position(raw, dtype),
        context=text.max_position_embeddings,
        num_logits=text.vocab_size,
        hidden_size=text.hidden_size,
    )


def _check_drafter(
    config: Config, name: str, tokenizer: Tokenizer, target: ModelFacts, pay: dict[str, str]
) -> DrafterCheck:
    section = config.drafters[name]
    check = DrafterCheck(name, section.kind, predicted=pay.get(name, "unknown"))
    try:
        kind = find_kind(name, section.kind)
        settings = check_settings(name, section)
        if isinstance(settings, ModelSection):  # the drafter is a model
            check.vocabulary = "unknown"
            check.facts = model_facts(settings)
            _check_vocabulary(check, kind, settings, tokenizer, target)
        if check.problem is None:
            kind.check(name, settings, Vocabulary.of(tokenizer))
    except PacelineError as error:
        check.problem = str(error)
    return check


def _check_vocabulary(
    check: DrafterCheck,
    kind: type[Drafter],
    settings: ModelSection,
    tokenizer: Tokenizer,
    target: ModelFacts,
) -> None:
    own = load_tokenizer(settings)
    difference = Vocabulary.of(tokenizer).difference(Vocabulary.of(own))
    if isinstance(settings, CrossVocabularySettings):
        bridge = check_bridge(check.name, settings, tokenizer, own)
        check.vocabulary = bridge.why
    elif difference is not None:
        check.vocabulary = "different"
        if kind.needs.same_vocabulary:
            check.problem = f"another vocabulary than the target's: {difference}"
    elif check.facts is not None and check.facts.num_logits != target.num_logits:
        check.vocabulary = "same ids, padded to another size"
    else:
        check.vocabulary = "same ids"


def _predictions(config: Config) -> tuple[dict[str, str], list[str]]:
    """(what each drafter should pay, what is missing for a better answer)."""
    try:
        costs = CostTable.load(config.paths.costs)
    except ArtefactError as error:
        return {}, [f"no prediction: {error}"]
    try:
        names = [NONE, *config.drafters]
        collection = load_collection(config.paths.store, names, encoders=())
    except StoreError as error:
        pay, unknown = _break_even(config, costs)
        return pay, [f"break-even only: {error}", *unknown]
    try:
        prompts = price_stops(collection.prompts, config, costs)
        total = {
            name: sum(
                request_seconds(costs.seconds, name, len(p.prompt_tokens), rounds_of(p, name))
                for p in prompts
            )
            for name in names
        }
    except ArtefactError as error:
        return {}, [f"no prediction: {error}"]
    return {
        name: f"{total[NONE] / total[name]:.2f}x none on {len(prompts)} prompts"
        for name in config.drafters
    }, []


def _break_even(config: Config, costs: CostTable) -> tuple[dict[str, str], list[str]]:
    """Tokens a round must emit for a drafter to be no slower than plain decoding; what is not known."""
    result, unknown = {}, []
    for name, section in config.drafters.items():
        length = getattr(check_settings(name, section), "num_draft_tokens", 0)
        try:
            overhead = costs.seconds("engine", "round", 1)
            plain = costs.seconds("target", "forward", 1, context=128) + overhead
            verify = costs.seconds("target", "forward", 1 + length, context=128) + overhead
            drafting = costs.seconds(name, "propose", length, context=128)
        except ArtefactError as error:
            unknown.append(f"drafter '{name}': {error}")
            continue
        result[name] = f"pays above {(verify + drafting) / plain:.2f} tokens a round"
    return result, unknown
