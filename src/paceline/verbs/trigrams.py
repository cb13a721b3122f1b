"""`paceline trigram build` as a function: text and a collection's answers to a tri-gram table."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from paceline.contracts import no_progress
from paceline.drafting.trigram.build import build_table
from paceline.drafting.trigram.corpora import TextFiles, TokenSequences
from paceline.errors import ConfigError, StoreError
from paceline.models.loading import load_tokenizer
from paceline.models.vocabulary import Vocabulary
from paceline.store.collection import open_trajectories, read_trajectories

if TYPE_CHECKING:
    from collections.abc import Sequence

    from paceline.config import Config
    from paceline.contracts import Progress
    from paceline.drafting.trigram.build import BuildSettings, Corpus
    from paceline.drafting.trigram.table import TableFacts


def build_trigrams(
    config: Config,
    out: Path,
    text: Sequence[Path] = (),
    from_collection: bool = False,
    settings: BuildSettings | None = None,
    on_progress: Progress = no_progress,
) -> TableFacts:
    """Write the table of a `trigram_tree` drafter. Continues a run that was stopped.

    text: UTF-8 files to read. from_collection: also read the target's answers in the configuration's
    store. Raises ConfigError without either, StoreError if the collection is empty or was made with
    another tokenizer.
    """
    tokenizer = load_tokenizer(config.target)
    tokenizer_hash = Vocabulary.of(tokenizer).hash()
    corpora: list[Corpus] = [TextFiles(text, tokenizer)] if text else []
    if from_collection:
        corpora.append(_answers(config.paths.store, tokenizer_hash))
    if not corpora:
        raise ConfigError("nothing to build from: give text files, or take the collection")
    return build_table(corpora, Path(out), tokenizer_hash, settings, on_progress)


def _answers(folder: Path, tokenizer: str) -> TokenSequences:
    store = open_trajectories(folder)
    if store.identity.get("tokenizer") != tokenizer:
        raise StoreError(
            f"{folder}: was collected with another tokenizer than the target's; collect again"
        )
    trajectories = read_trajectories(store)
    if not trajectories:
        raise StoreError(f"{folder}: the collection is empty; run `paceline collect PROMPTS`")
    # the first token of an answer follows the last two of its prompt
    sequences = [(*t.prompt_tokens[-2:], *t.output_tokens) for t in trajectories]
    return TokenSequences(f"{folder} {store.num_rows}", sequences)
