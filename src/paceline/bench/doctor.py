"""Checks of a configuration before weights are read: vocabularies, memory, dtype, speed-up.

Shapes come from the models' configurations on torch's meta device. A drafter's speed-up is predicted
from the collection and the cost table. The cost table alone gives the tokens per round at which the
drafter breaks even.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

from paceline.assembly import steps_to_policy
from paceline.config import ModelSection
from paceline.contracts import NONE
from paceline.costs.pricing import round_seconds
from paceline.costs.table import CostTable
from paceline.drafting.catalog import CATALOG, check_settings, find_kind
from paceline.drafting.cross_vocabulary import CrossVocabularySettings, check_bridge
from paceline.errors import ArtefactError, PacelineError, StoreError
from paceline.models.encoder_decoder import auto_class_of
from paceline.models.forward_choice import forward_before_weights
from paceline.models.loading import DTYPES, load_config, load_tokenizer, resolve_device
from paceline.models.model_facts import (
    cache_bytes_per_position,
    context_length_of,
    count_packed_bytes,
)
from paceline.models.vocabulary import Vocabulary
from paceline.replay import price_rounds, rounds_of, stored_drafters
from paceline.rewards import request_seconds
from paceline.selection import PolicyIdentity, is_policy, load_policy
from paceline.selection.artefact import read_card
from paceline.store.collection import load_collection

if TYPE_CHECKING:
    from pydantic import BaseModel

    from paceline.config import Config
    from paceline.drafting.base import Drafter
    from paceline.models.vocabulary import Tokenizer


_CONTEXT: Final = 128  # cached tokens at which drafters break even


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """Sizes of a model as it would be loaded."""

    parameters: int
    dtype: str
    weight_bytes: int
    packed_bytes: int  # of the copy that the compiled forward makes
    cache_bytes_per_token: int
    context: int
    num_logits: int
    hidden_size: int
    forward: str | None  # such as `compiled (amx)`; None if placing the weights decides it
    why_not_compiled: str | None


@dataclass(slots=True)
class DrafterCheck:
    """One drafter: its sizes, its vocabulary compared with the target's, its predicted speed-up."""

    name: str
    kind: str
    facts: ModelFacts | None = None
    vocabulary: str = "not needed"
    predicted: str = "unknown"
    problem: str | None = None


@dataclass(slots=True)
class DoctorReport:
    """The output of `paceline doctor`. `problems` is empty if the configuration can run."""

    target: str
    device: str
    facts: ModelFacts
    num_tokens: int
    chat_template: bool
    drafters: list[DrafterCheck]
    notes: list[str] = field(default_factory=list)
    why_no_policy: str | None = None  # None if no obstacle was found

    def facts_by_name(self) -> dict[str, ModelFacts]:
        """Return the facts of the target and of each drafter that is a model, by name."""
        found = {d.name: d.facts for d in self.drafters if d.facts is not None}
        return {"target": self.facts, **found}

    def forwards(self) -> dict[str, str]:
        """Return the forwards that are known before weights are read, by the names of their models."""
        return {n: f.forward for n, f in self.facts_by_name().items() if f.forward is not None}

    @property
    def problems(self) -> list[str]:
        return [f"drafter '{d.name}': {d.problem}" for d in self.drafters if d.problem]


def doctor(config: Config) -> DoctorReport:
    """Check a configuration. Raises PacelineError if the target cannot be used."""
    device = resolve_device(config.target.device)
    facts = model_facts(config.target, "target", config.exact)
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
    predicted, notes = _predict_speedups(config)
    report.notes += notes
    for name in config.drafters:
        check = _check_drafter(config, name, tokenizer, facts)
        check.predicted = predicted.get(name, "unknown")
        report.drafters.append(check)
    if not report.problems:
        report.why_no_policy = _why_no_policy(config, vocabulary, report)
    return report


def _why_no_policy(config: Config, vocabulary: Vocabulary, report: DoctorReport) -> str | None:
    """Return the obstacle to the policy that is visible before weights are read, or None."""
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
            hidden_size=report.facts.hidden_size,
            drafters={NONE: card.drafters.get(NONE, ""), **lines},
        )
        costs = CostTable.load(path) if path.is_file() or config.selection.is_adaptive else None
        load_policy(folder, expect, costs, config.selection, report.forwards())
    except ArtefactError as error:
        return str(error)
    return None


def line_before_weights(kind: str, settings: BaseModel, recorded: str) -> str:
    """Return the recorded identity line of a drafter with its kind and length as now configured.

    A kind outside the catalogue keeps its recorded line.
    """
    if kind not in CATALOG:
        return recorded
    line = re.sub(r"\bkind=[^,]*", f"kind={kind}", recorded, count=1)
    length = getattr(settings, "num_draft_tokens", None)
    if length is None:
        return line
    return re.sub(r"\bnum_draft_tokens=\d+", f"num_draft_tokens={length}", line, count=1)


def model_facts(section: ModelSection, name: str = "target", exact: bool = False) -> ModelFacts:
    """Return the sizes of a model from its configuration file, and the forward that will run it.

    exact: require the compiled forward. Raises ModelError if a forward that is required does not fit.
    """
    raw = load_config(section)
    from_config: Any = auto_class_of(raw).from_config
    with torch.device("meta"):
        model = from_config(raw)
    parameters = sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())
    text = raw.get_text_config()
    stored = getattr(raw, "dtype", None) or torch.float32
    dtype = stored if section.dtype == "auto" else DTYPES[section.dtype]
    forward, why_not_compiled = _forward_of(model, section, name, exact, dtype)
    is_compiled = forward is not None and forward.startswith("compiled")
    return ModelFacts(
        parameters=parameters,
        dtype=str(dtype).removeprefix("torch."),
        weight_bytes=parameters * dtype.itemsize,
        packed_bytes=count_packed_bytes(model, section.weights) if is_compiled else 0,
        cache_bytes_per_token=cache_bytes_per_position(raw, dtype, is_compiled),
        context=context_length_of(text)[0],
        num_logits=text.vocab_size,
        hidden_size=text.hidden_size,
        forward=forward,
        why_not_compiled=why_not_compiled,
    )


def _forward_of(
    model: Any, section: ModelSection, name: str, exact: bool, dtype: torch.dtype
) -> tuple[str | None, str | None]:
    """Return the name of the forward that will run a model, and why it is not the compiled one."""
    if section.device_map is not None:
        return None, "'device_map' decides at load where the weights are"
    device = resolve_device(section.device)
    chosen = forward_before_weights(model, name, section, exact, dtype, device)
    return chosen.name, chosen.why_not_compiled


def _check_drafter(
    config: Config, name: str, tokenizer: Tokenizer, target: ModelFacts
) -> DrafterCheck:
    section = config.drafters[name]
    check = DrafterCheck(name, section.kind)
    try:
        kind = find_kind(name, section.kind)
        settings = check_settings(name, section)
        if isinstance(settings, ModelSection):  # the drafter is a model
            check.vocabulary = "unknown"
            check.facts = model_facts(settings, name)
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


def _predict_speedups(config: Config) -> tuple[dict[str, str], list[str]]:
    """Return each drafter's predicted speed-up as text, and notes on missing files."""
    try:
        costs = CostTable.load(config.paths.costs)
    except ArtefactError as error:
        return {}, [f"no prediction: {error}"]
    try:
        names = [NONE, *config.drafters]
        collection = load_collection(config.paths.store, stored_drafters(config), encoders=())
    except StoreError as error:
        break_even, notes = _break_even(config, costs)
        return break_even, [f"break-even only: {error}", *notes]
    try:
        prompts = price_rounds(collection.prompts, config, costs)
        total = {
            name: sum(
                request_seconds(
                    costs.seconds,
                    name,
                    len(p.prompt_tokens),
                    rounds_of(p, name),
                    proposed=None if name == NONE else p.replays[name].proposed,
                )
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
    """Return the tokens per round at which drafters break even, and a note per unpriced drafter."""
    found, notes = {}, []
    context = np.array(_CONTEXT)
    for name, section in config.drafters.items():
        length = getattr(check_settings(name, section), "num_draft_tokens", 0)
        try:
            plain = round_seconds(costs.seconds, NONE, np.array(0), context)
            drafting = round_seconds(costs.seconds, name, np.array(length), context)
        except ArtefactError as error:
            notes.append(f"drafter '{name}': {error}")
            continue
        found[name] = f"pays above {float(drafting / plain):.2f} tokens per round"
    return found, notes
