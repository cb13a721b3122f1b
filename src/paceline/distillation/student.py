"""The student: a small Llama or T5 with the target's tokenizer, to be used as a drafter.

Vocabulary, context, rope and end token are the target's; `encoder_decoder_students` has the shape of
the T5. The tied embedding can start as the target's own, projected to its D strongest singular
directions and whitened, so that tokens with similar embeddings in the target start similar. A student
can also start from a checkpoint or from layers of the target. Knows no data and no training.
Symbols: V vocabulary, D student's hidden size, T target's hidden size.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, Final, Literal

import torch
from torch import nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, T5ForConditionalGeneration

from paceline.distillation.encoder_decoder_students import (
    check_t5_shape,
    copy_encoder_decoder_layers,
    t5_config,
)
from paceline.distillation.model_folders import load_float32
from paceline.distillation.reading import LONGEST, output_scale
from paceline.distillation.settings import SHAPES
from paceline.errors import ConfigError, shorten
from paceline.models.encoder_decoder import is_encoder_decoder, start_token
from paceline.models.output_head import OutputHead
from paceline.models.sublayers import find_layers
from paceline.models.vocabulary import Vocabulary

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import Tensor
    from transformers import PreTrainedModel, T5Config

    from paceline.distillation.settings import Architecture, DistillSettings, StudentShape
    from paceline.models.language_model import LanguageModel

_STD: Final = 0.02  # of initial weights
# fields of configurations with one entry per decoder layer
_PER_LAYER: Final = ("layer_types", "mlp_layer_types", "no_rope_layers")


def student_config(target: Any, shape: StudentShape) -> LlamaConfig:
    """Return a student's configuration. target: the target's transformers configuration."""
    text = target.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    if not isinstance(rope.get("rope_theta", 0.0), int | float):
        rope = {}  # one rope per layer type (Gemma 3); a student has a single one
    return LlamaConfig(
        vocab_size=text.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.mlp_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.hidden_size // shape.num_heads,
        max_position_embeddings=_longest_text(text),
        rope_parameters={
            "rope_type": "default",
            "rope_theta": float(rope.get("rope_theta", 10000.0)),
        },
        rms_norm_eps=1e-6,
        initializer_range=_STD,
        tie_word_embeddings=True,
        bos_token_id=getattr(text, "bos_token_id", None),
        eos_token_id=text.eos_token_id,
        pad_token_id=text.pad_token_id,
    )


def _longest_text(text: Any) -> int:
    """Return the context of a causal student: a prompt and an answer of the target's."""
    own: int | None = getattr(text, "max_position_embeddings", None)
    if not getattr(text, "is_encoder_decoder", False):
        return int(text.max_position_embeddings)
    return 2 * min(own or LONGEST, LONGEST)


def build_student(
    target: PreTrainedModel,
    shape: StudentShape,
    embedding_init: Literal["svd", "random"],
    seed: int,
    architecture: Architecture = "llama",
) -> PreTrainedModel:
    """Return a float32 student on the CPU, a function of the seed; the caller's RNG does not change."""
    student = new_model(
        student_config(target.config, shape)
        if architecture == "llama"
        else t5_config(
            shape,
            target.config.get_text_config().vocab_size,
            _start_of(target),
            eos_token_id=target.config.get_text_config().eos_token_id,
            pad_token_id=target.config.get_text_config().pad_token_id,
        ),
        seed,
    )
    if embedding_init == "svd":
        table: Any = target.get_input_embeddings().weight
        own: Any = student.get_input_embeddings().weight
        # T5's embeddings begin with a deviation of 1
        scale = 1.0 if architecture == "llama" else 1 / _STD
        with torch.no_grad():
            own.copy_(project(table.detach().float().cpu(), shape.hidden_size) * scale)
    return student


def new_model(config: LlamaConfig | T5Config, seed: int) -> PreTrainedModel:
    """Return a model with random weights, float32 on the CPU; see `build_student`."""
    made: Any = LlamaForCausalLM if isinstance(config, LlamaConfig) else T5ForConditionalGeneration
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = made(config).float()
    return model


def _start_of(target: PreTrainedModel) -> int:
    """Return the start token of a T5 student: the target's, or else the one of padding, as T5's."""
    if is_encoder_decoder(target):
        return start_token(target, "the target")
    text: Any = target.config.get_text_config()
    end = text.eos_token_id[0] if isinstance(text.eos_token_id, list) else text.eos_token_id
    return next((token for token in (text.pad_token_id, end) if token is not None), 0)


def project(embedding: Tensor, width: int) -> Tensor:
    """Return an embedding [V, T] projected to its D = width strongest singular directions [V, D].

    The result has the scale of initial weights. Raises ConfigError if width is above T.
    """
    if width > embedding.shape[1]:
        raise ConfigError(
            f"the student's hidden size {width} exceeds the target's {embedding.shape[1]}; choose "
            "a smaller student or embedding_init 'random'"
        )
    centred = embedding - embedding.mean(dim=0)
    # the eigenvectors of the T x T Gram matrix are the right singular vectors
    squares, directions = torch.linalg.eigh(centred.T @ centred)  # ascending
    projected = centred @ directions[:, -width:].flip(-1)  # [V, D]
    # equal scale in every direction, or a few strong ones would dominate
    projected = projected / squares[-width:].flip(-1).clamp(min=1e-12).sqrt()
    return projected * (_STD / projected.std())


def make_student(target: LanguageModel, settings: DistillSettings) -> PreTrainedModel:
    """Return the student that a training starts from, float32 on the CPU.

    It is the model in `start_from`, a copy of `target_layers`, or new. Raises ConfigError if the
    settings contradict each other or do not fit the target.
    """
    model: PreTrainedModel = target.model
    copies = (settings.target_layers, settings.target_encoder_layers) != (None, None)
    if settings.start_from is not None and copies:
        raise ConfigError("'start_from' and 'target_layers' both begin a student; remove one")
    for name, given in (
        ("shape", settings.shape is not None),
        ("architecture", settings.architecture != "auto"),
    ):
        if given and (copies or settings.start_from is not None):
            raise ConfigError(
                f"'{name}' is of a new student; remove it, or start_from and target_layers"
            )
    if settings.start_from is not None:
        return _load_student(settings.start_from, target)
    if copies:
        _check_head(model, f"target_layers of {target.name}")
        return _copy_layers(target, settings)
    architecture: Architecture
    if settings.architecture == "auto":
        architecture = "llama" if target.encoder is None else "t5"
    else:
        architecture = settings.architecture
    shape = settings.shape or SHAPES[architecture][settings.size]
    check_shape(shape, architecture)
    return build_student(model, shape, settings.embedding_init, settings.seed, architecture)


def check_shape(shape: StudentShape, architecture: Architecture) -> None:
    """Raise ConfigError for a shape that no model of the architecture has."""
    if architecture == "t5":
        check_t5_shape(shape)
    elif shape.num_encoder_layers is not None:
        raise ConfigError(
            f"num_encoder_layers {shape.num_encoder_layers}: a Llama has no encoder; remove it, or set "
            "architecture to t5"
        )


def _copy_layers(target: LanguageModel, settings: DistillSettings) -> PreTrainedModel:
    if target.encoder is not None:
        return copy_encoder_decoder_layers(
            target.model, settings.target_layers, settings.target_encoder_layers
        )
    if settings.target_encoder_layers is not None:
        raise ConfigError(
            f"target_encoder_layers: {type(target.model).__name__} has no encoder; remove it"
        )
    assert settings.target_layers is not None
    return copy_layers(target.model, settings.target_layers)


def check_tokenizer(folder: Path | None, vocabulary: Vocabulary) -> None:
    """Raise ConfigError unless a student's folder has the target's tokenizer. None: a new student."""
    if folder is None:
        return
    if not folder.is_dir():
        raise ConfigError(f"start_from {folder}: no such folder; correct the path")
    try:
        own = Vocabulary.of(AutoTokenizer.from_pretrained(folder))
    except Exception as error:  # a damaged file raises almost any
        raise ConfigError(
            f"start_from {folder}: its tokenizer cannot be read ({shorten(error)}); copy the target's "
            "tokenizer into the folder if the model was trained with it"
        ) from error
    if own.hash() != vocabulary.hash():
        raise ConfigError(
            f"start_from {folder}: has another tokenizer than the target; start from a model with the "
            "target's tokenizer, or train a new student"
        )


def _load_student(folder: Path, target: LanguageModel) -> PreTrainedModel:
    """Return a folder's model. Raises ConfigError if it cannot be loaded or has other logits."""
    try:
        student = load_float32(folder)
    except Exception as error:  # a damaged file raises almost any
        raise ConfigError(
            f"start_from {folder}: not a causal LM or encoder-decoder ({shorten(error)})"
        ) from error
    width = student.get_output_embeddings().weight.shape[0]
    if width != target.num_logits:
        raise ConfigError(
            f"start_from {folder}: has {width} logits, the target {target.num_logits}; start from a "
            "model with the target's tokenizer"
        )
    _check_head(student, f"start_from {folder}")
    return student


def _check_head(model: PreTrainedModel, where: str) -> None:
    """Raise ConfigError unless the logits are products of hidden states and the head's weight.

    T5's are scaled by a constant, which training does as well.
    """
    head: Any = model.get_output_embeddings().weight
    probe = torch.randn(1, 2, head.shape[1], generator=torch.Generator().manual_seed(0))
    probe[:, 1] *= 100  # far enough for a cap to show
    probe = probe.to(head)
    with torch.inference_mode():
        found = OutputHead(model, where)(probe).float()
        own = (probe @ head.T).float() * output_scale(model)
    tolerance = 1e-3 if head.dtype == torch.float32 else 2e-2
    allowed = tolerance * (own.abs() + own.std(dim=-1, keepdim=True))
    if not bool(((found - own).abs() <= allowed).all()):
        raise ConfigError(
            f"{where}: {type(model).__name__} scales, caps or shifts its logits, which training does "
            "not do; use another architecture, such as Llama or Qwen, or a new student"
        )


def copy_layers(target: PreTrainedModel, indices: Sequence[int]) -> PreTrainedModel:
    """Return a float32 copy of the target with the decoder layers of these indices, in this order.

    Raises ConfigError for an index that the target does not have.
    """
    config = target.config.get_text_config()
    num_layers = config.num_hidden_layers
    if bad := [i for i in indices if i >= num_layers]:
        raise ConfigError(f"target_layers: {bad[0]} is not one of the target's {num_layers} layers")
    student = copy.deepcopy(target).float().cpu()
    owner, attribute = find_layers(student.base_model, num_layers, "the target")
    layers = getattr(owner, attribute)
    chosen = nn.ModuleList(copy.deepcopy(layers[i]) for i in indices)
    for place, layer in enumerate(chosen):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = place  # type: ignore[assignment]  # of the KV cache
    setattr(owner, attribute, chosen)
    own = student.config.get_text_config()
    own.num_hidden_layers = len(indices)
    for name in _PER_LAYER:
        if getattr(own, name, None):
            setattr(own, name, [getattr(config, name)[i] for i in indices])
    for parameter in student.parameters():
        parameter.requires_grad_(True)
    return student


def num_parameters(model: PreTrainedModel) -> int:
    """Return the number of weights; tied ones count once."""
    return sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())
