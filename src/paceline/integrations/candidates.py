"""A paceline drafter as the candidate generator of transformers' own assisted decoding.

transformers decodes and judges, one row at a time; the drafter proposes from the text alone. Of a
tree one path goes out, the first child of every node. Symbols: L text, k drafted, V logits.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch
from transformers.generation.candidate_generator import CandidateGenerator

from paceline.contracts import SamplingParams
from paceline.drafting.contract import prepare_all, read_drafts, read_length
from paceline.drafting.draft_replay import SimpleRow
from paceline.errors import ConfigError, RequestError

if TYPE_CHECKING:
    from types import TracebackType

    from torch import Tensor

    from paceline.contracts import Drafts
    from paceline.drafting.base import Drafter

# engines count their rows from 0 and a replay is -2, so that all may use one drafter
_IDS = itertools.count(-3, -1)
_PREPARE = 512  # tokens of a drafter's own prefill at once


class DrafterCandidates(CandidateGenerator):
    """Candidates for one text of transformers' assisted decoding; `close` it at the text's end.

    Greedy drafts and lookups come without logits: transformers then takes them as far as they equal
    what it selects itself. Drafts sampled from a distribution q come with log q, which transformers
    judges with min(1, p/q). Either way its own output distribution is unchanged.
    """

    def __init__(
        self,
        drafter: Drafter,
        max_length: int,
        sampling: SamplingParams | None = None,
        num_padding: int = 0,
    ) -> None:
        """max_length: prompt and output. num_padding: tokens left of the prompt to pass over."""
        needs = drafter.needs
        if needs.hidden_states or needs.target_weights:
            raise ConfigError(
                f"drafter '{drafter.name}' reads the target's own states, which transformers' "
                "assisted decoding does not hand out; use custom_generate=paceline.integrations."
                "hf.generate, or another drafter"
            )
        self.drafter = drafter
        self._max_length = max_length
        self._num_padding = num_padding
        self._row = SimpleRow([], 0, id=next(_IDS), sampling=sampling or SamplingParams())
        self._started = False

    def get_candidates(self, input_ids: Tensor, **kwargs: object) -> tuple[Tensor, Tensor | None]:  # type: ignore[override]
        """The text with the drafted tokens behind it [1, L + k], and log q [1, k, V] or None."""
        if input_ids.shape[0] != 1:
            raise RequestError("transformers' assisted decoding takes one row at a time")
        room = self._max_length - input_ids.shape[1] - 1
        if room < 1:
            return input_ids, None
        row = self._row
        row.tokens = input_ids[0, self._num_padding :].tolist()
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
        self._row.num_prompt = len(self._row.tokens)
        self._started = True
        self.drafter.start([self._row])
        prepare_all(self.drafter, self._row, _PREPARE)

    def close(self) -> None:
        """Give back what the drafter holds for this text."""
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
    """Places of the first row's nodes on the path of first children; of a chain all of them."""
    places = range(drafts.lengths[0])
    if drafts.parents is None:
        return list(places)
    path: list[int] = []
    for k in places:
        # parents stand before their children and better siblings before worse ones
        if int(drafts.parents[0, k]) == (path[-1] if path else -1):
            path.append(k)
    return path
