"""The run of a recipe with its weights: collect, profile, learn, evaluate."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from paceline.config import Config, DrafterSection, EngineSection, ModelSection
from paceline.contracts import no_progress
from paceline.drafting.catalog import check_settings
from paceline.errors import ConfigError, ModelError
from paceline.experiments.prompt_files import read_spec_bench
from paceline.experiments.workbench import SPEC_BENCH, Workbench
from paceline.learning import Evaluation
from paceline.models.loading import load_config
from paceline.store import read_prompts, take_by_hash
from paceline.verbs.evaluate import evaluate
from paceline.verbs.pipeline import in_folder, prepare

if TYPE_CHECKING:
    from collections.abc import Mapping

    from paceline.contracts import Progress, PromptRecord
    from paceline.experiments.recipes.schema import Recipe


def run_recipe(
    recipe: Recipe, folder: Path, data: Path | None = None, on_progress: Progress = no_progress
) -> Evaluation:
    """Run a recipe in a folder; continues an earlier run. Downloads nothing.

    Raises ModelError that names the missing weights, ConfigError if a model does not have the recipe's
    shape or a prompt file is missing.
    """
    config = configuration(recipe, folder)
    _check_models(recipe)
    prompts = _prompts(recipe, Workbench(config, folder, data))
    prepare(config, prompts, recipe.workload.new_tokens, on_progress)
    found = evaluate(config)
    assert isinstance(found, Evaluation)  # a recipe has drafters
    return found


def configuration(recipe: Recipe, folder: Path) -> Config:
    """Return the configuration of a recipe."""
    only = set(ModelSection.model_fields)
    config = Config(
        target=ModelSection(**recipe.target.model_dump(include=only)),
        drafters={
            name: DrafterSection(kind=drafter.kind, settings=drafter.settings)
            for name, drafter in recipe.drafters.items()
        },
        engine=EngineSection(max_rows=recipe.rows),
    )
    return in_folder(config, folder)


def _prompts(recipe: Recipe, bench: Workbench) -> list[PromptRecord]:
    records: list[PromptRecord] = []
    for name in recipe.workload.files:
        path = bench.data_file(name)
        records += read_spec_bench(path) if name == SPEC_BENCH else read_prompts([path])
    return take_by_hash(records, recipe.workload.prompts)


def _check_models(recipe: Recipe) -> None:
    """Raise ModelError with all missing weights, else ConfigError with the first different shape."""
    sections: list[tuple[ModelSection, Mapping[str, Any]]] = [(recipe.target, recipe.target.shape)]
    for name, drafter in recipe.drafters.items():
        plain = DrafterSection(kind=drafter.kind, settings=drafter.settings)
        settings = check_settings(name, plain)
        if isinstance(settings, ModelSection) and drafter.shape is not None:
            sections.append((settings, drafter.shape))
    missing = [section.model for section, _ in sections if not _is_here(section)]
    if missing:
        raise ModelError(
            f"the weights of {', '.join(missing)} are missing; name a local folder in the recipe's "
            "'model', or fetch them into the Hugging Face cache first (`--dry-run` needs no weights)"
        )
    for section, shape in sections:
        found = load_config(section)
        for key, value in shape.items():
            if getattr(found, key, None) != value:
                raise ConfigError(
                    f"{section.model}: its {key} is {getattr(found, key, None)!r}, the recipe's "
                    f"shape says {value!r}"
                )


def _is_here(section: ModelSection) -> bool:
    folder = Path(section.model)
    if not folder.is_dir():
        try:
            found = snapshot_download(
                section.model, revision=section.revision, local_files_only=True
            )
        except (LocalEntryNotFoundError, HFValidationError, HfHubHTTPError):
            return False
        folder = Path(found)
    return any(folder.glob("*.safetensors"))
