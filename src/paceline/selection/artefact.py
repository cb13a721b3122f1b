"""The policy on disk: a folder of `policy.safetensors` and `policy.json`.

The JSON file names everything that the policy was learned with. Loading refuses whatever would make
its choices meaningless (another target, tokenizer, set of drafters or encoder) and says what was
expected and found. A changed cost table is no error: a portable policy is priced with the new one,
other policies get a note. The JSON file is written last and holds the checksum of the weights, so
files that do not belong together are recognised.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from paceline.config import DEFAULT_OBJECTIVE, explain
from paceline.contracts import NONE, TEXT_ONLY, split_arm
from paceline.costs.pricing import ArmPricer
from paceline.errors import ArtefactError
from paceline.files import write_atomically
from paceline.selection.choosers import CHOOSERS, PortableChooser
from paceline.selection.encoders import FeatureEncoder, build_encoder
from paceline.selection.features import feature_vector
from paceline.selection.policies import Policy

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from paceline.config import SelectionSection
    from paceline.costs import CostTable, Objective
    from paceline.selection.choosers import Chooser

FORMAT_VERSION: Final = 5
WEIGHTS_FILE: Final = "policy.safetensors"
CARD_FILE: Final = "policy.json"
_AGAIN: Final = "run `paceline learn`"


@dataclass(frozen=True, slots=True)
class PolicyIdentity:
    """The models and drafters that a policy was learned for.

    `drafters` maps each drafter, with `none`, to its identity line. `encoders` does so for the
    encoders of its features, in their order; empty means the default encoders.
    """

    target: str  # fingerprint of the target
    tokenizer: str  # hash of the token-to-id map
    hidden_size: int  # D
    drafters: Mapping[str, str]
    encoders: Mapping[str, str] = field(default_factory=dict)


class RewardCard(BaseModel):
    """The policy's reward; `alpha` and `metric` are None for a kind without them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: str
    version: int
    alpha: float | None = None
    metric: str | None = None


class PolicyArtefact(BaseModel):
    """The content of policy.json. `arms` are in the order of the chooser's columns.

    `chooser` is the kind of chooser, `facts` are its learned values that are no arrays. `costs` is
    the hash of the cost table that priced the rewards.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: int = FORMAT_VERSION
    target: str
    tokenizer: str
    hidden_size: int
    drafters: dict[str, str]
    encoders: dict[str, str] = Field(min_length=1)
    arms: list[str]
    chooser: str
    facts: dict[str, Any] = {}
    objective: Literal["latency", "throughput"] | float = DEFAULT_OBJECTIVE
    reward: RewardCard
    costs: str
    learner: dict[str, Any]
    training: dict[str, Any]
    weights_sha256: str = ""


def save_policy(folder: Path, chooser: Chooser, artefact: PolicyArtefact) -> PolicyArtefact:
    """Write both files atomically; return the card as written, with the chooser's kind, arms, facts.

    Raises ArtefactError if a weight is not finite or the folder cannot be written.
    """
    arrays = chooser.arrays()
    if not all(np.isfinite(array).all() for array in arrays.values()):
        raise ArtefactError(f"{folder}: a weight is not a finite number; {_AGAIN}")
    weights = _weights(chooser)
    learned = {"chooser": chooser.kind, "arms": list(chooser.arms), "facts": chooser.facts()}
    card = artefact.model_copy(update={**learned, "weights_sha256": _checksum(weights)})
    try:
        write_atomically(Path(folder) / WEIGHTS_FILE, weights)
        write_atomically(Path(folder) / CARD_FILE, card.model_dump_json(indent=1).encode())
    except OSError as error:
        raise ArtefactError(f"{folder}: cannot be written ({error})") from error
    return card


def load_policy(
    folder: Path,
    expect: PolicyIdentity,
    costs: CostTable | None = None,
    selection: SelectionSection | None = None,
    forwards: Mapping[str, str] | None = None,
) -> Policy:
    """Load the policy in a folder. Raises ArtefactError unless it was made for `expect`.

    costs: this machine's prices, which a portable policy needs. selection: the section with the
    models of the policy's encoders. forwards: those that the prices must have been measured with, see
    `CostTable.check`.
    """
    card = read_card(folder)
    _check_identity(card, expect, str(folder))
    encode = build_encoder(card.hidden_size, selection, list(card.encoders))
    for name, line in encode.identities().items():
        _check_equal(f"encoder '{name}'", line, card.encoders[name], str(folder))
    chooser = _chooser(card, Path(folder) / WEIGHTS_FILE)
    notes = []
    if isinstance(chooser, PortableChooser):
        if costs is None:
            raise ArtefactError(
                f"{folder}: the policy is priced with this machine's cost table, and there is "
                "none; run `paceline profile`"
            )
        costs.check(expect.drafters, expect.drafters, expect.target, forwards)
        chooser.pricer = ArmPricer(costs, chooser.arms)
    elif costs is not None and costs.hash() != card.costs:
        notes.append(
            "the policy was learned with another cost table than this machine's; `paceline learn` "
            "fits it to this one"
        )
    return policy_of(
        chooser,
        num_features=encode.num_features,
        objective=card.objective,
        notes=notes,
        encode=encode,
    )


def policy_of(
    chooser: Chooser,
    num_features: int,
    objective: Objective = DEFAULT_OBJECTIVE,
    notes: Sequence[str] = (),
    encode: FeatureEncoder | None = None,
) -> Policy:
    """Return a policy whose id, its name in decision logs, is a hash of everything it learned."""
    learned = json.dumps([chooser.kind, chooser.arms, chooser.facts()]).encode()
    return Policy(
        chooser,
        f"{chooser.kind}:{_checksum(_weights(chooser) + learned)[:12]}",
        objective=objective,
        num_features=num_features,
        notes=notes,
        encode=encode or feature_vector,
    )


def is_policy(folder: Path) -> bool:
    """Return whether the folder holds a policy, for any models."""
    return (Path(folder) / CARD_FILE).is_file()


def read_card(folder: Path) -> PolicyArtefact:
    """Read policy.json alone, for any models. Raises ArtefactError if it is missing or damaged."""
    path = Path(folder) / CARD_FILE
    try:
        raw = json.loads(_read(path))
    except ValueError as error:
        raise ArtefactError(f"{path}: damaged, not JSON ({error}); {_AGAIN}") from error
    if not isinstance(raw, dict):
        raise ArtefactError(f"{path}: damaged, not a policy's card; {_AGAIN}")
    # before anything else: another format may have other keys
    _check_equal("format version", FORMAT_VERSION, raw.get("format_version"), str(folder))
    try:
        return PolicyArtefact.model_validate(raw)
    except ValidationError as error:
        raise ArtefactError(f"{path}: {explain(PolicyArtefact, error)}; {_AGAIN}") from error


def text_drafters(card: PolicyArtefact) -> list[str]:
    """Return the drafters that a policy knows by their texts alone, which cannot draft here."""
    return [name for name, line in card.drafters.items() if line == TEXT_ONLY]


def _chooser(card: PolicyArtefact, path: Path) -> Chooser:
    """Return the chooser of a card, with the arrays from its file."""
    data = _read(path)
    if _checksum(data) != card.weights_sha256:
        raise ArtefactError(
            f"{path}: damaged, or not the file that {CARD_FILE} was written with; {_AGAIN}"
        )
    kind = CHOOSERS.get(card.chooser)
    if kind is None:
        raise ArtefactError(
            f"{path.parent}: a policy of kind '{card.chooser}', which this version of paceline "
            f"does not know; {_AGAIN}"
        )
    try:
        return kind.restore(card.arms, load_tensors(data), card.facts)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ArtefactError(f"{path}: damaged ({error}); {_AGAIN}") from error


def _weights(chooser: Chooser) -> bytes:
    return save_tensors({n: np.ascontiguousarray(a) for n, a in chooser.arrays().items()})


def _checksum(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise ArtefactError(f"{path}: no such file, so no policy here; {_AGAIN}") from error
    except OSError as error:
        raise ArtefactError(f"{path}: cannot be read ({error}); {_AGAIN}") from error


def _check_identity(card: PolicyArtefact, expect: PolicyIdentity, where: str) -> None:
    _check_equal("target", expect.target, card.target, where)
    _check_equal("tokenizer", expect.tokenizer, card.tokenizer, where)
    _check_equal("hidden size", expect.hidden_size, card.hidden_size, where)
    expected, found = expect.drafters, card.drafters
    elsewhere = text_drafters(card)
    if not set(elsewhere) <= set(expected):
        raise ArtefactError(
            f"{where}: the policy chooses among drafters that it knows by their texts alone "
            f"({', '.join(elsewhere)}), so they cannot draft here; `paceline route PROMPT` asks it for "
            f"its choice; to decode, configure drafters and {_AGAIN}"
        )
    if set(found) != set(expected):
        missing = sorted(set(expected) - set(found))
        extra = sorted(set(found) - set(expected))
        parts = [f"it does not know {', '.join(missing)}"] if missing else []
        parts += [f"it knows {', '.join(extra)}, not configured now"] if extra else []
        raise ArtefactError(
            f"{where}: the policy was learned for other drafters: {' and '.join(parts)}; expected "
            f"{', '.join(sorted(expected))}, found {', '.join(sorted(found))}; {_AGAIN}"
        )
    for name, line in expected.items():
        _check_equal(f"drafter '{name}'", line, found[name], where)
    unknown = sorted({arm for arm in card.arms if split_arm(arm)[0] not in found})
    if unknown or not (elsewhere or NONE in card.arms):
        raise ArtefactError(
            f"{where}: damaged, its arms {', '.join(card.arms)} are not of its drafters; {_AGAIN}"
        )


def _check_equal(what: str, expected: object, found: object, where: str) -> None:
    if expected != found:
        raise ArtefactError(
            f"{where}: the policy was learned with another {what}: expected {expected}, found "
            f"{found}; {_AGAIN}"
        )
