"""The policy on disk: a folder of `policy.safetensors` and `policy.json`.

The JSON file names everything the policy was learned with; whatever would make its choices
meaningless (another target, tokenizer, set of arms or feature version) is refused on loading, with
what was expected and found. A changed cost table is not refused: see `PolicyArtefact.costs`. The
JSON file is written last and holds the checksum of the weights, so a torn pair is recognised.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from paceline.config import explain
from paceline.errors import ArtefactError
from paceline.files import write_atomically
from paceline.selection.features import FEATURE_VERSION, num_features
from paceline.selection.network import PolicyNetwork
from paceline.selection.policies import NetworkPolicy

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

FORMAT_VERSION: Final = 1
WEIGHTS_FILE: Final = "policy.safetensors"
CARD_FILE: Final = "policy.json"
_AGAIN: Final = "run `paceline learn`"


@dataclass(frozen=True, slots=True)
class PolicyIdentity:
    """What a policy is tied to. `arms` maps each arm, `none` included, to its identity line."""

    target: str  # fingerprint of the target
    tokenizer: str  # hash of the token-to-id map
    hidden_size: int  # D
    arms: Mapping[str, str]


class RewardCard(BaseModel):
    """What the policy was rewarded for; `alpha` is None where the kind has none."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: str
    version: int
    alpha: float | None = None


class PolicyArtefact(BaseModel):
    """policy.json. `arms`: names and identity lines in the order of the network's outputs.

    `costs` is the hash of the cost table the rewards were priced with. With another table the
    policy still works, only no longer at its best, so that is for the caller to tell.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: int = FORMAT_VERSION
    feature_version: int = FEATURE_VERSION
    target: str
    tokenizer: str
    hidden_size: int
    arms: list[tuple[str, str]]
    reward: RewardCard
    costs: str
    learner: dict[str, Any]
    training: dict[str, Any]
    weights_sha256: str = ""


def save_policy(folder: Path, network: PolicyNetwork, artefact: PolicyArtefact) -> PolicyArtefact:
    """Write both files, each under a temporary name first; returns the card as written."""
    _check_shapes(network.arrays(), artefact, str(folder))
    weights = _weights(network)
    card = artefact.model_copy(update={"weights_sha256": _checksum(weights)})
    try:
        write_atomically(Path(folder) / WEIGHTS_FILE, weights)
        write_atomically(Path(folder) / CARD_FILE, card.model_dump_json(indent=1).encode())
    except OSError as error:
        raise ArtefactError(f"{folder}: cannot be written ({error})") from error
    return card


def load_policy(folder: Path, expect: PolicyIdentity) -> NetworkPolicy:
    """The policy in a folder. Raises ArtefactError unless it was made for `expect`."""
    card = read_card(folder)
    _check_identity(card, expect, str(folder))
    path = Path(folder) / WEIGHTS_FILE
    data = _read(path)
    if _checksum(data) != card.weights_sha256:
        raise ArtefactError(
            f"{path}: damaged, or not the file that {CARD_FILE} was written with; {_AGAIN}"
        )
    try:
        arrays = load_tensors(data)
    except SafetensorError as error:
        raise ArtefactError(f"{path}: damaged ({error}); {_AGAIN}") from error
    _check_shapes(arrays, card, str(path))
    return network_policy(PolicyNetwork(**arrays), [name for name, _ in card.arms])


def network_policy(network: PolicyNetwork, arms: Sequence[str]) -> NetworkPolicy:
    """A policy whose id, the name in decision logs, changes with the weights."""
    return NetworkPolicy(network, arms, f"learned:{_checksum(_weights(network))[:12]}")


def is_policy(folder: Path) -> bool:
    """Whether a policy was written there, whatever it was made for."""
    return (Path(folder) / CARD_FILE).is_file()


def read_card(folder: Path) -> PolicyArtefact:
    """policy.json alone, whatever it was made for."""
    path = Path(folder) / CARD_FILE
    try:
        raw = json.loads(_read(path))
    except ValueError as error:
        raise ArtefactError(f"{path}: damaged, not JSON ({error}); {_AGAIN}") from error
    if not isinstance(raw, dict):
        raise ArtefactError(f"{path}: damaged, not a policy's card; {_AGAIN}")
    # before anything else: another format may have other keys
    _check("format version", FORMAT_VERSION, raw.get("format_version"), str(folder))
    try:
        return PolicyArtefact.model_validate(raw)
    except ValidationError as error:
        raise ArtefactError(f"{path}: {explain(PolicyArtefact, error)}; {_AGAIN}") from error


def _weights(network: PolicyNetwork) -> bytes:
    return save_tensors({n: np.ascontiguousarray(a) for n, a in network.arrays().items()})


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
    _check("feature version", FEATURE_VERSION, card.feature_version, where)
    _check("target", expect.target, card.target, where)
    _check("tokenizer", expect.tokenizer, card.tokenizer, where)
    _check("hidden size", expect.hidden_size, card.hidden_size, where)
    found = dict(card.arms)
    if set(found) != set(expect.arms):
        missing = sorted(set(expect.arms) - set(found))
        extra = sorted(set(found) - set(expect.arms))
        parts = [f"it does not know {', '.join(missing)}"] if missing else []
        parts += [f"it knows {', '.join(extra)}, not configured now"] if extra else []
        raise ArtefactError(
            f"{where}: the policy was learned for other arms: {' and '.join(parts)}; expected "
            f"{', '.join(sorted(expect.arms))}, found {', '.join(sorted(found))}; {_AGAIN}"
        )
    for name, line in expect.arms.items():
        _check(f"arm '{name}'", line, found[name], where)


def _check(what: str, expected: object, found: object, where: str) -> None:
    if expected != found:
        raise ArtefactError(
            f"{where}: the policy was learned with another {what}: expected {expected}, found "
            f"{found}; {_AGAIN}"
        )


def _check_shapes(arrays: Mapping[str, np.ndarray], card: PolicyArtefact, where: str) -> None:
    F, A = num_features(card.hidden_size), len(card.arms)
    H = arrays["b1"].shape[0] if "b1" in arrays and arrays["b1"].ndim == 1 else 0
    expected = {"mean": (F,), "scale": (F,), "w1": (F, H), "b1": (H,), "w2": (H, A), "b2": (A,)}
    found = {name: tuple(array.shape) for name, array in arrays.items()}
    if found != expected:
        raise ArtefactError(f"{where}: arrays {found} where {expected} are expected; {_AGAIN}")
    if not all(np.isfinite(array).all() for array in arrays.values()):
        raise ArtefactError(f"{where}: a weight is not a finite number; {_AGAIN}")
