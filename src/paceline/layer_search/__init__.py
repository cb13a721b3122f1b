"""SEARCH: which attention and MLP sub-layers a target may leave out when it drafts for itself."""

from paceline.layer_search.search import SearchReport, plot, search_layers
from paceline.layer_search.settings import SearchSettings

__all__ = ["SearchReport", "SearchSettings", "plot", "search_layers"]
