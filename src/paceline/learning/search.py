"""A learner's settings found by trying: Optuna over cross-validated scores, never held-out ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from paceline.config import LearningSection, parse
from paceline.errors import ConfigError
from paceline.learning.learners import LEARNERS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from paceline.learning.dataset import Dataset
    from paceline.learning.learners import Progress

_OF_NETWORKS: Final = {
    "hidden_units": (16, 128),
    "learning_rate": (1e-3, 2e-2),
    "weight_decay": (1e-3, 0.3),
    "entropy_weight": (1e-3, 0.1),
}
SPACES: Final[Mapping[str, Mapping[str, tuple[float, float]]]] = {
    "acceptance": {"kinds": (6, 96), "gate_decay": (1e-2, 2.0)},
    "reinforce": _OF_NETWORKS,
    "policy_gradient": _OF_NETWORKS,
    "cost_sensitive": _OF_NETWORKS,
    "linucb": {"optimism": (0.03, 3.0)},
    "thompson": {"optimism": (0.03, 3.0)},
}
"""By learner, the range of each setting; all are searched on a logarithmic scale."""


def search(
    data: Dataset,
    settings: LearningSection,
    num_trials: int,
    on_progress: Progress = lambda stage, done, total: None,
) -> LearningSection:
    """The settings with the best score; those given are the first trial, so never worse than these.

    data: the training part. Raises ConfigError where there is nothing to search or no Optuna.
    """
    space = SPACES.get(settings.learner)
    if space is None:
        raise ConfigError(
            f"learner '{settings.learner}' has no settings to search; those that have: "
            f"{', '.join(SPACES)}"
        )
    optuna = _import_optuna()
    sampler = optuna.samplers.TPESampler(seed=settings.seed)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    study.enqueue_trial({name: getattr(settings, name) for name in space})
    learner = LEARNERS[settings.learner]

    def score(trial: Any) -> float:
        tried = _with(
            settings, {name: _suggest(trial, name, *ends) for name, ends in space.items()}
        )
        found = learner.fit(data, tried, lambda stage, done, total: None).summary.score
        on_progress("search", trial.number + 1, num_trials)
        return found

    study.optimize(score, n_trials=num_trials)
    return _with(settings, study.best_params)


def _suggest(trial: Any, name: str, low: float, high: float) -> float:
    suggest = trial.suggest_int if isinstance(low, int) else trial.suggest_float
    value: float = suggest(name, low, high, log=True)
    return value


def _with(settings: LearningSection, changes: Mapping[str, float]) -> LearningSection:
    return parse(LearningSection, settings.model_dump() | dict(changes), "learning")


def _import_optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise ConfigError(
            "--search needs Optuna; install it with: pip install 'paceline[search]'"
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
