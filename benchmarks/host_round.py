"""The host's part of a round: all that is computed around the forwards.

    python benchmarks/host_round.py [--repeats 9] [--tokens 256] [--budget]

The engine runs whole requests, and the forwards of target and drafter are replaced by a look-up in a
prepared text, whose time is subtracted. The text repeats its phrases with random changes, so drafts are
accepted in part. A figure is the least of several means over the rounds with all rows, after prefill.
With --budget the rows share a budget of verified tokens, by prices at which a part of the drafts is cut.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from statistics import mean
from time import perf_counter
from typing import TYPE_CHECKING, Any

from result_pages import describe_run, page, save, table
from timed_setup import count_steps, load_zoo, make_parser, parse, show_progress

from paceline.contracts import NONE, Request
from paceline.costs import CostTable, Measurement, RoundSeconds
from paceline.drafting.draft_model import DraftModel
from paceline.drafting.none import NoneDrafter
from paceline.drafting.prompt_lookup import PromptLookup, PromptLookupSettings
from paceline.drafting.suffix_lookup import SuffixLookup, SuffixLookupSettings
from paceline.drafting.trigram.drafter import TrigramTree
from paceline.drafting.trigram.settings import TrigramTreeSettings
from paceline.engine.loop import Engine
from paceline.models.loading import load_language_model
from paceline.models.scores import Scores

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from paceline.contracts import Progress
    from paceline.drafting.base import Drafter
    from paceline.models.language_model import LanguageModel
    from paceline.models.packing import Span

ROWS = (1, 8)
PROMPT = 64  # tokens of the shortest prompt
CHAIN = 4  # drafted tokens per round of the draft model
NUM_PHRASES, PHRASE = 6, 16
CHANGED = 0.1  # share of the text's tokens that are random
WARM_UP = 3  # rounds that are not counted
WRONG = 0.25  # share of the draft model's tokens that differ from the text


@dataclass
class Script:
    """The text that the target writes, and the draft model's guesses at it; by position."""

    text: list[int]
    guesses: list[int]
    seconds: float = 0.0  # spent in the replaced forwards

    @classmethod
    def make(cls, num_tokens: int, num_ids: int) -> Script:
        order = random.Random(0)
        phrases = [[order.randrange(num_ids) for _ in range(PHRASE)] for _ in range(NUM_PHRASES)]
        text: list[int] = []
        while len(text) < num_tokens:
            text += order.choice(phrases)
        text = [order.randrange(num_ids) if order.random() < CHANGED else t for t in text]
        guesses = [order.randrange(num_ids) if order.random() < WRONG else t for t in text]
        return cls(text, guesses)

    def replace_forwards(self, model: LanguageModel) -> None:
        """Make a model answer from the text in rounds; its prefill remains its own."""
        given: Any = model

        def score(
            tokens: Sequence[int],
            spans: Sequence[Span],
            parents: Sequence[list[int] | None] | None = None,
            wants_logits: bool = True,
        ) -> Scores:
            began = perf_counter()
            choices: list[int] = []
            for i, span in enumerate(spans):
                model.cache.extend(span.slot, span.start + span.width)
                tree = parents[i] if parents else None
                if tree:
                    choices += self._along_tree(span.start + 1, tree)
                else:
                    choices += self.text[span.start + 1 : span.start + 1 + span.width]
            self.seconds += perf_counter() - began
            return Scores(choices)

        def draft_chain(
            tokens: Sequence[int], spans: Sequence[Span], num_drafted: int, *_: Any
        ) -> list[list[int]]:
            began = perf_counter()
            ends = [span.start + span.width for span in spans]
            chains = [self.guesses[end : end + num_drafted] for end in ends]
            self.seconds += perf_counter() - began
            return chains

        given.score, given.draft_chain = score, draft_chain

    def _along_tree(self, start: int, parents: Sequence[int]) -> list[int]:
        places = [start]
        for parent in parents:
            places.append(places[parent + 1] + 1)
        return [self.text[place] for place in places]


def make_drafters(script: Script, num_ids: int) -> dict[str, Callable[[], Drafter]]:
    """Return a function per line of the table that makes its drafter."""
    settings = load_zoo("bfloat16").drafters["general"].settings

    def chain() -> Drafter:
        model = load_language_model(DraftModel.Settings(**settings), "chain")
        script.replace_forwards(model)
        return DraftModel("chain", model, CHAIN, num_ids, num_ids)

    return {
        NONE: lambda: NoneDrafter(),
        f"draft model, {CHAIN} tokens": chain,
        "trigram_tree, 8 nodes": lambda: TrigramTree("tree", TrigramTreeSettings()),
        "prompt_lookup": lambda: PromptLookup("lookup", PromptLookupSettings()),
        "suffix_lookup": lambda: SuffixLookup("suffix", SuffixLookupSettings()),
    }


def made_up_prices() -> RoundSeconds:
    """Return prices at which a token that is likelier right than wrong is worth its verification."""
    cells = [Measurement("target", "prefill", PROMPT, 0, 1, 0.01)]
    for n in ROWS:
        cells.append(Measurement("engine", "round", 0, 0, n, 0.0))
        cells += [
            Measurement("target", "forward", 1 + k, 0, n, 1e-3 * (n + 0.5 * k)) for k in (0, 200)
        ]
    return RoundSeconds(CostTable({}, cells))


def rounds(
    target: LanguageModel,
    drafter: Drafter,
    script: Script,
    num_rows: int,
    num_tokens: int,
    prices: RoundSeconds | None,
) -> tuple[list[float], float]:
    """Return the seconds of each round with all rows, and the mean tokens per row and round."""
    drafters = {NONE: NoneDrafter(), drafter.name: drafter}
    engine = Engine(target, drafters, lambda ids: "", max_rows=num_rows, round_seconds=prices)
    for i in range(num_rows):
        prompt = tuple(script.text[: PROMPT + 5 * i])
        engine.submit(Request(str(i), prompt, num_tokens, drafter=drafter.name))
    found: list[float] = []
    emitted = 0
    while engine.has_work:
        script.seconds, began = 0.0, perf_counter()
        updates = engine.step()
        spent = perf_counter() - began - script.seconds
        if len(updates) == num_rows and not any(update.completion for update in updates):
            found.append(spent)
            emitted += sum(len(update.new_tokens) for update in updates)
    del found[:WARM_UP]  # the prefill of the last row, and the rounds after it
    return found, emitted / (len(found) + WARM_UP) / num_rows


def measure(
    repeats: int, num_tokens: int, prices: RoundSeconds | None, report: Progress
) -> list[dict[str, Any]]:
    """Return the rows of the table."""
    config = load_zoo("bfloat16")
    target = load_language_model(config.target, "target")
    script = Script.make(PROMPT * 4 + num_tokens + 64, target.num_logits)
    script.replace_forwards(target)
    kinds = {name: make() for name, make in make_drafters(script, target.num_logits).items()}
    found: dict[tuple[str, int], list[float]] = {}
    lengths: dict[str, float] = {}
    on_turn = count_steps(report, "rounds", repeats)
    for _ in range(repeats):
        for name, drafter in kinds.items():
            for num_rows in ROWS:
                seconds, lengths[name] = rounds(
                    target, drafter, script, num_rows, num_tokens, prices
                )
                found.setdefault((name, num_rows), []).append(mean(seconds))
        on_turn()
    return [
        {"drafter": name, "tokens": lengths[name]}
        | {f"us_{n}": min(found[name, n]) * 1e6 for n in ROWS}
        for name in kinds
    ]


COLUMNS = {
    "drafter": "{drafter}",
    "tokens per round": "{tokens:.2f}",
    **{f"{n} {'row' if n == 1 else 'rows'}, us": f"{{us_{n}:.0f}}" for n in ROWS},
}


def main() -> None:
    """Measure all drafters and write the table."""
    parser = make_parser(__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--budget", action="store_true", help="cut drafts of several rows")
    options = parse(parser)
    with show_progress() as report:
        prices = made_up_prices() if options.budget else None
        rows = measure(options.repeats, options.tokens, prices, report)
    facts = describe_run(
        f"Microseconds per round around the forwards, zoo target; least of {options.repeats} means"
        f"{', with a shared budget' if options.budget else ''}."
    )
    text = "\n".join([*page("The host's part of a round", facts), *table(rows, COLUMNS)]) + "\n"
    save(options.out, "host_round", text, {"circumstances": facts, "rows": rows})


if __name__ == "__main__":
    main()
