"""SEARCH: which attention and MLP sub-layers a target may leave out when it drafts for itself."""

from paceline.layer_search.search import SearchReport, SearchSettings, plot, search_layers

__all__ = ["SearchReport", "SearchSettings", "plot", "search_layers"]
