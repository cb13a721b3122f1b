"""The composition root: configuration to running engine. The only place that knows every part."""

from __future__ import annotations

import secrets
import warnings
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch

from paceline.config import Config, GenerationDefaults, ModelSection, load_config, nearest
from paceline.contracts import (
    AT,
    AUTO,
    NONE,
    Completion,
    Context,
    LogitRules,
    Request,
    SamplingParams,
    identity_of_arms,
    join_arm,
    split_arm,
)
from paceline.costs.table import CostTable
from paceline.drafting.base import Surroundings
from paceline.drafting.catalog import check_settings, find_kind
from paceline.drafting.draft_model import DraftModel, DraftModelSettings
from paceline.drafting.none import NoneDrafter
from paceline.engine import Engine, TextStream
from paceline.errors import ArtefactError, ConfigError, DecodingError, RequestError
from paceline.models.exact import check_exact
from paceline.models.generation_config import DEFAULT_NEW_TOKENS, end_tokens, with_defaults
from paceline.models.language_model import LanguageModel, check_packed_forward
from paceline.models.loading import load_language_model, load_tokenizer
from paceline.models.vocabulary import Vocabulary, check_same_vocabulary
from paceline.selection import (
    Arm,
    Guard,
    PolicyIdentity,
    TablePrices,
    Watch,
    is_policy,
    load_policy,
)
from paceline.selection.artefact import read_card
from paceline.selection.drift import RANGE_FILE, DriftAlarm, TrainingRange
from paceline.store import DecisionLog, LogHeader
from paceline.warping import check_sampling

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from paceline.costs import Objective
    from paceline.drafting.base import Drafter
    from paceline.engine.loop import Choose, OnComplete
    from paceline.selection import Policy

    Prompt = str | Sequence[Mapping[str, str]]
    DraftSpec = PreTrainedModel | Drafter | tuple[PreTrainedModel, PreTrainedTokenizerBase]


@dataclass(slots=True)
class Parts:
    """Loaded models and drafters, before an engine drives them."""

    config: Config
    target: LanguageModel
    tokenizer: PreTrainedTokenizerBase
    vocabulary: Vocabulary
    drafters: dict[str, Drafter]  # `none` first

    def text(self, tokens: Sequence[int]) -> str:
        """The text of token ids, without special tokens."""
        text = self.tokenizer.decode(
            list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return str(text)

    def surroundings(self) -> Surroundings:
        """What one more drafter would be built amid."""
        chunk = self.config.engine.prefill_chunk
        return Surroundings(self.target, self.tokenizer, self.vocabulary, self.drafters, chunk)


def build(config: Config) -> Parts:
    """Load everything a configuration names. Cheap mistakes are found before weights are read."""
    settings = {name: check_settings(name, d) for name, d in config.drafters.items()}
    kinds = {name: find_kind(name, d.kind) for name, d in config.drafters.items()}
    _check_names(settings)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    tokenizer = load_tokenizer(config.target)
    vocabulary = Vocabulary.of(tokenizer)
    for name, kind in kinds.items():
        kind.check(name, settings[name], vocabulary)
    target = load_language_model(config.target, "target", config.exact)
    parts = Parts(config, target, tokenizer, vocabulary, {NONE: NoneDrafter()})
    for name, kind in kinds.items():
        parts.drafters[name] = kind.build(name, settings[name], parts.surroundings())
    return parts


def _check_names(names: Iterable[str]) -> None:
    for name in names:
        if name in (AUTO, NONE):
            raise ConfigError(f"a drafter cannot be called '{name}'; that name has its own meaning")
        if AT in name:
            raise ConfigError(
                f"drafter '{name}': names hold no '{AT}', which stands before a draft length"
            )


def build_from_objects(
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    drafters: Mapping[str, DraftSpec],
    config: Config,
) -> Parts:
    """The same from models already in memory, left as they are but put in evaluation mode.

    A drafter is a transformers model, a pair of model and tokenizer, or a `Drafter`. A model alone
    is taken to share the target's tokenizer; with its own tokenizer that is checked.
    """
    _check_names(drafters)
    vocabulary = Vocabulary.of(tokenizer)
    language_model = LanguageModel(target, "target", exact=config.exact)
    check_packed_forward(language_model)
    if config.exact:
        check_exact(language_model)
    parts = Parts(config, language_model, tokenizer, vocabulary, {NONE: NoneDrafter()})
    for name, spec in drafters.items():
        model: Any = spec
        if isinstance(spec, tuple):
            model, own_tokenizer = spec
            check_same_vocabulary(name, vocabulary, Vocabulary.of(own_tokenizer))
        if isinstance(model, torch.nn.Module):
            wrapped = LanguageModel(model, name)  # type: ignore[arg-type]
            if wrapped.num_logits < vocabulary.num_tokens:
                raise ConfigError(
                    f"drafter '{name}' has {wrapped.num_logits} output tokens, the target's "
                    f"tokenizer {vocabulary.num_tokens}; use a drafter with the target's tokenizer"
                )
            check_packed_forward(wrapped)
            default = DraftModelSettings.model_fields["num_draft_tokens"].default
            model = DraftModel.beside(name, wrapped, default, parts.surroundings())
        parts.drafters[name] = model
    return parts


class Pace:
    """A target with its drafters, ready to generate. Made by `paceline.load`."""

    def __init__(
        self,
        parts: Parts,
        choose: Choose | None = None,
        watch: Watch | None = None,
        on_complete: OnComplete | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        self.parts = parts
        self.watch = watch
        self._notes = tuple(notes)
        engine_section = parts.config.engine
        self.engine = Engine(
            parts.target,
            parts.drafters,
            decode=self._decode,
            choose=choose,
            watch=watch,
            on_complete=on_complete,
            **engine_section.model_dump(),
        )

    @property
    def drafters(self) -> list[str]:
        """The arms' names, `none` first."""
        return list(self.parts.drafters)

    @property
    def notes(self) -> list[str]:
        """What is worth knowing of the policy, and of how the drafters were built, a line each."""
        return [*self._notes, *(d.note for d in self.parts.drafters.values() if d.note)]

    def _decode(self, tokens: Sequence[int]) -> str:
        return self.parts.text(tokens)

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt. A string goes in as it is, messages through the chat template."""
        tokenizer = self.parts.tokenizer
        if isinstance(prompt, str):
            ids: list[int] = tokenizer(prompt)["input_ids"]
            return ids
        if getattr(tokenizer, "chat_template", None) is None:
            raise RequestError(
                "messages were given but the target's tokenizer has no chat template; "
                "give the prompt as a string"
            )
        return list(
            tokenizer.apply_chat_template(
                [dict(message) for message in prompt],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=False,
            )
        )

    def stop_token_ids(self) -> frozenset[int]:
        """Ids that end an answer: the target's generation config, else the tokenizer's."""
        return end_tokens(self.parts.target.model, self.parts.tokenizer)

    def request(
        self,
        prompt: Prompt | Sequence[int],
        id: str = "0",
        generation_config: GenerationDefaults | None = None,
        **settings: Any,
    ) -> Request:
        """Build a checked request. A prompt may also be token ids.

        generation_config: `auto` takes what the call does not set from the target's own generation
        configuration, `none` leaves that aside; by default as this pace was loaded. The settings are
        those of `_request`: max_new_tokens, temperature, top_k, top_p, min_p, seed, sampling, stop,
        ignore_eos, drafter, logprobs and the rules.
        """
        is_ids = not isinstance(prompt, str) and all(isinstance(t, int) for t in prompt)
        tokens = list(prompt) if is_ids else self.encode(prompt)  # type: ignore[arg-type]
        generation_config = generation_config or self.parts.config.generation_config
        if generation_config not in get_args(GenerationDefaults):
            raise RequestError(f"generation_config must be auto or none, got {generation_config!r}")
        if generation_config == "auto":
            ends = frozenset() if settings.get("ignore_eos") else self.stop_token_ids()
            settings = with_defaults(self.parts.target, settings, len(tokens), ends)
        return self._request(tokens, id, **settings)  # type: ignore[arg-type]

    def _request(
        self,
        tokens: Sequence[int],
        id: str,
        max_new_tokens: int = DEFAULT_NEW_TOKENS,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int | None = None,
        sampling: str = "auto",
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
        drafter: str = AUTO,
        logprobs: bool = False,
        **rules: Any,
    ) -> Request:
        """The request of these settings and no others.

        `sampling`: auto | residual | block | invariant; auto is `invariant` when a seed is given and
        `residual` otherwise. `rules` are the fields of `LogitRules`: logit_bias, repetition_penalty,
        presence_penalty, frequency_penalty, no_repeat_ngram_size, min_new_tokens, suppress_tokens,
        forced_tokens, processors and the penalties' scopes.
        """
        unsupported = next((name for name in rules if name not in _RULES), None)
        if unsupported is not None:
            raise RequestError(
                f"generation setting '{unsupported}' is not supported{nearest(unsupported, _SETTINGS)}"
            )
        if sampling not in ("auto", "residual", "block", "invariant"):
            raise RequestError(
                f"sampling must be auto, residual, block or invariant, got '{sampling}'"
            )
        method = sampling
        if sampling == "auto":
            method = "greedy" if temperature == 0 else "residual" if seed is None else "invariant"
        params = SamplingParams(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            seed=secrets.randbits(62) if seed is None else seed,
            method=method,  # type: ignore[arg-type]
        )
        check_sampling(params)
        request = Request(
            id=id,
            prompt_tokens=tuple(tokens),
            max_new_tokens=max_new_tokens,
            sampling=params,
            stop_token_ids=frozenset() if ignore_eos else self.stop_token_ids(),
            stop_strings=(stop,) if isinstance(stop, str) else tuple(stop),
            drafter=drafter,
            rules=_rules(rules) if rules else None,
            logprobs=logprobs,
        )
        self.engine.check(request)
        return request

    def complete(self, prompt: Prompt, **settings: Any) -> Completion:
        """Complete one prompt, a string or a list of messages; `settings` as in `request`."""
        return next(self.engine.generate([self.request(prompt, **settings)]))

    def generate(self, prompts: Sequence[Prompt], **settings: Any) -> list[Completion]:
        """Complete several prompts, decoded together; completions come in the prompts' order.

        `settings` are those of `request` and hold for all of them.
        """
        if isinstance(prompts, str) or (prompts and isinstance(prompts[0], dict)):
            raise RequestError("generate takes a list of prompts; use complete for one prompt")
        requests = [self.request(p, id=str(i), **settings) for i, p in enumerate(prompts)]
        done = {c.request_id: c for c in self.engine.generate(requests)}
        return [done[request.id] for request in requests]

    def stream(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Completions of prepared requests, as they finish."""
        return self.engine.generate(requests)

    def stream_text(self, prompt: Prompt, **settings: Any) -> Iterator[str]:
        """Pieces of one answer's text as they are decoded; together they are the completion's text.

        Closing the iterator cancels the request. Raises DecodingError if it fails on the way.
        """
        request = self.request(prompt, **settings)
        stream = TextStream(self._decode, request.stop_strings)
        ticket = self.engine.submit(request)
        completion = None
        try:
            while completion is None:
                for progress in self.engine.step():
                    if progress.ticket != ticket:
                        continue
                    completion = progress.completion
                    piece = (
                        stream.push(progress.new_tokens)
                        if completion is None
                        else stream.finish(completion.text)
                    )
                    if piece:
                        yield piece
            if completion.error is not None:
                raise DecodingError(completion.error)
        finally:
            if completion is None:
                self.engine.cancel(ticket)
                self.engine.step()


_RULES = [field.name for field in fields(LogitRules)]
_SETTINGS = [
    *("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "seed", "sampling", "stop"),
    *("ignore_eos", "drafter", "logprobs", *_RULES),
]


def _rules(given: Mapping[str, Any]) -> LogitRules:
    """Rules from what a caller wrote: any collection will do."""
    values = dict(given)
    if "suppress_tokens" in values:
        values["suppress_tokens"] = frozenset(values["suppress_tokens"])
    for name in ("forced_tokens", "processors"):
        if name in values:
            values[name] = tuple(values[name])
    return LogitRules(**values)


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
    """A target with its drafters, ready to generate.

    Either a configuration (a path to paceline.yaml, or a `Config`), or `target`, `tokenizer` and
    `drafters` as objects in memory. A learned policy is loaded from `policy`, by default from where
    the configuration says, if it is there; without one, requests must name a drafter. A policy made
    for other models raises ArtefactError; `with_policy=False` leaves it alone. Drafters that stop by
    expected gain are given the configuration's cost table; without one ArtefactError is raised.
    generation_config: `auto` or `none`, before what the configuration says; see `Pace.request`.
    """
    if generation_config not in (None, *get_args(GenerationDefaults)):
        raise ConfigError(f"generation_config must be auto or none, got {generation_config!r}")
    if (config is None) == (target is None):
        raise ConfigError("load takes a configuration, or target=, tokenizer= and drafters=")
    if target is not None:
        if tokenizer is None:
            raise ConfigError("load(target=...) also needs tokenizer=")
        placeholder = Config(target=ModelSection(model="in memory"))
        parts = build_from_objects(target, tokenizer, drafters or {}, placeholder)
    else:
        assert config is not None
        parts = build(config if isinstance(config, Config) else load_config(config))
    if generation_config is not None:
        update = {"generation_config": generation_config}
        parts.config = parts.config.model_copy(update=update)
    _price(parts)
    folder = Path(policy) if policy is not None else parts.config.paths.policy
    if not with_policy or (policy is None and (target is not None or not is_policy(folder))):
        return Pace(parts, on_complete=open_log(parts))
    loaded = _policy(parts, folder)
    watched = TrainingRange.load(folder) if (folder / RANGE_FILE).is_file() else None
    watch = watch_for(parts, loaded.arms, objective=loaded.objective)
    on_complete = open_log(parts, watched, dict(read_card(folder).encoders))
    return Pace(parts, loaded.choose, watch, on_complete, loaded.notes)


def _policy(parts: Parts, folder: Path) -> Policy:
    """The policy of a folder, with this machine's costs where there are any."""
    path = parts.config.paths.costs
    costs = CostTable.load(path) if path.is_file() else None
    section = parts.config.selection
    return load_policy(folder, policy_identity(parts), costs, selection=section)


def watch_for(
    parts: Parts,
    arms: Sequence[str],
    costs: CostTable | None = None,
    objective: Objective = 0.0,
) -> Watch | None:
    """What the configuration's `selection` asks for over these arms and all drafters; None if nothing.

    Raises ArtefactError unless this machine's costs of all of them are given, or where they should be.
    """
    section = parts.config.selection
    if not section.watches:
        return None
    named = [split_arm(arm) for arm in dict.fromkeys([*parts.drafters, *arms])]
    lengths = {name: drafter.num_draft_tokens for name, drafter in parts.drafters.items()}
    try:
        costs = costs or CostTable.load(parts.config.paths.costs)
        lines = identity_of_arms({n: d.identity() for n, d in parts.drafters.items()})
        costs.check(lengths, lines, parts.target.fingerprint())
    except ArtefactError as error:
        raise ArtefactError(
            f"'selection' asks for more than the policy's choice, which needs this machine's costs: "
            f"{error}, or leave 'selection' out"
        ) from error
    return Watch(
        [
            Arm(name if k is None else join_arm(name, k), name, k or lengths[name])
            for name, k in named
        ],
        TablePrices(costs, lengths, objective),
        adapt=section.adapt != "off",
        guard=Guard() if section.guard else None,
        explore=section.explore,
    )


def _price(parts: Parts) -> None:
    """Hand this machine's costs to drafters that draft by them; ArtefactError if there are none."""
    waiting = {name: d for name, d in parts.drafters.items() if d.wants_prices}
    if not waiting:
        return
    try:
        costs = CostTable.load(parts.config.paths.costs)
        costs.check(waiting, identity_of_arms({n: d.identity() for n, d in waiting.items()}))
    except ArtefactError as error:
        raise ArtefactError(
            f"drafter '{next(iter(waiting))}' stops by expected gain, which needs this machine's "
            f"costs: {error}, or set another 'stop'"
        ) from error
    for drafter in waiting.values():
        drafter.price(costs)


def open_log(
    parts: Parts,
    watched: TrainingRange | None = None,
    encoders: Mapping[str, str] | None = None,
) -> OnComplete | None:
    """What is done with completed requests: they go to the configuration's decision log, and the
    user is warned when they leave the policy's training range. None where neither is there.

    encoders: whose features the policy sees, with their identity lines.
    """
    section, log = parts.config.log, None
    if section.folder is not None:
        identity = policy_identity(parts)
        header = LogHeader(
            identity.target,
            identity.tokenizer,
            dict(identity.drafters),
            dict(encoders or {}),
            section.tokens,
        )
        log = DecisionLog(section.folder, header)
    alarm = DriftAlarm(watched) if watched is not None else None
    if log is None and alarm is None:
        return None

    def note(request: Request, completion: Completion, context: Context | None) -> None:
        features = completion.decision.features
        if log is not None:
            rows = context.rows_in_flight if context is not None else None
            log.write(request, completion, features, rows)
        if alarm is not None and features is not None:
            # of several arms it is not known which accepted what
            as_chosen = not (completion.switches or "," in completion.decision.policy)
            rounds = completion.rounds if as_chosen else []
            accepted, drafted = sum(r.accepted for r in rounds), sum(r.drafted for r in rounds)
            raised = alarm.observe(features, completion.decision.arm, accepted, drafted)
            if raised is not None:
                warnings.warn(str(raised), stacklevel=2)

    return note


def policy_identity(parts: Parts) -> PolicyIdentity:
    """What a policy must have been learned for to serve these parts."""
    return PolicyIdentity(
        target=parts.target.fingerprint(),
        tokenizer=parts.vocabulary.hash(),
        hidden_size=parts.target.hidden_size,
        drafters=identity_of_arms({name: d.identity() for name, d in parts.drafters.items()}),
    )
