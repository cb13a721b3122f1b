"""The choice of a saved policy for a prompt, without the answer: a router.

The target reads the prompt, since a policy's features may be its hidden states. The chosen drafter may
live elsewhere; then it is known by its texts alone and cannot draft here.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Final

from paceline.assembly import Pace, build, policy_identity
from paceline.contracts import NONE, TEXT_ONLY
from paceline.costs.table import CostTable
from paceline.errors import RequestError
from paceline.selection import load_policy
from paceline.selection.artefact import read_card, text_drafters

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from paceline.assembly import Parts
    from paceline.assembly.pace import Prompt
    from paceline.config import Config
    from paceline.contracts import Context, Decision
    from paceline.selection import Policy

_NUM_TOKENS: Final = (
    2  # the engine asks for a choice where an answer continues after its first token
)


class Router:
    """A policy, and the target that computes its features. Thread-safe; `load_router` returns one."""

    def __init__(self, parts: Parts, policy: Policy) -> None:
        self.arms = policy.arms
        self.notes = policy.notes
        self._policy = policy
        self._pace = Pace(parts, self._choose)
        self._lock = Lock()  # one prompt at a time
        self._max_new_tokens: int | None = None
        self._decisions: list[Decision] = []  # of the prompt in work

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The target's tokenizer."""
        return self._pace.parts.tokenizer

    def choose(self, prompt: Prompt, max_new_tokens: int | None = None) -> Decision:
        """Return the decision for a prompt: its `arm`, and the `scores` of all arms.

        prompt: as in `Pace.request`. max_new_tokens: of the answer, if known. Raises RequestError for a
        prompt that cannot be served.
        """
        with self._lock:
            self._decisions.clear()
            self._max_new_tokens = max_new_tokens
            self._pace.complete(
                prompt, max_new_tokens=_NUM_TOKENS, ignore_eos=True, generation_config="none"
            )
            if not self._decisions:
                raise RequestError("the prompt fills the target's context; shorten it")
            return self._decisions[0]

    def _choose(self, context: Context) -> Decision:
        context = replace(context, max_new_tokens=self._max_new_tokens)
        self._decisions.append(self._policy.choose(context))
        return replace(self._decisions[0], arm=NONE)


def load_router(config: Config, policy: Path | str | None = None) -> Router:
    """Load the target and a saved policy, which may choose among drafters that are not configured.

    policy: its folder, by default the configuration's. Raises ArtefactError if there is no policy there
    or it was learned for other models, ConfigError or ModelError for models that cannot be used.
    """
    folder = config.paths.policy if policy is None else Path(policy)
    elsewhere = text_drafters(read_card(folder))
    parts = build(config.model_copy(update={"drafters": {}}) if elsewhere else config)
    identity = policy_identity(parts)
    if elsewhere:
        drafters = {**identity.drafters, **dict.fromkeys(elsewhere, TEXT_ONLY)}
        identity = replace(identity, drafters=drafters)
    path = config.paths.costs
    costs = CostTable.load(path) if path.is_file() and not elsewhere else None
    loaded = load_policy(folder, identity, costs, config.selection, parts.forwards())
    return Router(parts, loaded)


def route(config: Config | Router, prompt: Prompt, max_new_tokens: int | None = None) -> Decision:
    """Return the decision of the saved policy for one prompt; see `Router.choose`.

    config: a configuration, whose target and policy are loaded, or a router, which has loaded them.
    """
    router = config if isinstance(config, Router) else load_router(config)
    return router.choose(prompt, max_new_tokens)
