"""The records that rooms give each other.

Knows no model, tokenizer, file or policy; torch appears in type hints only.

Words: a *row* is one request in flight; a *round* is one draft, verify, commit cycle; a *draft* is the
tree of tokens proposed for a row, often a chain; *accepted* counts the draft tokens that are emitted;
an *arm* is a drafter, perhaps at a draft length; *tau* (block efficiency) is the mean number of tokens
emitted per target forward.
"""

from paceline.contracts.completions import Completion, Decision, FinishReason, Seconds
from paceline.contracts.offline import (
    CollectedPrompt,
    Progress,
    PromptRecord,
    ReplayedDrafter,
    no_progress,
)
from paceline.contracts.requests import (
    AT,
    AUTO,
    DEFAULT_NEW_TOKENS,
    GREEDY,
    NONE,
    Context,
    LogitRules,
    LogitsProcessor,
    PenaltyScope,
    Request,
    SamplingMethod,
    SamplingParams,
    identity_of_arms,
    join_arm,
    sampling_label,
    split_arm,
)
from paceline.contracts.rounds import (
    DraftOutcome,
    Drafts,
    RoundReport,
    RoundStats,
    RowView,
)

__all__ = [
    "AT",
    "AUTO",
    "DEFAULT_NEW_TOKENS",
    "GREEDY",
    "NONE",
    "CollectedPrompt",
    "Completion",
    "Context",
    "Decision",
    "DraftOutcome",
    "Drafts",
    "FinishReason",
    "LogitRules",
    "LogitsProcessor",
    "PenaltyScope",
    "Progress",
    "PromptRecord",
    "ReplayedDrafter",
    "Request",
    "RoundReport",
    "RoundStats",
    "RowView",
    "SamplingMethod",
    "SamplingParams",
    "Seconds",
    "identity_of_arms",
    "join_arm",
    "no_progress",
    "sampling_label",
    "split_arm",
]
