"""The forward of a decoder as one compiled function, run by every thread of a job.

It runs the phases that `phases.plan` has opened, each a number of pieces that the threads share
(`sharing.py`). The residual stream and all sums are float32; inputs of products are rounded to the dtype
of the weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from paceline.models.compiled.amx import configure_tiles, release_tiles
from paceline.models.compiled.head import choose_phase, make_final_norm, make_head
from paceline.models.compiled.layer import make_layer
from paceline.models.compiled.memory import field, get_atomic, put_field
from paceline.models.compiled.phases import (
    CHOOSE_PHASE,
    END_PHASES,
    FINAL_PHASE,
    HEAD_PHASE,
    LAYER_PHASES,
)
from paceline.models.compiled.products import make_multiply
from paceline.models.compiled.residual import make_embed_phase
from paceline.models.compiled.rows import inputs_of, make_rows
from paceline.models.compiled.sharing import phase_bytes
from paceline.models.compiled.tables import (
    COUNTERS,
    ENDING,
    LAYER_SIZE,
    LAYER_TABLE,
    LAYERS,
    MODEL,
    ROWS,
    STEPS,
    STORES_FIRST,
    THREADS,
    TILE_CONFIG,
    TOKENS,
    WEIGHS,
)
from paceline.models.compiled.vectors import compiled

if TYPE_CHECKING:
    from collections.abc import Callable


def make_run(kernels: str, dtype: str, weights: str) -> Callable[..., Any]:
    """Return run(job, thread, tag), the part of one thread in a planned job.

    It changes the table at `job`, which is the thread's own copy.
    kernels: see `processor`. dtype: of the model. weights: `bfloat16`, `float32` or `int8`.
    """
    run_steps = _make_steps(kernels, dtype, weights)
    if kernels != "amx":
        return run_steps

    @compiled
    def run_with_tiles(job, thread, tag):
        configure_tiles(field(job, TILE_CONFIG))
        run_steps(job, thread, tag)
        release_tiles()

    return run_with_tiles


def _make_steps(kernels: str, dtype: str, weights: str) -> Callable[..., Any]:
    """Return run_steps(job, thread, tag): a forward, or the steps of a chain."""
    multiply, rows = make_multiply(kernels, weights), make_rows(inputs_of(kernels, weights))
    word = {"bfloat16": 2, "float32": 1, "int8": 4}[weights]  # inputs of a word
    embed_phase = make_embed_phase(dtype)
    run_layer = make_layer(kernels, dtype, multiply, rows, word)
    final_phase, head_phase = make_final_norm(dtype, rows), make_head(multiply, rows, word)

    @compiled
    def run_layers(job, model, layers, phase, size, thread, tag):
        """Run the phases of all layers; return False if the job is over."""
        for index in range(layers):
            layer = field(model, LAYER_TABLE) + 8 * LAYER_SIZE * index
            at = phase + index * LAYER_PHASES * size
            if not run_layer(job, model, layer, index, at, size, thread, tag):
                return False
        return True

    @compiled
    def run_end(job, model, step, phase, size, thread, tag):
        """Run the phases after the layers; return False if the job is over."""
        return (
            final_phase(job, model, 0, phase + FINAL_PHASE * size, thread, tag)
            and head_phase(job, model, 0, phase + HEAD_PHASE * size, thread, tag)
            and choose_phase(job, model, step, phase + CHOOSE_PHASE * size, thread, tag)
        )

    @compiled
    def run_steps(job, thread, tag):
        model, size = field(job, MODEL), phase_bytes(field(job, THREADS))
        phase = field(job, COUNTERS)
        layers = field(job, LAYERS)
        for step in range(max(1, field(job, STEPS))):
            end = phase + (1 + layers * LAYER_PHASES) * size
            is_on = (
                embed_phase(job, model, 0, phase, thread, tag)
                and run_layers(job, model, layers, phase + size, size, thread, tag)
                and run_end(job, model, step, end, size, thread, tag)
            )
            if not is_on or (field(job, WEIGHS) != 0 and get_atomic(field(job, ENDING)) != 0):
                return
            phase = end + END_PHASES * size
            # of the thread's own table: a further step of a chain has a token per row
            put_field(job, TOKENS, field(job, ROWS))
            put_field(job, STORES_FIRST, 0)

    return run_steps
