"""Encoder-decoder targets write transformers' own greedy text, whatever drafts and in every batch.

The encoder reads the prompt; drafters read prompt and output, or have an encoder of their own.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from scipy import stats
from support.examples import EXAMPLES, OTHER_KINDS, add_examples
from support.reference import greedy_reference
from transformers import GenerationMixin

from paceline.assembly import Pace, Parts, build_from_objects
from paceline.config import Config, EngineSection, ModelSection
from paceline.contracts import Decision, Request
from paceline.errors import ModelError, RequestError
from paceline.integrations import hf
from paceline.models.self_checks import check_sublayers
from paceline.replay import max_output, replay, target_distributions
from paceline.testing.tiny_models import ENCODER_DECODERS, perturbed, tiny_model
from paceline.testing.tokenizers import byte_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transformers import PreTrainedModel

    from paceline.contracts import Completion, Context

NEAR_TIE = 1e-4
CONTEXT = 96
READS_TOKENS = [name for name in ENCODER_DECODERS if name != "whisper"]
POST_NORMS = ("bart", "marian")  # their layers do more than add to the residual stream
# seed and deviation of weights that write many different tokens
WEIGHTS = {
    "t5": (4, 0.4), "mt5": (5, 0.4), "umt5": (3, 0.4), "bart": (1, 0.6), "mbart": (4, 0.6),
    "marian": (4, 0.6), "pegasus": (2, 0.6),
}  # fmt: skip
ARMS = ("none", "near", "causal", *OTHER_KINDS)
TEXTS = ("a", "to be or not to be or not", "spam, spam, eggs and spam; spam, spam, eggs", "x" * 70)


@dataclass
class Subject:
    """A target with an encoder, its drafters by name, and prompts."""

    parts: Parts
    prompts: list[tuple[int, ...]]
    known: dict[tuple[tuple[int, ...], int], list[int]] = field(default_factory=dict)

    @property
    def model(self) -> PreTrainedModel:
        return self.parts.target.model

    def reference(self, prompt: tuple[int, ...], max_new_tokens: int) -> list[int]:
        key = (prompt, max_new_tokens)
        if key not in self.known:
            found = greedy_reference(self.model, *key)
            assert found.margin > NEAR_TIE, "a near tie: choose another prompt or seed"
            self.known[key] = found.tokens
        return self.known[key]

    def pace(self, max_rows: int = 4, choose: Callable[[Context], Decision] | None = None) -> Pace:
        p = self.parts
        config = p.config.model_copy(update={"engine": EngineSection(max_rows=max_rows)})
        return Pace(Parts(config, p.target, p.tokenizer, p.vocabulary, p.drafters), choose)


@pytest.fixture(scope="module")
def subjects() -> Callable[[str], Subject]:
    built: dict[str, Subject] = {}

    def get(name: str) -> Subject:
        if name not in built:
            seed, std = WEIGHTS[name]
            model = tiny_model(name, seed, context=CONTEXT, std=std)
            tokenizer = byte_tokenizer()
            drafters = {"near": perturbed(model, 0.05), "causal": tiny_model("llama", seed=77)}
            config = Config(target=ModelSection(model="in memory"))
            parts = build_from_objects(model, tokenizer, drafters, config)
            add_examples(parts, without=("layer_skip",) if name in POST_NORMS else ())
            prompts = [tuple(tokenizer(text)["input_ids"]) for text in TEXTS]
            built[name] = Subject(parts, prompts)
        return built[name]

    return get


@pytest.fixture(params=READS_TOKENS)
def subject(request: pytest.FixtureRequest, subjects: Callable[[str], Subject]) -> Subject:
    return subjects(request.param)


@pytest.fixture
def t5(subjects: Callable[[str], Subject]) -> Subject:
    return subjects("t5")


def run(pace: Pace, requests: Sequence[Request]) -> list[Completion]:
    done = {completion.request_id: completion for completion in pace.stream(requests)}
    return [done[request.id] for request in requests]


# --- text -----------------------------------------------------------------------------------------


def test_every_kind_of_drafter_is_tested_here(t5: Subject) -> None:
    assert {d.kind for d in t5.parts.drafters.values()} == set(EXAMPLES)


def test_text_is_transformers_own_in_batches_of_any_lengths_and_drafters(subject: Subject) -> None:
    pace = subject.pace()
    arms = [arm for arm in ARMS if arm in subject.parts.drafters]
    limits = itertools.cycle([28, 5, 28, 1, 11])
    requests = [
        pace.request(prompt, id=str(i), max_new_tokens=next(limits), drafter=arm, ignore_eos=True)
        for i, (arm, prompt) in enumerate(itertools.product(arms, subject.prompts))
    ]

    completions = run(pace, requests)

    for request, completion in zip(requests, completions, strict=True):
        expected = subject.reference(request.prompt_tokens, request.max_new_tokens)
        assert completion.token_ids == expected, (request.drafter, request.id)
    said = {token for prompt in subject.prompts for token in subject.reference(prompt, 28)}
    # a random layer with its norm last writes few tokens
    few = type(subject.model).__name__.lower().startswith(POST_NORMS)
    assert len(said) > (3 if few else 15), "a degenerate text proves little"
    for arm in arms:
        rounds = [r for c in completions if c.drafter == arm for r in c.rounds]
        drafted, accepted = sum(r.drafted for r in rounds), sum(r.accepted for r in rounds)
        if arm == "near":
            assert 0 < accepted < drafted
        elif arm not in ("none", "causal", "cross_vocabulary"):
            assert accepted > 0, arm


def test_one_row_alone_writes_what_it_writes_in_a_batch(subject: Subject) -> None:
    pace = subject.pace(max_rows=1)
    for prompt in subject.prompts:
        completion = pace.complete(prompt, max_new_tokens=20, drafter="near", ignore_eos=True)
        assert completion.token_ids == subject.reference(prompt, 20)


def test_lookup_copies_from_the_source(t5: Subject) -> None:
    """The drafter alone is asked, since a random model copies nothing."""
    prompt = tuple(range(10, 40))
    lookup = t5.parts.drafters["prompt_lookup"]
    found = replay(lookup, prompt, list(range(20, 36)), 16)
    drafted, accepted = found.rounds.sum(axis=0).tolist()
    assert accepted >= 12
    assert drafted >= accepted


def test_answers_go_on_to_the_last_position_of_the_decoder(subjects: Any) -> None:
    subject = subjects("bart")
    pace = subject.pace()
    completion = pace.complete(
        subject.prompts[1], max_new_tokens=500, drafter="near", ignore_eos=True
    )
    assert len(completion.token_ids) == CONTEXT
    assert completion.token_ids == subject.reference(subject.prompts[1], 500)
    with pytest.raises(RequestError, match=f"encoder reads {CONTEXT}; shorten the prompt"):
        pace.request([5] * (CONTEXT + 1), drafter="none")


# --- sampling, rules and settings -----------------------------------------------------------------


def test_a_seed_gives_one_text_whatever_drafts(subject: Subject) -> None:
    pace = subject.pace()
    settings: dict[str, Any] = {"max_new_tokens": 24, "temperature": 0.7, "seed": 5}
    texts = [
        [c.token_ids for c in pace.generate(subject.prompts, drafter=arm, **settings)]
        for arm in ARMS
        if arm in subject.parts.drafters
    ]
    assert all(text == texts[0] for text in texts)


@pytest.mark.parametrize("arm", ["none", "near", "prompt_lookup", "cascade"])
def test_sampled_tokens_have_the_targets_distribution(t5: Subject, arm: str) -> None:
    pace, prompt, num = t5.pace(max_rows=16), t5.prompts[1], 600
    requests = [
        pace.request(
            prompt, id=str(i), max_new_tokens=3, temperature=0.15, top_k=4, drafter=arm,
            sampling="residual", seed=i, ignore_eos=True,
        )
        for i in range(num)
    ]  # fmt: skip
    texts = [tuple(c.token_ids) for c in run(pace, requests)]
    firsts = {text[:2] for text in texts}
    [first] = np.unique([text[0] for text in texts])[:1].tolist()
    before = target_distributions(
        pace.parts.target, prompt, [first, 0], sampling=requests[0].sampling
    )
    expected = before[1].numpy() * sum(text[0] == first for text in texts)
    counts = np.bincount([text[1] for text in texts if text[0] == first], minlength=len(expected))
    assert not counts[expected == 0].any()
    is_likely = expected > 5
    assert is_likely.sum() > 1, "a single token proves little"
    rest = [counts[~is_likely].sum()], [expected[~is_likely].sum()]
    seen = np.concatenate([counts[is_likely], rest[0]])
    wanted = np.concatenate([expected[is_likely], rest[1]])
    keep = wanted > 0
    assert stats.chisquare(seen[keep], wanted[keep], sum_check=False).pvalue > 1e-6
    assert len(firsts) > 2


@pytest.mark.parametrize(
    "settings",
    [
        {"no_repeat_ngram_size": 2},
        {"repetition_penalty": 1.4},
        {"forced_bos_token_id": 77},
        {"forced_eos_token_id": 3},
        {"begin_suppress_tokens": list(range(100))},
        {"suppress_tokens": list(range(60))},
        {"bad_words_ids": [[90], [100, 101]]},
        {"min_new_tokens": 9},
        {"max_length": 14},
    ],
    ids=lambda settings: next(iter(settings)),
)
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_the_models_own_settings_hold_at_every_node(
    subjects: Callable[[str], Subject], name: str, settings: dict[str, Any]
) -> None:
    subject = subjects(name)
    own: Any = subject.model.generation_config
    before = {key: getattr(own, key) for key in settings}
    try:
        for key, value in settings.items():
            setattr(own, key, value)
        limit = {} if "max_length" in settings else {"max_new_tokens": 18}
        pace = subject.pace()
        for prompt in subject.prompts[1:3]:
            ids: Any = torch.tensor([prompt])
            generate: Any = subject.model.generate
            expected = generate(input_ids=ids, do_sample=False, **limit)[0, 1:].tolist()
            for arm in ("none", "near", "suffix_lookup", "union"):
                completion = pace.complete(prompt, drafter=arm, ignore_eos=True, **limit)
                assert completion.token_ids == expected, arm
    finally:
        for key, value in before.items():
            setattr(own, key, value)


def test_a_models_own_beam_search_is_refused_and_can_be_left_out(t5: Subject) -> None:
    own: Any = t5.model.generation_config
    pace, prompt = t5.pace(), t5.prompts[1]
    own.num_beams, own.length_penalty, own.no_repeat_ngram_size = 4, 2.0, 2
    try:
        with pytest.raises(RequestError, match=r"num_beams=4.*'generation_config: no_beams'"):
            pace.complete(prompt, drafter="none")
        completion = pace.complete(
            prompt, drafter="near", generation_config="no_beams", max_new_tokens=16, ignore_eos=True
        )
        own.num_beams, own.length_penalty = 1, 1.0
        generate: Any = t5.model.generate
        expected = generate(input_ids=torch.tensor([prompt]), max_new_tokens=16)[0, 1:].tolist()
    finally:
        own.num_beams, own.length_penalty, own.no_repeat_ngram_size = 1, 1.0, None
    assert completion.token_ids == expected
    assert completion.token_ids != t5.reference(prompt, 16), "the n-gram rule changed nothing"


# --- policies, collection and transformers' own calls ---------------------------------------------


def test_the_policys_features_are_of_the_encoders_states(t5: Subject) -> None:
    seen: list[Context] = []

    def choose(context: Context) -> Decision:
        seen.append(context)
        return Decision("near")

    pace = t5.pace(choose=choose)
    [completion] = pace.generate([t5.prompts[2]], max_new_tokens=6, ignore_eos=True)
    encoder: Any = t5.model.get_encoder()
    hidden = encoder(input_ids=torch.tensor([t5.prompts[2]])).last_hidden_state[0]
    [context] = seen
    assert completion.drafter == "near"
    assert tuple(context.prompt_tokens) == t5.prompts[2]
    assert np.allclose(context.mean_hidden, hidden.mean(dim=0).detach().numpy(), atol=1e-5)


@pytest.mark.parametrize("arm", [arm for arm in ARMS if arm != "none"])
def test_replay_finds_the_rounds_of_the_engine(t5: Subject, arm: str) -> None:
    pace = t5.pace(max_rows=1)
    drafter = pace.parts.drafters[arm]
    for prompt in t5.prompts[:3]:
        real = pace.complete(prompt, max_new_tokens=24, drafter=arm, ignore_eos=True)
        before = pace.parts.target.num_before_output(len(prompt))
        limit = max_output(24, before, pace.parts.target.context_length)
        replayed = replay(drafter, prompt, real.token_ids, limit).rounds.tolist()
        assert replayed == [[r.drafted, r.accepted] for r in real.rounds]


def test_transformers_generate_hands_over_a_padded_batch(subject: Subject) -> None:
    prompts, longest = subject.prompts[:3], max(map(len, subject.prompts[:3]))
    ids = torch.tensor([[*p, *[0] * (longest - len(p))] for p in prompts])
    mask = torch.tensor([[1] * len(p) + [0] * (longest - len(p)) for p in prompts])
    generate: Any = subject.model.generate
    given = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 16, "do_sample": False}
    given["pad_token_id"] = 0
    pace = subject.pace()
    for arm in ("near", "prompt_lookup"):
        found = generate(**given, custom_generate=hf.generate, pace=pace, drafter=arm)
        assert torch.equal(found, generate(**given))
    one = {**given, "input_ids": ids[2:], "attention_mask": mask[2:]}
    near = pace.parts.drafters["near"]
    found = generate(**one, custom_generate=hf.assisted, drafter=near)
    assert torch.equal(found, generate(**one))


def test_transformers_generate_refuses_what_paceline_does_not_read(t5: Subject) -> None:
    ids, generate, pace = torch.tensor([[5, 6, 7]]), t5.model.generate, t5.pace()
    call: Any = {"custom_generate": hf.generate, "pace": pace, "max_new_tokens": 4}
    run_it: Any = generate
    with pytest.raises(RequestError, match="num_beams=3"):
        run_it(input_ids=ids, num_beams=3, **call)
    with pytest.raises(RequestError, match="'decoder_input_ids'"):
        run_it(input_ids=ids, decoder_input_ids=torch.tensor([[0, 9]]), **call)
    with pytest.raises(RequestError, match="padding_side='right'"):
        run_it(input_ids=ids, attention_mask=torch.tensor([[0, 1, 1]]), **call)


# --- layers, features -----------------------------------------------------------------------------


def test_sublayers_can_be_skipped_where_they_only_add(subject: Subject) -> None:
    if type(subject.model).__name__.lower().startswith(POST_NORMS):
        with pytest.raises(ModelError, match="more than add to the residual stream"):
            check_sublayers(subject.parts.target)
    else:
        check_sublayers(subject.parts.target)


def test_a_decoder_of_audio_features_writes_transformers_text() -> None:
    model, tokenizer = tiny_model("whisper", context=CONTEXT), byte_tokenizer()
    drafters = {"near": perturbed(model, 0.05), "causal": tiny_model("llama", seed=77)}
    config = Config(target=ModelSection(model="in memory"))
    pace = Pace(build_from_objects(model, tokenizer, drafters, config))
    shape = pace.parts.target.encoder.feature_shape  # type: ignore[union-attr]
    assert shape is not None
    heard = [torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    prompts = ([0], [0, 5, 9], [0, 5, 9, 4])
    expected = [
        GenerationMixin.generate(  # type: ignore[misc]
            model, input_features=f[None], decoder_input_ids=torch.tensor([p]), max_new_tokens=16,
            do_sample=False,
        )[0, len(p) :].tolist()
        for f, p in zip(heard, prompts, strict=True)
    ]  # fmt: skip
    for arm in ("none", "near", "causal"):
        requests = [
            pace.request(p, str(i), features=f, max_new_tokens=16, drafter=arm, ignore_eos=True)
            for i, (f, p) in enumerate(zip(heard, prompts, strict=True))
        ]
        completions = run(pace, requests)
        assert [c.token_ids for c in completions] == expected
        accepted = sum(r.accepted for c in completions for r in c.rounds)
        assert accepted > 0 or arm != "near"
    with pytest.raises(RequestError, match="give features="):
        pace.request([0], drafter="none")
    with pytest.raises(RequestError, match=r"got \[3, 4\]"):
        pace.request([0], drafter="none", features=np.zeros((3, 4), np.float32))
    with pytest.raises(RequestError, match="finite floats"):
        pace.request([0], drafter="none", features=torch.full(shape, torch.nan))


def test_features_are_refused_by_a_target_of_tokens(t5: Subject) -> None:
    with pytest.raises(RequestError, match="reads tokens, not features"):
        t5.pace().request([5], drafter="none", features=torch.zeros(2, 3))
