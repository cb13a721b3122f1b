"""Search for a learner's options: Optuna over cross-validated scores, never held-out ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from paceline.config import parse
from paceline.contracts import no_progress
from paceline.errors import ConfigError
from paceline.learning.learners import LEARNERS, find_learner

if TYPE_CHECKING:
    from collections.abc import Mapping

    from paceline.contracts import Progress
    from paceline.learning.dataset import Dataset
    from paceline.learning.learners import LearnerSettings


def search(
    data: Dataset,
    settings: LearnerSettings,
    num_trials: int,
    on_progress: Progress = no_progress,
) -> LearnerSettings:
    """Return the settings with the best score. The first trial is `settings` itself.

    data: the training part. Raises ConfigError for a learner without a search space, or without
    Optuna.
    """
    learner = find_learner(settings.learner)
    space = learner.search_space
    if not space:
        searchable = ", ".join(name for name, other in LEARNERS.items() if other.search_space)
        raise ConfigError(
            f"learner '{learner.name}' has no settings to search; those that have: {searchable}"
        )
    optuna = _import_optuna()
    sampler = optuna.samplers.TPESampler(seed=settings.seed)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    study.enqueue_trial({name: getattr(settings, name) for name in space})

    def score(trial: Any) -> float:
        suggested = {name: _suggest(trial, name, *ends) for name, ends in space.items()}
        fitted = learner.fit(data, _with(settings, suggested), no_progress)
        on_progress("search", trial.number + 1, num_trials)
        return fitted.summary.score

    study.optimize(score, n_trials=num_trials)
    return _with(settings, study.best_params)


def _suggest(trial: Any, name: str, low: float, high: float) -> float:
    suggest = trial.suggest_int if isinstance(low, int) else trial.suggest_float
    value: float = suggest(name, low, high, log=True)
    return value


def _with(settings: LearnerSettings, changes: Mapping[str, float]) -> LearnerSettings:
    return parse(type(settings), settings.model_dump() | dict(changes), "learning")


def _import_optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise ConfigError(
            "--search needs Optuna; install it with: pip install 'paceline[search]'"
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
