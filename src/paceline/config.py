"""The strict schema of paceline.yaml, one section per room.

A drafter's `settings` are checked by the drafter's own schema when it is built. Relative paths are
relative to the YAML file.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from paceline.errors import ConfigError, shorten, suggest_name

S = TypeVar("S", bound=BaseModel)
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Device = Literal["auto", "cpu", "cuda", "mps"]
GenerationDefaults = Literal["auto", "no_beams", "none"]

MAX_DRAFT_TOKENS: Final = 64
"""Maximum draft length of the schema, the cost table and CUDA's captured steps."""

# settings of drafters that name a file or folder of paceline's, relative to the YAML
_FILE_SETTINGS: Final = ("table", "skip_set", "answers")
# keys of the section `distillation` that name files or folders
_DISTILLATION_FILES: Final = (
    "data",
    "events",
    "measure",
    "out",
    "outputs",
    "pretrain_text",
    "start_from",
)
_MISSPELLED: Final = 0.65  # likeness of two keys, by difflib, from which one is taken for the other


class Section(BaseModel):
    """Strict base of all sections."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class ModelSection(Section):
    """A transformers causal LM.

    model: a local folder or hub name. forward: `auto` takes the compiled forward on a CPU and the lean
    one on other devices if it fits the model, else transformers' own. weights: `int8` rounds those of
    the compiled forward to 8 bits: free for a drafter, since the target verifies; a target's text is
    then that of the rounded model. adapter: folder or hub name of a PEFT adapter, which is merged into
    the weights. device_map: places the weights by accelerate's rules instead of on one `device`.
    """

    model: str
    revision: str | None = None
    dtype: Dtype = "auto"
    device: Device = "auto"
    forward: Literal["auto", "compiled", "lean", "transformers"] = "auto"
    weights: Literal["own", "int8"] = "own"
    trust_remote_code: bool = False
    adapter: str | None = None
    device_map: str | dict[str, str | int] | None = None

    @model_validator(mode="after")
    def _check_placement(self) -> ModelSection:
        if self.device_map is not None and self.device != "auto":
            raise ValueError("'device' and 'device_map' both place the weights; remove one")
        return self


class DrafterSection(Section):
    """A drafter: its kind, and the settings of that kind's own schema."""

    kind: str
    settings: dict[str, Any] = Field(default_factory=dict)


class EngineSection(Section):
    """Limits of the engine.

    max_rows: requests decoded at the same time. prefill_chunk: prompt tokens between two rounds.
    max_waiting: requests in the queue. max_positions: positions of the target's and each drafter's
    cache, which need the number of rows times the longest row, drafts included. prefix_positions:
    cached positions of past prompts; 0 caches none. max_drafter_mb: memory of the drafters' rows, in
    MB of 10^6 bytes, in addition to weights; a request whose drafter does not fit is decoded by
    `none`, and its decision says so.
    """

    max_rows: int = Field(default=8, ge=1)
    prefill_chunk: int = Field(default=512, ge=1)
    max_waiting: int | None = Field(default=None, ge=1)
    max_positions: int | None = Field(default=None, ge=1)
    prefix_positions: int = Field(default=2048, ge=0)
    max_drafter_mb: float | None = Field(default=None, ge=0)


DEFAULT_OBJECTIVE: Final = "throughput"


class LearningSection(Section):
    """How a policy is learned; `docs/learning.md` describes each learner.

    Keys that are not listed here are options of learners. Each learner checks its own ones before it
    trains, see `paceline.learning.learners`.

    draft_lengths: lengths at which a drafter is an arm in addition to its own, where drafts nest. alpha
    weighs similarity, by `metric`, against cost in the alignment reward. text_costs: seconds per token
    over the target's, of drafters that are known by their texts alone. objective: what is to be fast
    while several rows are in flight, the machine, this request, or a weight between (0 latency, 1
    throughput); see `costs.pricing`. loads: rows in flight for which a chooser with built-in prices is
    trained and portable ones are judged. held_out: share of the prompts that the report is made on.
    seeds: number of trainings, from `seed` on.
    """

    model_config = ConfigDict(extra="allow")

    learner: str = "acceptance"
    draft_lengths: tuple[Annotated[int, Field(ge=1, le=MAX_DRAFT_TOKENS)], ...] = (
        1,
        2,
        3,
        4,
        6,
        8,
        12,
    )

    reward: Literal["speed", "alignment"] = "speed"
    alpha: float = Field(default=0.5, ge=0.0, le=1.0)
    metric: Literal["rouge_1", "rouge_l", "edit", "prefix"] = "rouge_l"
    text_costs: dict[str, Annotated[float, Field(ge=0.0, allow_inf_nan=False)]] = {}
    objective: Literal["latency", "throughput"] | Annotated[float, Field(ge=0.0, le=1.0)] = (
        DEFAULT_OBJECTIVE
    )
    loads: tuple[Annotated[int, Field(ge=1)], ...] = Field(default=(1, 2, 4, 8, 16), min_length=1)
    held_out: float = Field(default=0.25, gt=0.0, lt=1.0)
    seed: int = 0
    seeds: int = Field(default=1, ge=1, le=32)

    @model_validator(mode="after")
    def _no_misspelled_key(self) -> LearningSection:
        """Refuse a key that is nearly one of the section's own; others may be a learner's."""
        for key in self.model_extra or ():
            if difflib.get_close_matches(key, LearningSection.model_fields, cutoff=_MISSPELLED):
                valid = list(LearningSection.model_fields)
                raise ValueError(f"unknown key 'learning.{key}'{suggest_name(key, valid)}")
        return self


EncoderName = Literal["target_hidden", "text_stats", "hashed_ngrams", "sentence"]
DEFAULT_ENCODERS: Final[tuple[EncoderName, ...]] = ("target_hidden", "text_stats")


class SelectionSection(Section):
    """The features of a policy, and the changes to its choice for a request with drafter `auto`.

    encoders: the encoders of the features, in order. sentence_model: folder or hub name of the
    `sentence` encoder's model, saved by sentence-transformers or any transformers encoder. adapt:
    `within_request` switches to the arm that fits the text so far. guard: an arm that is slower than
    plain decoding by the clock is replaced by `none`. explore: probability of a uniformly random arm,
    which lets logs evaluate other policies.
    """

    encoders: tuple[EncoderName, ...] = DEFAULT_ENCODERS
    sentence_model: str | None = None
    adapt: Literal["off", "within_request"] = "off"
    guard: bool = False
    explore: float = Field(default=0.0, ge=0.0, le=1.0)

    @field_validator("adapt", mode="before")
    @classmethod
    def _read_off(cls, value: object) -> object:
        return "off" if value is False else value

    @model_validator(mode="after")
    def _check_encoders(self) -> SelectionSection:
        if not self.encoders or len(set(self.encoders)) < len(self.encoders):
            raise ValueError("'selection.encoders' must name at least one encoder, each once")
        if "sentence" in self.encoders and self.sentence_model is None:
            raise ValueError(
                "the encoder 'sentence' needs a model; set 'selection.sentence_model' to a folder or "
                "hub name"
            )
        return self

    @property
    def is_adaptive(self) -> bool:
        """Whether an arm other than the policy's choice may be used."""
        return self.adapt != "off" or self.guard or self.explore > 0


class PathsSection(Section):
    """Files that offline verbs write and the engine reads."""

    store: Path = Path("runs/collection")
    costs: Path = Path("runs/costs.json")
    policy: Path = Path("runs/policy")


class CollectionSection(Section):
    """What `collect` keeps. answer_tokens: maximum number of tokens in the index of answers, from which
    drafters draft; the oldest answers are dropped.
    """

    answer_tokens: int = Field(default=1 << 24, ge=1 << 16, lt=1 << 31)


class LogSection(Section):
    """The decision log.

    folder: of the log files; None logs nothing. tokens: `off` writes no token of a prompt or an answer;
    `ids` writes token ids, so that `paceline learn --from-log` can replay every drafter and
    `paceline distill --from-log` can train one.
    """

    folder: Path | None = None
    tokens: Literal["off", "ids"] = "off"


class Config(Section):
    """The content of paceline.yaml.

    exact: refuse a target that the compiled forward cannot run. On that forward each token's bits
    depend only on its own request, so the text is equal for every drafter and batch, in bfloat16, too.
    generation_config: `auto` takes defaults of requests from the target's own generation configuration
    (penalties, lengths, sampling and so on), `no_beams` all but its beam search, `none` only the tokens
    that end an answer. distillation: what to train a drafter on and how, checked by `paceline distill`.
    threads: of torch.
    """

    target: ModelSection
    exact: bool = False
    generation_config: GenerationDefaults = "auto"
    drafters: dict[str, DrafterSection] = Field(default_factory=dict)
    engine: EngineSection = EngineSection()
    learning: LearningSection = LearningSection()
    selection: SelectionSection = SelectionSection()
    paths: PathsSection = PathsSection()
    collection: CollectionSection = CollectionSection()
    log: LogSection = LogSection()
    distillation: dict[str, Any] = Field(default_factory=dict)
    threads: int | None = Field(default=None, ge=1)


def load_config(path: Path | str) -> Config:
    """Return the configuration of a YAML file, with absolute paths. Raises ConfigError for a mistake."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file; name a configuration with --config") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from error
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from error
    if not isinstance(raw, dict):
        raise ConfigError(
            f"{path}: expected a mapping with 'target' and 'drafters'; got {shorten(raw)}"
        )
    return anchor(parse(Config, raw, str(path)), path.resolve().parent)


def parse(schema: type[S], raw: dict[str, Any], where: str) -> S:
    """Return a validated mapping. Raises ConfigError that names the first mistake and where it is."""
    try:
        return schema.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(f"{where}: {explain(schema, error)}") from error


def explain(schema: type[BaseModel], error: ValidationError) -> str:
    """Return pydantic's first mistake in one line."""
    # a misspelt key is an unknown and a missing one; the unknown one is named
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    location = [str(part) for part in first["loc"]]
    if first["type"] == "extra_forbidden":
        valid = _keys_at(schema, location[:-1])
        return f"unknown key '{'.'.join(location)}'{suggest_name(location[-1], valid)}"
    if first["type"] == "missing":
        return f"key '{'.'.join(location)}' is missing"
    if first["type"] == "value_error":  # raised by a validator of the schema
        return str(first["ctx"]["error"])
    return f"'{'.'.join(location)}': {first['msg'].lower()}, got {shorten(first['input'])}"


def _keys_at(schema: type[BaseModel], location: list[str]) -> list[str]:
    current: Any = schema
    for part in location:
        field = getattr(current, "model_fields", {}).get(part)
        if field is not None:
            current = field.annotation
        # the key of a mapping of sections: go on with its value type
        arguments = getattr(current, "__args__", ())
        if arguments and field is None:
            current = arguments[-1]
    return list(getattr(current, "model_fields", {}))


def anchor(config: Config, folder: Path) -> Config:
    """Return a configuration with absolute paths to its files and local models."""

    def model_path(name: str) -> str:
        local = folder / name
        return str(local) if not Path(name).is_absolute() and local.exists() else name

    def drafter(section: DrafterSection) -> DrafterSection:
        settings = dict(section.settings)
        for key in ("model", "adapter"):
            if isinstance(settings.get(key), str):
                settings[key] = model_path(settings[key])
        for key in _FILE_SETTINGS:
            if isinstance(settings.get(key), str):
                settings[key] = str(folder / settings[key])
        return section.model_copy(update={"settings": settings})

    def anchored(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [anchored(item) for item in value]
        return str(folder / value) if isinstance(value, str | Path) else value

    distillation = {
        key: anchored(value) if key in _DISTILLATION_FILES else value
        for key, value in config.distillation.items()
    }
    target = {"model": model_path(config.target.model)}
    if config.target.adapter is not None:
        target["adapter"] = model_path(config.target.adapter)
    paths, selection = config.paths, config.selection
    if selection.sentence_model is not None:
        found = model_path(selection.sentence_model)
        selection = selection.model_copy(update={"sentence_model": found})
    return config.model_copy(
        update={
            "selection": selection,
            "target": config.target.model_copy(update=target),
            "drafters": {name: drafter(d) for name, d in config.drafters.items()},
            "distillation": distillation,
            "paths": PathsSection(
                store=folder / paths.store, costs=folder / paths.costs, policy=folder / paths.policy
            ),
            "log": config.log.model_copy(
                update={"folder": config.log.folder and folder / config.log.folder}
            ),
        }
    )
