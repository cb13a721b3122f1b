"""The check of a recipe without weights: shapes, memory and predicted seconds.

Seconds are a roofline: the longer of the bytes that a forward reads over bandwidth and its
multiplications over arithmetic, at the recipe's efficiency. Acceptance is not predicted, only the
acceptance from which on a drafter pays. Symbols: K draft length, tau tokens per round.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from paceline.config import DrafterSection, ModelSection
from paceline.drafting.catalog import check_settings, find_kind
from paceline.drafting.layer_skip import LayerSkipSettings, subset_of
from paceline.drafting.trigram.settings import TrigramTreeSettings
from paceline.errors import ConfigError
from paceline.experiments.recipes.shapes import (
    check_forward,
    model_of_shape,
    num_multiplied,
    num_of_encoder,
    num_parameters,
)
from paceline.models.encoder_decoder import body_of
from paceline.models.loading import DTYPES
from paceline.models.sublayers import SubLayers

if TYPE_CHECKING:
    from collections.abc import Sequence

    from paceline.experiments.recipes.schema import Recipe, RecipeDrafter
    from paceline.models.language_model import LanguageModel

_FREE: Final = 0.1  # share of the device's memory for work and fragments
_BYTES_PER_TOKEN: Final = 4  # approximate bytes of text, for the size of a table
_BYTES_PER_TRIGRAM: Final = 20  # a new pair and a new successor, the maximum per token
TARGET: Final = "target"


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """The target or an arm: its memory and the predicted seconds of its steps."""

    name: str
    kind: str
    parameters: int = 0
    weight_bytes: int = 0
    cache_bytes: int = 0  # all rows at their full length
    host_bytes: int = 0  # maximum size of a table
    draft_length: int = 0
    step_seconds: float = 0.0  # one token of every row; a draft step, for a drafter
    break_even: float = 1.0  # tau at which the arm is as fast as plain decoding


@dataclass(frozen=True, slots=True)
class DryRun:
    """A recipe that fits, with its predicted memory and seconds by stage."""

    recipe: Recipe
    models: list[ModelPlan]
    needed_bytes: int
    device_bytes: int
    seconds: dict[str, float]
    notes: list[str] = field(default_factory=list)


class Roofline:
    """Predicted seconds of forwards on a recipe's devices."""

    def __init__(self, recipe: Recipe) -> None:
        device = recipe.device
        share = device.count * device.efficiency
        self._bandwidth = device.gigabytes_per_second * 1e9 * share
        self._arithmetic = device.teraflops * 1e12 * share
        self._arithmetic_of_one = self._arithmetic / device.count

    def seconds(
        self, model: LanguageModel, tokens: int, context: int, rows: int = 1, kept: float = 1.0
    ) -> float:
        """Return the seconds of a forward of `tokens` in all, after `context` cached ones per row.

        kept: share of the model's weights and cache that is used.
        """
        weights = num_multiplied(model)
        read = weights * model.dtype.itemsize + rows * context * model.position_bytes
        # scores and mixing: four multiplications or additions per dimension and cached token
        attention = 4 * model.num_layers * model.hidden_size * context * tokens
        work = 2 * weights * tokens + attention
        return kept * max(read / self._bandwidth, work / self._arithmetic)

    def prompt_seconds(self, model: LanguageModel, num_prompt: int) -> float:
        """Return the seconds of reading a prompt, by the encoder if the model has one."""
        if model.encoder is None:
            return self.seconds(model, num_prompt, num_prompt // 2)
        weights = num_of_encoder(model)
        read, work = weights * model.dtype.itemsize, 2 * weights * num_prompt
        return max(read / self._bandwidth, work / self._arithmetic)

    def training_seconds(self, parameters: int, tokens: float, devices: int) -> float:
        """Return the seconds of training: six multiplications or additions per parameter and token."""
        return 6 * parameters * tokens / (self._arithmetic_of_one * devices)


def dry_run(recipe: Recipe) -> DryRun:
    """Check a recipe and predict its seconds. Raises ConfigError for the first misfit."""
    work = recipe.workload
    section = recipe.target
    target = model_of_shape(TARGET, section.shape, DTYPES[section.dtype], section.millions)
    positions = target.num_before_output(work.prompt_tokens) + work.new_tokens
    if work.prompt_tokens > target.max_prompt or positions > target.context_length:
        raise ConfigError(
            f"prompts of {work.prompt_tokens} and answers of {work.new_tokens} tokens do not fit the "
            f"target's context of {target.context_length}; lower one of them in 'workload'"
        )
    planner = _Planner(recipe, target)
    plans = [planner.target()]
    plans += [planner.drafter(name, drafter) for name, drafter in recipe.drafters.items()]
    check_forward(target, 1 + max(plan.draft_length for plan in plans))
    free = [plan.name for plan in plans if plan.draft_length and not plan.step_seconds]
    if free:
        planner.notes.append(
            f"the drafting time of {', '.join(free)} on the host is not predicted, nor included in "
            "'pays above'"
        )
    needed = sum(plan.weight_bytes + plan.cache_bytes for plan in plans)
    device_bytes = int(recipe.device.count * recipe.device.gigabytes * 1e9)
    _check_memory(recipe, plans, needed, device_bytes)
    return DryRun(recipe, plans, needed, device_bytes, planner.stages(plans), planner.notes)


def _check_memory(
    recipe: Recipe, plans: Sequence[ModelPlan], needed: int, device_bytes: int
) -> None:
    usable = (1 - _FREE) * device_bytes
    if needed <= usable:
        return
    parts = ", ".join(
        f"{plan.name} {(plan.weight_bytes + plan.cache_bytes) / 1e9:.1f}"
        for plan in plans
        if plan.weight_bytes + plan.cache_bytes
    )
    raise ConfigError(
        f"does not fit: weights and caches need {needed / 1e9:.1f} GB ({parts}), of "
        f"{recipe.device.count} x {recipe.device.name} {usable / 1e9:.1f} GB can be used; fewer rows, "
        "shorter texts, fewer drafters or more devices"
    )


class _Planner:
    def __init__(self, recipe: Recipe, target: LanguageModel) -> None:
        self._recipe = recipe
        self._target = target
        self._roofline = Roofline(recipe)
        self._length = recipe.workload.prompt_tokens + recipe.workload.new_tokens
        self._context = recipe.workload.prompt_tokens + recipe.workload.new_tokens // 2
        self._models: dict[str, LanguageModel] = {}
        self.notes: list[str] = []

    def target(self) -> ModelPlan:
        return self._holding(ModelPlan(TARGET, "none"), self._target)

    def drafter(self, name: str, drafter: RecipeDrafter) -> ModelPlan:
        """Raises ConfigError if the drafter does not fit its settings, the target or its shape."""
        settings = check_settings(
            name, DrafterSection(kind=drafter.kind, settings=drafter.settings)
        )
        length = int(getattr(settings, "num_draft_tokens", 0))
        plan = ModelPlan(name, drafter.kind, draft_length=length)
        if isinstance(settings, ModelSection):
            return self._draft_model(plan, drafter, settings)
        if drafter.shape is not None:
            raise ConfigError(
                f"drafter '{name}': kind '{drafter.kind}' has no model; remove 'shape'"
            )
        if isinstance(settings, LayerSkipSettings):
            return self._stepping(plan, self._skipping_step(name, settings))
        if isinstance(settings, TrigramTreeSettings):
            plan = replace(plan, host_bytes=self._table_bytes(name, drafter, settings))
        return self._stepping(plan, 0.0)

    def _draft_model(
        self, plan: ModelPlan, drafter: RecipeDrafter, settings: ModelSection
    ) -> ModelPlan:
        if drafter.shape is None:
            raise ConfigError(f"drafter '{plan.name}': needs the 'shape' of its model")
        dtype = self._target.dtype if settings.dtype == "auto" else DTYPES[settings.dtype]
        name = f"drafter '{plan.name}'"
        model = model_of_shape(plan.name, drafter.shape, dtype, drafter.millions)
        same = find_kind(plan.name, plan.kind).needs.same_vocabulary
        if same and model.num_logits != self._target.num_logits:
            raise ConfigError(
                f"{name}: a vocabulary of {model.num_logits} tokens, the target's has "
                f"{self._target.num_logits}; use a drafter with the target's tokenizer, or kind "
                "'cross_vocabulary'"
            )
        if self._length > model.context_length:
            self.notes.append(
                f"{name} has a context of {model.context_length} and stops drafting before texts of "
                f"{self._length} tokens end"
            )
        check_forward(model, 1)
        self._models[plan.name] = model
        return self._holding(plan, model)

    def _holding(self, plan: ModelPlan, model: LanguageModel) -> ModelPlan:
        parameters = num_parameters(model)
        plan = replace(
            plan,
            parameters=parameters,
            weight_bytes=parameters * model.dtype.itemsize,
            cache_bytes=self._recipe.rows * self._length * model.position_bytes,
        )
        return self._stepping(plan, self._step(model))

    def _stepping(self, plan: ModelPlan, step: float) -> ModelPlan:
        """Return the plan with its seconds; without a draft, a round is one step of the target."""
        verify = self._step(self._target, plan.draft_length + 1)
        tau = (verify + plan.draft_length * step) / self._step(self._target)
        return replace(plan, step_seconds=step, break_even=tau)

    def _step(self, model: LanguageModel, tokens: int = 1, kept: float = 1.0) -> float:
        """Return the seconds of a forward of n tokens per row, in the middle of an answer."""
        rows = self._recipe.rows
        return self._roofline.seconds(model, tokens * rows, self._context, rows, kept)

    def _skipping_step(self, name: str, settings: LayerSkipSettings) -> float:
        if settings.skip_set is not None:
            raise ConfigError(
                f"drafter '{name}': a recipe cannot use a skip_set; give skip_attention and skip_mlp"
            )
        subset = subset_of(name, settings, self._target)
        check_forward(self._target, 1, subset)
        layers = SubLayers(body_of(self._target.model), self._target.num_layers, name)
        kept = 1 - layers.num_parameters(subset) / num_multiplied(self._target)
        return self._step(self._target, kept=kept)

    def _table_bytes(self, name: str, drafter: RecipeDrafter, settings: TrigramTreeSettings) -> int:
        """Return the maximum size of the mapped file, with a new tri-gram per token of the text."""
        if (drafter.corpus_megabytes is None) == (settings.table is not None):
            raise ConfigError(
                f"drafter '{name}': give both 'table' and the 'corpus_megabytes' of its text, or neither"
            )
        if drafter.corpus_megabytes is None:
            return 0
        tokens = drafter.corpus_megabytes * 1e6 / _BYTES_PER_TOKEN
        return int(8 * self._target.num_logits + _BYTES_PER_TRIGRAM * tokens)

    def stages(self, plans: Sequence[ModelPlan]) -> dict[str, float]:
        """Return the predicted seconds of a run by stage."""
        recipe, work = self._recipe, self._recipe.workload
        prefill = self._roofline.prompt_seconds(self._target, work.prompt_tokens)
        answers = work.prompts * work.new_tokens / recipe.rows * self._step(self._target)
        seconds = {"decode with the target": work.prompts * prefill + answers}
        for plan in plans[1:]:
            model = self._models.get(plan.name)
            if model is not None:
                one = self._roofline.seconds(model, self._length, self._length // 2)
                if model.encoder is not None:
                    one = self._roofline.prompt_seconds(model, work.prompt_tokens)
                    one += self._roofline.seconds(model, work.new_tokens, self._context)
                seconds[f"replay {plan.name}"] = work.prompts * one
            elif plan.step_seconds:
                # a draft of full length after every token, one row at a time
                drafts = work.prompts * work.new_tokens * plan.draft_length
                seconds[f"replay {plan.name}, at most"] = drafts * plan.step_seconds
        if recipe.training is not None:
            trained = next(plan for plan in plans if plan.name == recipe.training.drafter)
            seconds[f"train {trained.name}"] = self._roofline.training_seconds(
                trained.parameters, recipe.training.tokens, recipe.training.devices
            )
        return seconds
