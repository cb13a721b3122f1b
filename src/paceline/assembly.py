"""The composition root: configuration to running engine. The only place that knows every part."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
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
    Request,
    identity_of_arms,
    join_arm,
    split_arm,
)
from paceline.costs.table import CostTable
from paceline.drafting.base import BuildContext
from paceline.drafting.catalog import check_settings, find_kind
from paceline.drafting.draft_model import DraftModel
from paceline.drafting.none import NoneDrafter
from paceline.engine import Driver, Engine, TextStream, raise_failure
from paceline.errors import ArtefactError, ConfigError, RequestError
from paceline.models.detokenizer import Detokenizer
from paceline.models.generation_config import end_tokens, unusable, with_defaults
from paceline.models.language_model import LanguageModel
from paceline.models.loading import load_language_model, load_tokenizer
from paceline.models.self_checks import check_exact, check_packed_forward
from paceline.models.vocabulary import Vocabulary, check_same_vocabulary
from paceline.requests import SETTINGS, RequestSettings, read_prompt
from paceline.selection import (
    AdaptiveController,
    Arm,
    Guard,
    PolicyIdentity,
    TablePrices,
    is_policy,
    load_policy,
)
from paceline.selection.artefact import read_card
from paceline.selection.drift import RANGE_FILE, DriftAlarm, TrainingRange
from paceline.store import DecisionLog, LogHeader, is_collection

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator, Sequence

    import numpy as np
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from paceline.costs import Objective
    from paceline.drafting.base import Drafter
    from paceline.engine import Progress
    from paceline.engine.loop import Choose, OnComplete
    from paceline.selection import Policy

    Prompt = str | Mapping[str, Any] | Sequence[Mapping[str, Any]]
    DraftSpec = PreTrainedModel | Drafter | tuple[PreTrainedModel, PreTrainedTokenizerBase]


@dataclass(slots=True)
class Parts:
    """Loaded models and drafters, before an engine drives them."""

    config: Config
    target: LanguageModel
    tokenizer: PreTrainedTokenizerBase
    vocabulary: Vocabulary
    drafters: dict[str, Drafter]  # `none` first
    detokenizer: Detokenizer = field(init=False)

    def __post_init__(self) -> None:
        self.detokenizer = Detokenizer.of(self.tokenizer, self.vocabulary)

    def text(self, tokens: Sequence[int]) -> str:
        """The text of token ids, without special tokens."""
        return self.detokenizer(tokens)

    def build_context(self) -> BuildContext:
        """What one more drafter would be built amid."""
        chunk = self.config.engine.prefill_chunk
        return BuildContext(self.target, self.tokenizer, self.vocabulary, self.drafters, chunk)


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
        parts.drafters[name] = kind.build(name, settings[name], parts.build_context())
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
            model = DraftModel.from_model(name, wrapped, parts.build_context())
        parts.drafters[name] = model
    return parts


class Pace:
    """A target with its drafters, ready to generate. Made by `paceline.load`.

    Thread-safe: any threads, generators and asyncio tasks may use one `Pace` at the same time, and
    their requests are decoded together.
    """

    def __init__(
        self,
        parts: Parts,
        choose: Choose | None = None,
        controller: AdaptiveController | None = None,
        on_complete: OnComplete | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        self.parts = parts
        self.controller = controller
        self._notes = tuple(notes)
        engine_section = parts.config.engine
        self.engine = Engine(
            parts.target,
            parts.drafters,
            decode=parts.detokenizer,
            choose=choose,
            controller=controller,
            on_complete=on_complete,
            **engine_section.model_dump(),
        )
        self.driver = Driver(self.engine)

    @property
    def drafters(self) -> list[str]:
        """The arms' names, `none` first."""
        return list(self.parts.drafters)

    @property
    def notes(self) -> list[str]:
        """Notes on the policy, the target and the drafters, one line each."""
        cut = self.parts.target.context_note
        target = [f"target: {cut}"] if cut else []
        return [*self._notes, *target, *(d.note for d in self.parts.drafters.values() if d.note)]

    def encode(self, prompt: Prompt) -> list[int]:
        """Return a prompt's token ids: a string as it is, one or several messages by the chat template.

        Raises RequestError for anything else, and for messages that the template cannot render.
        """
        return list(self._encode(read_prompt(prompt)))

    def _encode(self, prompt: str | tuple[int, ...] | list[dict[str, Any]]) -> Sequence[int]:
        if isinstance(prompt, tuple):
            return prompt
        tokenizer = self.parts.tokenizer
        if isinstance(prompt, str):
            ids: list[int] = tokenizer(prompt)["input_ids"]
            return ids
        if getattr(tokenizer, "chat_template", None) is None:
            raise RequestError(
                "messages were given but the target's tokenizer has no chat template; "
                "give the prompt as a string"
            )
        try:
            rendered = tokenizer.apply_chat_template(
                prompt, add_generation_prompt=True, tokenize=True, return_dict=False
            )
        except Exception as error:  # a template is the model's own code
            reason = " ".join(str(error).split()) or type(error).__name__
            raise RequestError(
                f"the chat template cannot render the messages: {reason[:200]}"
            ) from error
        return list(rendered)

    def stop_token_ids(self) -> frozenset[int]:
        """Ids that end an answer: the target's generation config, else the tokenizer's."""
        # the target never emits an id outside its vocabulary
        num_logits = self.parts.target.num_logits
        ends = end_tokens(self.parts.target.model, self.parts.tokenizer)
        return frozenset(token for token in ends if 0 <= token < num_logits)

    def request(
        self,
        prompt: Prompt | Sequence[int] | np.ndarray | torch.Tensor,
        id: str = "0",
        generation_config: GenerationDefaults | None = None,
        **settings: Any,
    ) -> Request:
        """Build a checked request; `settings` are the fields of `RequestSettings`.

        generation_config: `auto` takes what the call does not set from the target's own generation
        configuration, `none` ignores it; by default as this pace was loaded.

        prompt: a string, a list of messages or one message, or token ids as a sequence or a
        one-dimensional array. Raises RequestError that names the setting it cannot serve.
        """
        unsupported = next((name for name in settings if name not in SETTINGS), None)
        if unsupported is not None:
            raise RequestError(
                f"generation setting '{unsupported}' is not supported"
                f"{nearest(unsupported, list(SETTINGS))}"
            )
        read = RequestSettings.read(settings)
        tokens = tuple(self._encode(read_prompt(prompt)))
        eos = frozenset() if read.ignore_eos else self.stop_token_ids()
        generation_config = generation_config or self.parts.config.generation_config
        if generation_config not in get_args(GenerationDefaults):
            raise RequestError(f"generation_config must be auto or none, got {generation_config!r}")
        if generation_config == "auto":
            given = read.given()
            merged = with_defaults(self.parts.target, given, len(tokens), read.stop_token_ids | eos)
            if merged != given:
                read = _read_defaults(merged)
        return self.engine.accept(read.request(tokens, id, eos))

    def complete(self, prompt: Prompt, **settings: Any) -> Completion:
        """Complete one prompt, a string or a list of messages; `settings` as in `request`."""
        return next(self.driver.generate([self.request(prompt, **settings)]))

    async def acomplete(self, prompt: Prompt, **settings: Any) -> Completion:
        """Complete one prompt from an asyncio task; cancelling the task cancels the request.

        Raises QueueFullError if too many requests wait already.
        """
        return await self.driver.acomplete(self.request(prompt, **settings))

    def generate(self, prompts: Sequence[Prompt], **settings: Any) -> list[Completion]:
        """Complete several prompts, decoded together; completions come in the prompts' order.

        `settings` are those of `request` and hold for all of them.
        """
        given: Any = prompts  # whatever its type says
        several = isinstance(given, Iterable) and not isinstance(given, (str, bytes, Mapping))
        given = list(given) if several else []
        # one conversation is a list of messages
        if not several or (given and isinstance(given[0], Mapping)):
            raise RequestError("generate takes a list of prompts; use complete for one prompt")
        requests = [self.request(p, id=str(i), **settings) for i, p in enumerate(given)]
        done = {c.request_id: c for c in self.driver.generate(requests)}
        return [done[request.id] for request in requests]

    def stream(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Yield the completions of prepared requests, as they finish.

        Raises DecodingError at the first that fails. Closing the iterator cancels what is left.
        """
        return self.driver.generate(requests)

    def stream_text(self, prompt: Prompt, **settings: Any) -> Iterator[str]:
        """Yield one answer's text in pieces as they are decoded, which together are its `text`.

        Closing the iterator cancels the request. Raises DecodingError if it fails on the way.
        """
        request = self.request(prompt, **settings)
        stream = TextStream(self.parts.detokenizer, request.stop_strings)
        return _pieces(stream, (progress for _, progress in self.driver.progress([request])))

    async def astream_text(self, prompt: Prompt, **settings: Any) -> AsyncGenerator[str, None]:
        """Yield one answer's text in pieces to an asyncio task, as `stream_text` does.

        Raises QueueFullError if too many requests wait already.
        """
        request = self.request(prompt, **settings)
        stream = TextStream(self.parts.detokenizer, request.stop_strings)
        async with aclosing(self.driver.aprogress(request)) as progresses:
            async for progress in progresses:
                if piece := _piece(stream, progress):
                    yield piece


def _read_defaults(settings: dict[str, Any]) -> RequestSettings:
    """Validate a call's settings merged with the model's own."""
    try:
        return RequestSettings.read(settings)
    except RequestError as error:
        raise unusable(error) from error


def _pieces(stream: TextStream, progresses: Iterator[Progress]) -> Iterator[str]:
    for progress in progresses:
        if piece := _piece(stream, progress):
            yield piece


def _piece(stream: TextStream, progress: Progress) -> str:
    """Return the text that is final after some progress. Raises DecodingError for a failed request."""
    raise_failure(progress)
    if progress.completion is None:
        return stream.push(progress.new_tokens)
    return stream.finish(progress.completion.text)


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
    the configuration says, if it is there; without one, requests must name a drafter. The same holds
    if that policy cannot be used (made for other models, without this machine's costs, damaged):
    `notes` says why, and a request for `auto` is refused with the reason. A policy named with
    `policy` raises ArtefactError instead; `with_policy=False` loads none. Drafters that stop by
    expected gain are given the configuration's cost table; without one ArtefactError is raised.
    generation_config: `auto` or `none`, overrides the configuration; see `Pace.request`.
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
        pace = Pace(parts, on_complete=open_log(parts))
        if with_policy and target is None:
            pace.engine.why_no_policy = steps_to_policy(parts.config)
        return pace
    try:
        return _with_policy(parts, folder)
    except ArtefactError as error:
        if policy is not None:
            raise
        pace = Pace(parts, on_complete=open_log(parts), notes=[f"no policy is used: {error}"])
        pace.engine.why_no_policy = str(error)
        return pace


def steps_to_policy(config: Config) -> str:
    """Return a message that there is no policy yet, with the commands that make one."""
    paths = config.paths
    steps = ["`paceline learn`"]
    if not paths.costs.is_file():
        steps.insert(0, "`paceline profile`")
    if not is_collection(paths.store):
        steps.insert(0, "`paceline collect PROMPTS`")
    return f"there is none in {paths.policy} yet; run {', then '.join(steps)}"


def _with_policy(parts: Parts, folder: Path) -> Pace:
    """Assemble parts with a folder's policy. Raises ArtefactError if it does not fit them."""
    loaded = _policy(parts, folder)
    controlled = TrainingRange.load(folder) if (folder / RANGE_FILE).is_file() else None
    controller = build_controller(parts, loaded.arms, objective=loaded.objective)
    on_complete = open_log(parts, controlled, dict(read_card(folder).encoders))
    return Pace(parts, loaded.choose, controller, on_complete, loaded.notes)


def _policy(parts: Parts, folder: Path) -> Policy:
    """The policy of a folder, with this machine's costs where there are any."""
    path = parts.config.paths.costs
    costs = CostTable.load(path) if path.is_file() else None
    section = parts.config.selection
    return load_policy(folder, policy_identity(parts), costs, selection=section)


def build_controller(
    parts: Parts,
    arms: Sequence[str],
    costs: CostTable | None = None,
    objective: Objective = 0.0,
) -> AdaptiveController | None:
    """What the configuration's `selection` asks for over these arms and all drafters; None if nothing.

    Raises ArtefactError unless this machine's costs of all of them are given, or where they should be.
    """
    section = parts.config.selection
    if not section.is_adaptive:
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
    return AdaptiveController(
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
    controlled: TrainingRange | None = None,
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
    alarm = DriftAlarm(controlled) if controlled is not None else None
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
