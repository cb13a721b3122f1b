"""Experiments at the papers' own scale: recipes, their dry run without weights, and their run."""

from paceline.experiments.recipes.dry_run import DryRun, ModelPlan, dry_run
from paceline.experiments.recipes.run import run_recipe
from paceline.experiments.recipes.schema import Recipe, load_recipe

__all__ = ["DryRun", "ModelPlan", "Recipe", "dry_run", "load_recipe", "run_recipe"]
