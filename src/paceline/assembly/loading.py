"""`load`: from a configuration, or models in memory, to a `Pace` with its policy, costs and log."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from paceline.assembly.pace import Pace
from paceline.assembly.parts import (
    build,
    build_from_objects,
    give_chances,
    policy_identity,
    untrained_lookup,
)
from paceline.config import DEFAULT_OBJECTIVE, Config, GenerationDefaults, ModelSection, load_config
from paceline.contracts import (
    AUTO,
    NONE,
    Completion,
    Context,
    Request,
    identity_of_arms,
    join_arm,
    split_arm,
)
from paceline.costs import RoundSeconds
from paceline.costs.table import TARGET, CostTable
from paceline.drafting.cascade.calibration import load_calibration
from paceline.errors import ArtefactError, ConfigError, shorten
from paceline.selection import (
    AdaptiveController,
    Arm,
    Guard,
    TablePrices,
    UntrainedController,
    is_policy,
    load_policy,
)
from paceline.selection.artefact import read_card
from paceline.selection.drift import RANGE_FILE, DriftAlarm, TrainingRange
from paceline.store import DecisionLog, LogHeader, is_collection

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from paceline.assembly.parts import DraftSpec, Parts
    from paceline.costs import Objective
    from paceline.engine.loop import OnComplete


def load(
    config: Config | Path | str | None = None,
    *,
    target: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    drafters: Mapping[str, DraftSpec] | None = None,
    policy: Path | str | None = None,
    with_policy: bool = True,
    generation_config: GenerationDefaults | None = None,
) -> Pace:
    """Return a target with its drafters, ready to generate.

    Give a configuration (a path to paceline.yaml, or a `Config`), or models in memory: `target`,
    `tokenizer` and `drafters`. policy: the folder of a learned policy, by default the configuration's,
    if there is one; a named policy that cannot be used raises ArtefactError. If the configuration's
    policy cannot be used (made for other models, without this machine's costs, damaged), `notes` says
    why. Without a policy, drafter `auto` is the first `suffix_lookup`, or one that is added, and `none`
    where it does not pay by the clock. With `with_policy=False`, requests must name a drafter.
    generation_config: `auto`, `no_beams` or `none`, overrides the configuration; see `Pace.request`.

    Raises ConfigError, ModelError or VocabularyError for parts that cannot be used, and ArtefactError
    if a drafter stops by expected gain and the configuration's cost table is missing.
    """
    if generation_config not in (None, *get_args(GenerationDefaults)):
        raise ConfigError(
            f"generation_config must be auto, no_beams or none; got {shorten(generation_config)}"
        )
    parts = _build(config, target, tokenizer, drafters or {})
    if generation_config is not None:
        update = {"generation_config": generation_config}
        parts.config = parts.config.model_copy(update=update)
    parts.notes += _give_prices(parts)
    from_file = target is None or policy is not None  # the costs, with the policy or configuration
    round_seconds, notes = find_round_seconds(parts) if from_file else (None, [])
    folder = Path(policy) if policy is not None else parts.config.paths.policy
    if not with_policy:
        log = open_log(parts)
        return Pace(parts, on_complete=log, notes=notes, round_seconds=round_seconds)
    if policy is None and target is not None:
        reason = "`paceline learn` makes one, and load(policy=...) takes it"
        return _without_policy(parts, reason, notes, round_seconds)
    if policy is None and not is_policy(folder):
        return _without_policy(parts, steps_to_policy(parts.config), notes, round_seconds)
    try:
        return _with_policy(parts, folder, notes, round_seconds)
    except ArtefactError as error:
        if policy is not None:
            raise
        return _without_policy(parts, str(error), notes, round_seconds)


def _build(
    config: Config | Path | str | None,
    target: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase | None,
    drafters: Mapping[str, DraftSpec],
) -> Parts:
    if (config is None) == (target is None):
        raise ConfigError("load takes a configuration, or target=, tokenizer= and drafters=")
    if target is not None:
        if tokenizer is None:
            raise ConfigError("load(target=...) also needs tokenizer=")
        placeholder = Config(target=ModelSection(model="in memory"))
        return build_from_objects(target, tokenizer, drafters, placeholder)
    assert config is not None
    return build(config if isinstance(config, Config) else load_config(config))


def find_round_seconds(
    parts: Parts, costs: CostTable | None = None
) -> tuple[RoundSeconds | None, list[str]]:
    """Return the prices of this machine's rounds, if there are any, and a note if they are unusable.

    costs: by default read from the configuration's path.
    """
    path = parts.config.paths.costs
    if parts.config.engine.max_rows == 1 or (costs is None and not path.is_file()):
        return None, []
    forwards = {TARGET: parts.forwards()[TARGET]}
    try:
        costs = costs or CostTable.load(path)
        costs.check((), target=parts.target.fingerprint(), forwards=forwards)
        return RoundSeconds(costs), []
    except ArtefactError as error:
        return None, [f"drafts are verified whole while several rows are in flight: {error}"]


def _without_policy(
    parts: Parts, reason: str, notes: Sequence[str], round_seconds: RoundSeconds | None
) -> Pace:
    """Assemble parts with a lookup as drafter `auto`. reason: there is no policy."""
    on_complete = open_log(parts)  # whose header names the configured drafters alone
    lookup = untrained_lookup(parts)
    controller = UntrainedController(lookup)
    note = (
        f"no policy is used: {reason}. Until then '{AUTO}' is drafter '{lookup}', and '{NONE}' where "
        "that does not pay by the clock; a learned policy chooses among all drafters"
    )
    return Pace(parts, controller.choose, controller, on_complete, [note, *notes], round_seconds)


def steps_to_policy(config: Config) -> str:
    """Return a message that says that there is no policy yet, with the commands that make one."""
    paths = config.paths
    steps = ["`paceline learn`"]
    if not paths.costs.is_file():
        steps.insert(0, "`paceline profile`")
    if not is_collection(paths.store):
        steps.insert(0, "`paceline collect PROMPTS`")
    return f"there is none in {paths.policy} yet; run {', then '.join(steps)}"


def _with_policy(
    parts: Parts, folder: Path, notes: Sequence[str], round_seconds: RoundSeconds | None
) -> Pace:
    """Assemble parts with a folder's policy. Raises ArtefactError if it does not fit them."""
    path = parts.config.paths.costs
    costs = CostTable.load(path) if path.is_file() else None
    loaded = load_policy(
        folder, policy_identity(parts), costs, parts.config.selection, parts.forwards()
    )
    has_range = (folder / RANGE_FILE).is_file()
    training_range = TrainingRange.load(folder) if has_range else None
    give_chances(parts, load_calibration(folder))
    controller = build_controller(parts, loaded.arms, objective=loaded.objective)
    on_complete = open_log(parts, training_range, read_card(folder).encoders)
    notes = [*loaded.notes, *notes]
    return Pace(parts, loaded.choose, controller, on_complete, notes, round_seconds)


def build_controller(
    parts: Parts,
    arms: Sequence[str],
    costs: CostTable | None = None,
    objective: Objective = DEFAULT_OBJECTIVE,
) -> AdaptiveController | None:
    """Return the controller of the configuration's `selection`, or None if it asks for none.

    arms: those of the policy; every drafter is an arm, too. costs: of this machine, by default read from
    the configuration's path. Raises ArtefactError if the costs of an arm are missing.
    """
    section = parts.config.selection
    if not section.is_adaptive:
        return None
    named = [split_arm(arm) for arm in dict.fromkeys([*parts.drafters, *arms])]
    lengths = {name: drafter.num_draft_tokens for name, drafter in parts.drafters.items()}
    try:
        costs = costs or CostTable.load(parts.config.paths.costs)
        costs.check(lengths, parts.identities(), parts.target.fingerprint(), parts.forwards())
    except ArtefactError as error:
        raise ArtefactError(
            f"the settings of 'selection' need this machine's costs: {error}, or remove 'selection'"
        ) from error
    return AdaptiveController(
        [
            Arm(name if k is None else join_arm(name, k), name, k or lengths[name])
            for name, k in named
        ],
        TablePrices(costs, lengths, objective),
        adapt=section.adapt != "off",
        guard=Guard() if section.guard else None,
        explore=section.explore,
    )


def _give_prices(parts: Parts) -> list[str]:
    """Give this machine's costs to the drafters that use them; return notes on those without.

    Raises ArtefactError if a drafter cannot draft without costs.
    """
    waiting = {n: d for n, d in parts.drafters.items() if d.wants_prices or d.takes_prices}
    if not waiting:
        return []
    needy = [name for name, drafter in waiting.items() if drafter.wants_prices]
    try:
        costs = CostTable.load(parts.config.paths.costs)
        lines = identity_of_arms({n: d.identity() for n, d in waiting.items()})
        costs.check(waiting, lines, forwards=parts.forwards())
    except ArtefactError as error:
        if needy:
            raise ArtefactError(
                f"drafter '{needy[0]}' stops by expected gain, which needs this machine's "
                f"costs: {error}, or set another 'stop'"
            ) from error
        return [f"{', '.join(waiting)}: draft by assumed prices: {error}"]
    for drafter in waiting.values():
        drafter.price(costs)
    return []


def open_log(
    parts: Parts,
    training_range: TrainingRange | None = None,
    encoders: Mapping[str, str] | None = None,
) -> OnComplete | None:
    """Return the function that logs completed requests and warns of drift, or None if there is
    neither a log in the configuration nor a training range.

    training_range: of the policy. encoders: the policy's, with their identity lines.
    """
    section = parts.config.log
    log = None
    if section.folder is not None:
        identity = policy_identity(parts)
        header = LogHeader(
            target=identity.target,
            tokenizer=identity.tokenizer,
            drafters=dict(identity.drafters),
            encoders=dict(encoders or {}),
            tokens=section.tokens,
        )
        log = DecisionLog(section.folder, header)
    alarm = None if training_range is None else DriftAlarm(training_range)
    if log is None and alarm is None:
        return None

    def on_complete(request: Request, completion: Completion, context: Context | None) -> None:
        if log is not None:
            rows = None if context is None else context.rows_in_flight
            log.write(request, completion, completion.decision.features, rows)
        if alarm is not None and (raised := alarm.observe_completion(completion)) is not None:
            warnings.warn(str(raised), stacklevel=2)

    return on_complete
