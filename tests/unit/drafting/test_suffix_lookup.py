"""A tree of earlier continuations, longer after longer matches; shared text only with `share`."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from paceline.assembly import Pace, build_from_objects
from paceline.config import Config, DrafterSection, EngineSection, ModelSection
from paceline.contracts import NONE
from paceline.drafting import suffix_kernels
from paceline.drafting.base import BuildContext
from paceline.drafting.catalog import check_settings
from paceline.drafting.draft_replay import SimpleRow
from paceline.drafting.prompt_lookup import PromptLookup, PromptLookupSettings
from paceline.drafting.suffix_lookup import SuffixLookup, SuffixLookupSettings
from paceline.errors import ConfigError
from paceline.replay import replay
from paceline.testing.tiny_models import tiny_model
from paceline.testing.tokenizers import byte_tokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from paceline.contracts import Drafts


def row_of(id: int, tokens: Sequence[int] = (), num_prompt: int = 0) -> SimpleRow:
    return SimpleRow(list(tokens), num_prompt, id=id)


def lookup(**settings: Any) -> SuffixLookup:
    """Return a drafter; by default it drafts as many tokens as the match has, from two on."""
    return SuffixLookup(
        "x", SuffixLookupSettings(**{"min_match": 2, "length_factor": 1.0, **settings})
    )


def drafted(drafts: Drafts, row: int = 0) -> tuple[list[int], list[int]]:
    """Return a row's tokens and their parents."""
    n = drafts.lengths[row]
    parents = list(range(-1, n - 1)) if drafts.parents is None else drafts.parents[row, :n].tolist()
    return drafts.tokens[row, :n].tolist(), parents


def propose(drafter: SuffixLookup, tokens: Sequence[int], limit: int = 64) -> Drafts:
    """Propose for a new row."""
    row = row_of(0, list(tokens))
    drafter.start([row])
    try:
        return drafter.propose([row], [limit])
    finally:
        drafter._rows.finish([row])  # not `finish`, which would share its text


# --- drafts ---------------------------------------------------------------------------------------

# 1 2 was followed by 3 twice and by 4 once; 3 was followed by 5 both times
BRANCHING = [1, 2, 3, 5, 9, 1, 2, 4, 6, 8, 1, 2, 3, 5, 7, 1, 2]


def test_the_tree_holds_the_most_frequent_first() -> None:
    drafts = propose(lookup(num_draft_tokens=5, length_offset=3), BRANCHING)

    # 4, 7 and 9 are equally likely; 4 has the earlier parent, and 7 came later than 9
    assert drafted(drafts) == ([3, 5, 4, 7, 9], [-1, 0, -1, 1, 1])


def test_one_path_is_a_chain() -> None:
    drafts = propose(lookup(num_draft_tokens=4, length_offset=2, paths=1), BRANCHING)

    assert drafts.parents is None
    # both 7 and 9 followed 1 2 3 5 once, and 7 came last
    assert drafted(drafts)[0] == [3, 5, 7, 1]


def test_unlikely_tokens_are_not_drafted() -> None:
    drafts = propose(lookup(length_offset=5, min_probability=0.5), BRANCHING)

    assert drafted(drafts) == ([3, 5], [-1, 0])


@pytest.mark.parametrize(("factor", "offset", "expected"), [(1, 0, 3), (2, 1, 7), (0.5, 0, 1)])
def test_the_length_of_a_draft_follows_from_the_match(
    factor: float, offset: float, expected: int
) -> None:
    text = [*range(20), 0, 1, 2]

    drafts = propose(lookup(length_factor=factor, length_offset=offset), text)

    assert drafted(drafts)[0] == list(range(3, 3 + expected))


def test_a_match_below_the_least_drafts_nothing() -> None:
    assert drafted(propose(lookup(), [1, 2, 3, 1])) == ([], [])
    assert drafted(propose(lookup(min_match=1), [1, 2, 3, 1])) == ([2], [-1])


def test_trees_obey_their_limits_and_chains_share_a_batch_with_trees() -> None:
    drafter = lookup(num_draft_tokens=7, length_offset=4)
    rows = [row_of(0, BRANCHING), row_of(1, [5]), row_of(2, BRANCHING), row_of(3, [6] * 9)]
    drafter.start(rows)

    drafts = drafter.propose(rows, [2, 9, 0, 9])

    assert drafts.probs is None
    assert drafted(drafts, 0) == ([3, 5, 4, 6], [-1, 0, -1, 2])  # two deep
    assert drafts.lengths[1:] == [0, 0, 7]
    assert drafted(drafts, 3) == ([6] * 7, list(range(-1, 6)))


def test_the_number_of_draft_tokens_may_change_between_rounds() -> None:
    drafter = lookup(num_draft_tokens=8, paths=1)
    row = row_of(0, [1, 2, 3] * 20)
    drafter.start([row])

    for num_draft_tokens in (8, 3, 20, 8):
        drafter.num_draft_tokens = num_draft_tokens
        fresh = lookup(num_draft_tokens=num_draft_tokens, paths=1)
        drafts = drafter.propose([row], [64])
        assert drafts.lengths == [num_draft_tokens]
        assert drafted(drafts) == drafted(propose(fresh, row.tokens))


def test_drafts_are_those_of_a_fresh_drafter_after_any_history() -> None:
    choose = random.Random(8)
    drafter = lookup(min_match=1, length_offset=3)
    rows = [row_of(i, [choose.randrange(4)]) for i in range(3)]
    drafter.start(rows)
    branched = False
    for _ in range(60):
        for row in rows:
            row.tokens += [choose.randrange(4) for _ in range(choose.randrange(1, 4))]
        if choose.random() < 0.1:  # another drafter in between
            drafter.finish(rows[:1])
            drafter.start(rows[:1])
        asked = choose.sample(rows, choose.randint(1, 3))
        drafts = drafter.propose(asked, [9] * len(asked))
        branched |= drafts.parents is not None
        for i, row in enumerate(asked):
            alone = propose(lookup(min_match=1, length_offset=3), row.tokens, 9)
            assert drafted(drafts, i) == drafted(alone)
    assert branched


def test_a_replay_and_a_live_row_do_not_disturb_each_other() -> None:
    choose = random.Random(3)
    prompt, output = ([choose.randrange(4) for _ in range(n)] for n in (20, 60))
    drafter = lookup(min_match=1)
    live = row_of(0, [1, 2, 3, 1, 2])
    drafter.start([live])
    before = drafted(drafter.propose([live], [5]))

    alone = replay(lookup(min_match=1), prompt, output, 90).rounds
    beside = replay(drafter, prompt, output, 90).rounds

    assert beside.tolist() == alone.tolist()
    assert alone[:, 1].sum() > 0
    assert drafted(drafter.propose([live], [5])) == before


def test_finished_rows_leave_nothing_behind() -> None:
    drafter = lookup()
    row = row_of(0, BRANCHING)
    drafter.start([row])
    drafter.propose([row], [4])
    assert drafter.num_bytes() > 0

    drafter.finish([row, row_of(7)])

    assert drafter.num_bytes() == 0


# --- shared text ----------------------------------------------------------------------------------


def answer(drafter: SuffixLookup, prompt: list[int], output: list[int], id: int = 5) -> None:
    """Serve a request from its first output token to its last."""
    row = row_of(id, [*prompt, output[0]], num_prompt=len(prompt))
    drafter.start([row])
    row.tokens += output[1:]
    drafter.finish([row])


def test_earlier_answers_are_matched_only_where_they_are_shared() -> None:
    for share, expected in ((True, [3, 4]), (False, [])):
        drafter = lookup(share=share)
        answer(drafter, [7, 7, 8], [1, 2, 3, 4, 5])
        assert drafted(propose(drafter, [9, 9, 1, 2]))[0] == expected


def test_what_is_shared_is_the_answer_not_the_prompt() -> None:
    drafter = lookup(share=True)
    answer(drafter, [1, 2, 3, 4, 5], [6])

    assert drafted(propose(drafter, [1, 2])) == ([], [])


def test_a_row_shares_only_tokens_since_it_got_the_drafter_back() -> None:
    drafter = lookup(share=True)
    row = row_of(0, [0, 1, 2, 3], num_prompt=1)
    drafter.start([row])
    row.tokens += [4, 5]
    drafter.finish([row])
    row.tokens += [6, 7]  # another drafter's
    drafter.start([row])
    row.tokens += [8, 9]
    drafter.finish([row])

    assert drafter.shared is not None
    assert [part.num_tokens for part in drafter.shared.parts] == [3 + 1 + 3 + 1]
    assert drafted(propose(drafter, [4, 5])) == ([], [])  # an answer's end is no token


def test_of_own_and_shared_text_the_draft_with_more_expected_tokens_wins() -> None:
    drafter = lookup(share=True)
    answer(drafter, [0], [1, 2, 3, 4, 5, 6])

    # the row's own text has only 9 after a much shorter match
    assert drafted(propose(drafter, [3, 9, 1, 2, 3]))[0] == [4, 5, 6]
    # a match in its own text says more than a somewhat longer one in others
    assert drafted(propose(drafter, [2, 3, 9, 1, 2, 3]))[0] == [9, 1]
    assert drafted(propose(drafter, [1, 2, 3, 9, 9, 1, 2, 3]))[0] == [9, 9, 1]
    assert drafted(propose(drafter, [1, 2, 3, 9, 9, 1, 2, 3], limit=2))[0] == [9, 9]


def test_the_oldest_answers_are_dropped_and_memory_stays_bounded() -> None:
    drafter = lookup(share=True, shared_tokens=1024)
    shared = drafter.shared
    assert shared is not None
    sizes = set()
    for k in range(40):
        answer(drafter, [0], list(range(1000 * k, 1000 * k + 100)))
        held = sum(part.num_tokens for part in shared.parts)
        assert held <= 1024
        if k > 10:
            assert held >= 300
            sizes.add(shared.num_bytes())
        last = 1000 * k
        assert drafted(propose(drafter, [last + 5, last + 6]))[0] == [last + 7, last + 8]
    assert len(sizes) == 1
    assert drafted(propose(drafter, [5, 6])) == ([], [])

    answer(drafter, [0], list(range(5000)))  # longer than the bound
    assert sum(part.num_tokens for part in shared.parts) <= 1024
    assert drafted(propose(drafter, [4990, 4991]))[0] == [4992, 4993]


def test_drafters_share_by_tenant() -> None:
    def section(**settings: Any) -> SuffixLookupSettings:
        return SuffixLookupSettings(share=True, **settings)

    built: dict[str, Any] = {"lookup": PromptLookup("lookup", PromptLookupSettings())}
    context = BuildContext(None, None, None, built)  # type: ignore[arg-type] - not used
    for name, settings in {
        "a": section(tenant="one"),
        "b": section(tenant="two"),
        "c": section(tenant="one", paths=1),
        "d": SuffixLookupSettings(),
    }.items():
        built[name] = SuffixLookup.build(name, settings, context)

    assert built["a"].shared is built["c"].shared
    assert built["a"].shared is not built["b"].shared
    assert built["d"].shared is None
    with pytest.raises(ConfigError, match=r"'e' shares its text with 'a', so its shared_tokens"):
        SuffixLookup.build("e", section(tenant="one", shared_tokens=2048), context)


def test_sharing_changes_no_text() -> None:
    model = tiny_model(std=0.1)
    drafter = lookup(share=True, min_match=1, length_offset=2)
    config = Config(target=ModelSection(model="in memory"), engine=EngineSection(max_rows=2))
    parts = build_from_objects(model, byte_tokenizer(), {"shared": drafter}, config)
    pace = Pace(parts)
    prompts = ["abc", "abd", "abc", "xyz abc", "abc"]

    def texts(arm: str) -> list[list[int]]:
        done = pace.generate(prompts, drafter=arm, max_new_tokens=24, ignore_eos=True)
        assert arm == NONE or sum(r.accepted for c in done for r in c.rounds) > 0
        return [completion.token_ids for completion in done]

    assert texts("shared") == texts(NONE)
    assert drafter.shared is not None and drafter.shared.parts[0].num_tokens == 5 * 25
    # in the second run every answer is in the shared text
    before = pace.complete("abc", drafter="shared", max_new_tokens=24, ignore_eos=True)
    assert before.block_efficiency > 2


# --- settings, compilation ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"min_match": 9, "max_match": 3}, "min_match 9 is above max_match 3"),
        ({"length_factor": 0.0}, "never allow a token"),
        ({"length_factor": float("inf")}, "'length_factor'"),
        ({"tenant": "me"}, "tenant needs share: true"),
        ({"shared_tokens": 4096}, "shared_tokens needs share: true"),
        ({"path": 1}, "did you mean 'paths'"),
    ],
)
def test_contradicting_settings_are_refused(settings: dict[str, Any], says: str) -> None:
    section = DrafterSection(kind="suffix_lookup", settings=settings)
    with pytest.raises(ConfigError, match=f"drafter 'x'.*{says}"):
        check_settings("x", section)


def test_whatever_changes_drafts_changes_the_identity() -> None:
    plain = lookup().identity()

    for changed in ({"paths": 1}, {"max_match": 8}, {"length_offset": 1.0}, {"share": True}):
        assert lookup(**changed).identity() != plain


def test_nothing_is_compiled_after_a_drafter_was_built() -> None:
    lookup()
    called = {"extend", "extend_and_match", "rehash", "clear"}  # by Python
    kernels = (*called, "match", "grow")
    before = {name: len(getattr(suffix_kernels, name).nopython_signatures) for name in kernels}
    assert {before[name] for name in called} == {1}

    drafter = lookup(share=True, min_probability=1, length_offset=1, num_draft_tokens=64)
    answer(drafter, [1], list(range(600)))
    row = row_of(0, list(np.arange(700)))
    drafter.start([row])
    while not drafter.prepare(row, 64):
        pass
    drafter.propose([row], [5])
    other = PromptLookup("y", PromptLookupSettings())
    other.start([row])
    other.propose([row], [3])

    after = {name: len(getattr(suffix_kernels, name).nopython_signatures) for name in kernels}
    assert after == before


def test_code_that_cannot_be_kept_on_disk_is_compiled_all_the_same() -> None:
    namespace: dict[str, Any] = {}
    exec("def double(x):\n    return 2 * x", namespace)  # no file, so no folder for the cache

    double = suffix_kernels.compiled(namespace["double"])

    assert double(21) == 42
    assert double.nopython_signatures
