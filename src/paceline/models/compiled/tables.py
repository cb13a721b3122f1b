"""The tables of 64-bit numbers through which Python and compiled code tell each other what to do.

A table is an int64 array; the names here are places in it. Addresses and sizes are integers; a field
whose name ends in _F holds a float32 in its lower half. Sizes of rows in memory are rounded up, so that
vectors never cross their end, and what lies beyond a row's own numbers is zero.
Symbols: D hidden size, H query heads, Hkv key-value heads, d head size, F MLP size, V logits.
"""

from __future__ import annotations

from typing import Final


def rounded(number: int, unit: int) -> int:
    """Return the next multiple of a unit."""
    return -(-number // unit) * unit


# --- a model --------------------------------------------------------------------------------------
(
    HIDDEN,  # D
    HIDDEN_ROOM,  # D rounded up to 64
    HEADS,
    KV_HEADS,
    HEAD_ROOM,  # d rounded up to 32: numbers of a head in queries, keys and the output
    VALUE_ROOM,  # d rounded up to 64: numbers of a head in the products with values
    HEAD_SIZE,  # d
    HALF_TURNED,  # half the number of rotated numbers of a head
    MLP_ROOM,  # F rounded up: to 32, or to 64 without a gate
    MLP_GROUPS,  # groups of 64 outputs of the MLP's first product
    GATED,  # whether the MLP has a gate
    VOCABULARY,  # V
    VOCABULARY_GROUPS,  # groups of 64 logits
    EMBEDDING,  # [V, D], as in transformers' model
    EMBEDDING_SCALE_F,
    EPSILON_F,
    FINAL_NORM,  # float32 [D]
    HEAD_WEIGHTS,
    HEAD_BIAS,
    ANGLES,  # float32 [positions, tables, 2 * HALF_TURNED]: cosines, then sines
    ANGLE_TABLES,
    ACTIVATION,  # 0 silu, 1 gelu (tanh), 2 gelu (erf), 3 relu
    LOGIT_SCALE_F,
    LOGIT_CAP_F,  # 0: none
    RESIDUAL_SCALE_F,
    NORM_WHOLE,  # whether norms of queries and keys cover all heads at once
    LAYER_TABLE,  # address of the layers' tables, one after the other
    MODEL_SIZE,
) = range(28)

# --- a layer: weights and norms are addresses, 0 where the layer has none -------------------------
(
    NORM_1,  # float32 [D], before attention
    QKV,  # [(H + 2 Hkv) * HEAD_ROOM, D], packed
    QKV_BIAS,
    QUERY_NORM,  # float32 [d], or [H * HEAD_ROOM] if NORM_WHOLE
    KEY_NORM,
    OUT,  # [D, H * HEAD_ROOM]
    OUT_BIAS,
    POST_NORM_1,  # after attention, before the residual
    NORM_2,
    GATE_UP,  # of 64 outputs, 32 of the gate and 32 of up; [F, D] without a gate
    GATE_UP_BIAS,
    DOWN,  # [D, F]
    DOWN_BIAS,
    POST_NORM_2,
    WINDOW,  # positions that a token sees; 0: all
    TURNS,  # the layer's table of angles, -1: none
    SCORE_SCALE_F,
    SCORE_CAP_F,  # 0: none
    BIAS,  # what is added to scores, by distance; see `positions.py`
    CROSS_NORM,  # float32 [D], before attention to the source
    CROSS_QUERY,  # [H * HEAD_ROOM, D], packed; 0 for a layer that sees no source
    CROSS_OUT,  # [D, H * HEAD_ROOM]
    LAYER_SIZE,
) = range(23)

# --- a job: one call ------------------------------------------------------------------------------
(
    # what it does
    MODEL,  # address of the model's table
    RUN,  # address of the function that runs it
    TOKENS,  # N, the packed tokens
    ROWS,  # R
    NUM_PICKED,  # places of which logits are wanted
    STEPS,  # tokens of a chain, drafted one after the other; 0: no chain
    SCORE_ROOM,  # positions in a row of scores
    SCRATCH_STRIDE,  # bytes of a thread's scratch
    STORES_FIRST,  # whether keys are stored in a phase of their own
    QUERY_TOKENS,  # tokens of a piece of attention, if STORES_FIRST
    LAYERS,  # number of layers to run; 0: HIDDEN_OUT holds final hidden states
    SKIPS,  # whether SKIPPED is read
    HIDDEN_OUT,  # address for final hidden states [N, HIDDEN_ROOM] in the dtype of the model, or 0
    LOGITS,  # address for float32 [NUM_PICKED, VOCABULARY_GROUPS * 64], or 0
    LIMIT,  # ids below it may be chosen
    WEIGHS,  # whether a chain's probabilities are wanted, and may end it
    # addresses of its buffers
    STREAM,  # float32 [N, HIDDEN_ROOM], the residual stream
    INPUTS,  # inputs of the next product [N, HIDDEN_ROOM]
    PROJECTED,  # float32 [N, (H + 2 Hkv) * HEAD_ROOM], queries, keys, values
    ATTENDED,  # [N, H * HEAD_ROOM]
    ACTIVATED,  # [N, MLP_ROOM]
    ADDED,  # float32 [N, HIDDEN_ROOM], what a norm stands before
    BEST,  # (float32, int64) by group and place: the largest logit and its id
    CHOICES,  # int64 [NUM_PICKED]: the most likely ids, -1 where they are not finite
    CHAIN,  # int64 [ROWS, STEPS], the drafted ids
    SURENESS,  # float32 [ROWS, STEPS], their probabilities, if WEIGHS
    IDS,  # int64 [N], the tokens' ids
    POSITIONS,  # int64 [N]
    PICKED,  # int64 [NUM_PICKED]
    SPANS,  # ROWS tables
    ENDING,  # int64: the steps done when all rows had ended, else 0; then CHANCES in lower halves
    SKIPPED,  # int64 [2 * LAYERS]: 1 where attention, and then the MLP, is left out
    SCRATCH,  # of the first thread
    # what belongs to the workspace
    THREADS,
    COUNTERS,
    TILE_CONFIG,  # for AMX
    YIELD,  # of the system's function that lets another thread run
    CURRENT,  # address of the running job's tag, 0 while the table is being written
    COPIES,  # address of a copy of this table for each thread
    JOB_SIZE,
) = range(40)
CHANCES: Final = 16
"""Classes of a drafted token by its probability; each has a chance of acceptance."""
COPY_BYTES: Final = rounded(8 * JOB_SIZE, 64)
FIRST_BUFFER: Final = STREAM
NUM_BUFFERS: Final = SCRATCH - STREAM + 1

# --- a row of a job -------------------------------------------------------------------------------
(
    FIRST,  # its first packed token
    WIDTH,
    START,  # its cached positions
    STORAGE,  # address of its keys and values
    CAPACITY,  # positions, a multiple of 64
    SEED,  # of its draws, in a chain
    DRAWN_AT,  # position in the text of the token that a step draws
    COLDNESS_F,  # 1 / temperature; 0: the most likely token
    PATHS,  # address of int64 [WIDTH, WIDTH + 1]: number of ancestors and their places; 0: a chain
    HOPE_F,  # product of the chances of its drafted tokens, if WEIGHS
    LEAST_HOPE_F,  # below it the row's chain has ended
    SOURCE,  # address of its source's keys and values, if the model has an encoder
    SOURCE_CAPACITY,  # positions, a multiple of 64
    SOURCE_LENGTH,  # positions
    SPAN_SIZE,
) = range(15)
