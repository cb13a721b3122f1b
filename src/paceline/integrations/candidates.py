"""A paceline drafter as the candidate generator of transformers' own assisted decoding.

transformers decodes and verifies, one row at a time; the drafter proposes from the text alone. Of a
tree, only the path of first children is proposed. Symbols: L tokens of text, k drafted, V logits.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Final

import torch
from transformers.generation.candidate_generator import CandidateGenerator

from paceline.contracts import SamplingParams
from paceline.drafting.contract import prepare_all, read_drafts, read_length
from paceline.drafting.draft_replay import SimpleRow
from paceline.errors import ConfigError, RequestError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    from torch import Tensor

    from paceline.contracts import Drafts
    from paceline.drafting.base import Drafter

# engines count rows from 0 and a replay's row is -2: no two may have the same id in a drafter
_ROW_IDS = itertools.count(-3, -1)
_PREFILL_CHUNK: Final = 512  # tokens of the drafter's own prefill per call


class DrafterCandidates(CandidateGenerator):
    """A `transformers.CandidateGenerator` for one text; `close` it when the text is complete.

    Greedy drafts and lookups have no logits: transformers accepts them while they equal the tokens
    that it selects itself. Drafts sampled from a distribution q have log q as logits, and transformers
    accepts with min(1, p/q). Neither changes transformers' output distribution.
    """

    def __init__(
        self,
        drafter: Drafter,
        max_length: int,
        sampling: SamplingParams | None = None,
        num_padding: int = 0,
        source: Sequence[int] | None = None,
    ) -> None:
        """max_length: of prompt and output. sampling: of the target's tokens, for drafters that sample.
        num_padding: tokens to skip to the left of the prompt. source: the prompt of a target with an
        encoder; its text is the decoder's, which begins with one token of its own.

        Raises ConfigError for a drafter that reads the target's states.
        """
        needs = drafter.needs
        if needs.target_weights:
            raise ConfigError(
                f"drafter '{drafter.name}' reads the target's own states, which transformers' "
                "assisted decoding does not provide; use another drafter, or custom_generate="
                "paceline.integrations.hf.generate"
            )
        self.drafter = drafter
        self._max_length = max_length
        self._num_padding, self._source = num_padding, source
        self._row = SimpleRow([], 0, id=next(_ROW_IDS), sampling=sampling or SamplingParams())
        self._started = False

    def get_candidates(self, input_ids: Tensor, **kwargs: object) -> tuple[Tensor, Tensor | None]:  # type: ignore[override]
        """Return the text followed by the draft [1, L + k], and log q [1, k, V] or None."""
        if input_ids.shape[0] != 1:
            raise RequestError(
                f"transformers' assisted decoding takes one row; got {input_ids.shape[0]}, give one"
            )
        room = self._max_length - input_ids.shape[1] - 1
        if room < 1:
            return input_ids, None
        row = self._row
        text: list[int] = input_ids[0, self._num_padding :].tolist()
        row.tokens = text if self._source is None else [*self._source, *text[1:]]
        with torch.inference_mode():  # drafters that an engine has used hold tensors made there
            self._start()
            drafts = self.drafter.propose([row], [room])
            read_drafts(drafts, [row], [room], read_length(self.drafter))  # or DrafterError
        path = first_path(drafts)
        if not path:
            return input_ids, None
        tokens = torch.tensor([[int(drafts.tokens[0, k]) for k in path]])
        logits = None if drafts.probs is None else drafts.probs[:1, path].log()
        return torch.cat((input_ids, tokens.to(input_ids)), dim=1), logits

    def _start(self) -> None:
        if self._started:
            return
        source = self._row.tokens if self._source is None else self._source
        self._row.num_prompt = len(source)
        self._started = True
        self.drafter.start([self._row])
        prepare_all(self.drafter, self._row, _PREFILL_CHUNK)

    def close(self) -> None:
        """Release the drafter's memory of this text."""
        if self._started:
            self.drafter.finish([self._row])
            self._started = False

    def __enter__(self) -> DrafterCandidates:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def first_path(drafts: Drafts) -> list[int]:
    """Return the indices of the first row's nodes on the path of first children; of a chain, all."""
    nodes = range(drafts.lengths[0])
    if drafts.parents is None:
        return list(nodes)
    path: list[int] = []
    for k in nodes:
        # parents precede their children, and better siblings precede worse ones
        if int(drafts.parents[0, k]) == (path[-1] if path else -1):
            path.append(k)
    return path
