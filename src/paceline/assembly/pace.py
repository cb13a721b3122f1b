"""`Pace`: requests in, completions and text out, by any number of callers at the same time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, get_args

from paceline.config import GenerationDefaults
from paceline.engine import Driver, Engine, TextStream, raise_failure
from paceline.errors import RequestError, shorten
from paceline.models.generation_config import end_tokens, unusable, with_defaults
from paceline.requests import RequestSettings, read_prompt

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator, Sequence

    import numpy as np
    import torch
    from transformers import PreTrainedTokenizerBase

    from paceline.assembly.parts import Parts
    from paceline.contracts import Completion, Request
    from paceline.costs import RoundSeconds
    from paceline.engine import RequestUpdate
    from paceline.engine.loop import Choose, OnComplete
    from paceline.selection import AdaptiveController, UntrainedController

    Messages = Mapping[str, Any] | Sequence[Mapping[str, Any]]
    Prompt = str | Messages | Sequence[int] | np.ndarray | torch.Tensor


class Pace:
    """A target with its drafters, ready to generate; `paceline.load` returns one.

    Thread-safe: any number of threads, generators and asyncio tasks may use one `Pace` at the same
    time. Their requests are decoded together.
    """

    def __init__(
        self,
        parts: Parts,
        choose: Choose | None = None,
        controller: AdaptiveController | UntrainedController | None = None,
        on_complete: OnComplete | None = None,
        notes: Sequence[str] = (),
        round_seconds: RoundSeconds | None = None,
    ) -> None:
        """round_seconds: prices of this machine, by which drafts are cut while several rows are in
        flight; None verifies drafts whole.
        """
        self.parts = parts
        self.controller = controller
        self._notes = tuple(notes)
        self.engine = Engine(
            parts.target,
            parts.drafters,
            decode=parts.detokenizer,
            choose=choose,
            controller=controller,
            on_complete=on_complete,
            round_seconds=round_seconds,
            **parts.config.engine.model_dump(),
        )
        self.driver = Driver(self.engine)

    @property
    def drafters(self) -> list[str]:
        """Names of the drafters, `none` first."""
        return list(self.parts.drafters)

    @property
    def notes(self) -> list[str]:
        """Notes on the policy, the target, the drafters and their forwards, one line each."""
        context = self.parts.target.context_note
        target = [f"target: {context}"] if context else []
        forwards = {name: model.forward_note for name, model in self.parts.models().items()}
        slower = [f"forward of {name}: {note}" for name, note in forwards.items() if note]
        drafters = (d.note for d in self.parts.drafters.values() if d.note)
        return [*self._notes, *self.parts.notes, *target, *slower, *drafters]

    def encode(self, prompt: Prompt) -> list[int]:
        """Return a prompt's token ids: of a string as it is, of messages through the chat template.

        Raises RequestError for other values and for messages that the template cannot render.
        """
        return list(encode_prompt(self.parts.tokenizer, read_prompt(prompt)))

    def stop_token_ids(self) -> frozenset[int]:
        """Return the ids that end an answer: the target's generation config's, else the tokenizer's.

        Ids outside the target's vocabulary are left out, since the target never emits them.
        """
        num_logits = self.parts.target.num_logits
        ends = end_tokens(self.parts.target.model, self.parts.tokenizer)
        return frozenset(token for token in ends if 0 <= token < num_logits)

    def request(
        self,
        prompt: Prompt,
        id: str = "0",
        generation_config: GenerationDefaults | None = None,
        features: np.ndarray | torch.Tensor | None = None,
        **settings: Any,
    ) -> Request:
        """Return a checked request; `settings` are the fields of `RequestSettings`.

        prompt: a string, a message or a list of messages, or token ids as a sequence or a
        one-dimensional array. generation_config: `auto` takes settings that the call omits from the
        target's own generation configuration, `no_beams` does so without its beam search, `none` ignores
        it; the default is the configuration's.
        features: [bins, frames] of audio for a target such as Whisper, whose decoder's text begins with
        the prompt.

        Raises RequestError that names the setting that cannot be served.
        """
        read = RequestSettings.read(settings)
        tokens = tuple(encode_prompt(self.parts.tokenizer, read_prompt(prompt)))
        eos = frozenset() if read.ignore_eos else self.stop_token_ids()
        generation_config = generation_config or self.parts.config.generation_config
        if generation_config not in get_args(GenerationDefaults):
            raise RequestError(
                "generation_config must be auto, no_beams or none; got "
                f"{shorten(generation_config)}"
            )
        if generation_config != "none":
            given = read.given()
            target = self.parts.target
            before = target.num_before_output(len(tokens))
            stops, no_beams = read.stop_token_ids | eos, generation_config == "no_beams"
            merged = with_defaults(target, given, before, stops, no_beams)
            if merged != given:
                try:
                    read = RequestSettings.read(merged)
                except RequestError as error:
                    raise unusable(error) from error
        return self.engine.check(read.request(tokens, id, eos, features), is_read=True)

    def complete(self, prompt: Prompt, **settings: Any) -> Completion:
        """Return the completion of one prompt; `settings` are those of `request`.

        Raises RequestError as `request` does, and DecodingError if the request fails.
        """
        return next(self.driver.generate([self.request(prompt, **settings)]))

    async def acomplete(self, prompt: Prompt, **settings: Any) -> Completion:
        """Return the completion of one prompt to an asyncio task; cancelling it cancels the request.

        Raises QueueFullError if too many requests wait already, and otherwise as `complete` does.
        """
        return await self.driver.acomplete(self.request(prompt, **settings))

    def generate(self, prompts: Sequence[Prompt], **settings: Any) -> list[Completion]:
        """Return the completions of several prompts, decoded together, in the prompts' order.

        `settings` are those of `request` and apply to every prompt. Raises as `complete` does.
        """
        given: Any = prompts  # its type is checked here
        several = isinstance(given, Iterable) and not isinstance(given, (str, bytes, Mapping))
        given = list(given) if several else []
        # one conversation is a list of messages
        if not several or (given and isinstance(given[0], Mapping)):
            raise RequestError("generate takes a list of prompts; use complete for one prompt")
        requests = [self.request(p, id=str(i), **settings) for i, p in enumerate(given)]
        done = {c.request_id: c for c in self.driver.generate(requests)}
        return [done[request.id] for request in requests]

    def stream(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Yield the completions of prepared requests in the order in which they finish.

        Raises DecodingError at the first request that fails. Closing the iterator cancels the rest.
        """
        return self.driver.generate(requests)

    def stream_text(self, prompt: Prompt, **settings: Any) -> Iterator[str]:
        """Yield one answer's text in pieces as it is decoded; joined, they equal `Completion.text`.

        Closing the iterator cancels the request. Raises as `complete` does.
        """
        request = self.request(prompt, **settings)
        stream = TextStream(self.parts.detokenizer, request.stop_strings)
        steps = self.driver.progress([request])
        return (piece for _, progress in steps if (piece := _piece(stream, progress)))

    async def astream_text(self, prompt: Prompt, **settings: Any) -> AsyncGenerator[str, None]:
        """Yield one answer's text in pieces to an asyncio task, as `stream_text` does.

        Raises QueueFullError if too many requests wait already, and otherwise as `complete` does.
        """
        request = self.request(prompt, **settings)
        stream = TextStream(self.parts.detokenizer, request.stop_strings)
        async with aclosing(self.driver.aprogress(request)) as progresses:
            async for progress in progresses:
                if piece := _piece(stream, progress):
                    yield piece


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: str | tuple[int, ...] | list[dict[str, Any]]
) -> Sequence[int]:
    """Return the token ids of a prompt that `read_prompt` has read.

    Raises RequestError for messages that the chat template cannot render.
    """
    if isinstance(prompt, tuple):
        return prompt
    if isinstance(prompt, str):
        ids: list[int] = tokenizer(prompt)["input_ids"]
        return ids
    if getattr(tokenizer, "chat_template", None) is None:
        raise RequestError(
            "messages were given but the target's tokenizer has no chat template; "
            "give the prompt as a string"
        )
    try:
        rendered = tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, tokenize=True, return_dict=False
        )
    except Exception as error:  # a template is the model's own code
        reason = " ".join(str(error).split()) or type(error).__name__
        raise RequestError(
            f"the chat template cannot render the messages: {reason[:200]}"
        ) from error
    return list(rendered)


def _piece(stream: TextStream, progress: RequestUpdate) -> str:
    raise_failure(progress)
    if progress.completion is None:
        return stream.push(progress.new_tokens)
    return stream.finish(progress.completion.text)
