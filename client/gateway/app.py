"""The HTTP interface: what OpenAI's clients call, and what vLLM added to it for adapters."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from transformers import LogitsProcessor

from client.gateway import answers
from client.gateway.chat import chat_prompt, check_tokens, encode, render
from client.gateway.doors import Doors
from client.gateway.engine.engine import Engine
from client.gateway.engine.growing import Wanted
from client.gateway.engine.served import Served
from client.gateway.forms import ChatForm, CompletionForm, Form, pieces, whole
from client.gateway.metrics import Metrics
from client.gateway.refusals import Refused, refused
from client.gateway.requests import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    LoadAdapterRequest,
    ResponseFormat,
    TokenizeRequest,
    UnloadAdapterRequest,
)
from client.gateway.streams import EventStream, unless_gone
from client.gateway.writing import write

R = TypeVar("R", bound=BaseModel)
_log = logging.getLogger(__name__)
_COMPLETION_TOKENS = 16
"""Of a completion that does not say how many; OpenAI's own number."""


@dataclass(frozen=True)
class Offer:
    """What a gateway allows."""

    context: int | None
    """Tokens of a prompt and its answer that the model is made for; None: it does not say."""
    max_tokens: int
    """Tokens of one answer at most."""
    adapter_folder: Path | None
    """Where adapters may be loaded from by a request; None: they may not."""


class Gateway:
    """Answers HTTP requests by an engine's texts."""

    def __init__(self, engine: Engine, doors: Doors, offer: Offer):
        self._engine, self._doors, self._offer = engine, doors, offer
        self._metrics = Metrics(engine)

    def app(self) -> Starlette:
        """As an ASGI application."""
        routes = [
            Route("/health", self._health),
            self._route("/metrics", "GET", self._show_metrics),
            self._route("/v1/models", "GET", self._models),
            self._route("/v1/models/{name:path}", "GET", self._model),
            self._route("/v1/completions", "POST", self._complete),
            self._route("/v1/chat/completions", "POST", self._chat),
            self._route("/v1/load_lora_adapter", "POST", self._load),
            self._route("/v1/unload_lora_adapter", "POST", self._unload),
            self._route("/tokenize", "POST", self._tokenize),
            self._route("/detokenize", "POST", self._detokenize),
            self._route("/tokenizer_info", "GET", self._tokenizer_info),
        ]
        return Starlette(routes=routes, exception_handlers={HTTPException: _unknown})

    def _route(self, path: str, method: str, answer: Callable[[Request], Awaitable[Response]]) -> Route:
        async def call(request: Request) -> Response:
            try:
                sender = self._doors.check(request)
                response = await self._answer(request, sender, answer)
            except ClientDisconnect:
                response = Response(status_code=499)  # nobody reads it
            except Exception as error:
                problem = refused(error)
                if problem.status == 500:
                    _log.exception("%s could not be answered.", path)
                response = problem.response()
            self._metrics.requests.labels(path, response.status_code).inc()
            return response

        return Route(path, call, methods=[method])

    async def _answer(
        self, request: Request, sender: bytes, answer: Callable[[Request], Awaitable[Response]]
    ) -> Response:
        """A stream is inside the doors until it ends."""
        if request.method == "GET":
            return await answer(request)
        self._doors.enter(sender)
        response: Response | None = None
        try:
            response = await answer(request)
        finally:
            if isinstance(response, EventStream):
                response.at_end = lambda: self._doors.leave(sender)
            else:
                self._doors.leave(sender)
        return response

    async def _read(self, request: Request, kind: type[R]) -> R:
        return kind.model_validate_json(await self._doors.body(request))

    # What clients ask for ------------------------------------------------------------------------------------------

    async def _health(self, request: Request) -> Response:
        return PlainTextResponse("ok\n") if self._engine.is_alive else PlainTextResponse("failed\n", 503)

    async def _show_metrics(self, request: Request) -> Response:
        return PlainTextResponse(self._metrics.page())

    async def _models(self, request: Request) -> Response:
        cards = [answers.ModelCard.of(served) for served in self._engine.shelf]
        return _json(answers.ModelList(data=cards))

    async def _model(self, request: Request) -> Response:
        return _json(answers.ModelCard.of(self._served(request.path_params["name"])))

    async def _load(self, request: Request) -> Response:
        asked, root = await self._read(request, LoadAdapterRequest), self._offer.adapter_folder
        if root is None:
            raise Refused(403, "This gateway loads no adapters on request; start it with --adapter-folder.")
        folder = next((path for path in root.iterdir() if path.is_dir() and path.name == asked.lora_path), None)
        if folder is None:
            raise Refused(
                404, f"lora_path {asked.lora_path!r} is no folder in the gateway's --adapter-folder.", param="lora_path"
            )
        await asyncio.to_thread(import_module, "peft")  # which takes seconds, in which the engine goes on
        await asyncio.wrap_future(self._engine.load(asked.lora_name, folder))
        return PlainTextResponse(f"Success: LoRA adapter '{asked.lora_name}' added successfully.")

    async def _unload(self, request: Request) -> Response:
        asked = await self._read(request, UnloadAdapterRequest)
        if self._offer.adapter_folder is None:
            raise Refused(403, "This gateway unloads no adapters on request; start it with --adapter-folder.")
        await asyncio.wrap_future(self._engine.unload(asked.lora_name))
        return PlainTextResponse(f"Success: LoRA adapter '{asked.lora_name}' removed successfully.")

    async def _tokenize(self, request: Request) -> Response:
        asked = await self._read(request, TokenizeRequest)
        served = self._served(asked.model)
        if asked.messages is not None:
            options = {"add_generation_prompt": asked.add_generation_prompt}
            ids = await asyncio.to_thread(render, served, asked.messages, **options)
        elif asked.prompt is not None:
            ids = await asyncio.to_thread(encode, served, asked.prompt, asked.add_special_tokens)
        else:
            raise Refused(400, "Give a prompt or messages to tokenize.")
        return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": self._offer.context})

    async def _detokenize(self, request: Request) -> Response:
        asked = await self._read(request, DetokenizeRequest)
        served = self._served(asked.model)
        check_tokens(served, asked.tokens)
        return JSONResponse({"prompt": served.tokenizer.decode(asked.tokens)})

    async def _tokenizer_info(self, request: Request) -> Response:
        tokenizer = self._engine.shelf.base.tokenizer
        return JSONResponse(
            {
                "tokenizer_class": type(tokenizer).__name__, "chat_template": tokenizer.chat_template,
                "eos_token": tokenizer.eos_token, "bos_token": tokenizer.bos_token, "pad_token": tokenizer.pad_token,
            }
        )  # fmt: skip

    async def _complete(self, request: Request) -> Response:
        asked = await self._read(request, CompletionRequest)
        if asked.suffix or (asked.best_of or asked.n) != asked.n:
            raise Refused(400, "suffix and a best_of other than n are not served; leave them out.")
        served = self._served(asked.model)
        _check_bias(served, asked.logit_bias)
        prompts = await asyncio.to_thread(_as_tokens, served, asked.prompt)
        keeps_to = await asyncio.to_thread(_form, served, asked.response_format)
        wanted = [
            [
                Wanted(
                    served, prompt, self._room(prompt, asked.max_tokens, _COMPLETION_TOKENS), asked.sampling(choice),
                    asked.stops, asked.logprobs, asked.echo and asked.logprobs is not None, keeps_to,
                )
                for choice in range(asked.n)
            ]
            for prompt in prompts
        ]  # fmt: skip
        form = CompletionForm(served, asked)
        return await self._respond(request, asked.stream, form, wanted)

    async def _chat(self, request: Request) -> Response:
        asked = await self._read(request, ChatRequest)
        served = self._served(asked.model)
        _check_bias(served, asked.logit_bias)
        prompt = await asyncio.to_thread(chat_prompt, served, asked)
        most = self._room(
            prompt, asked.max_tokens if asked.max_completion_tokens is None else asked.max_completion_tokens, None
        )
        logprobs = (asked.top_logprobs or 0) if asked.logprobs else None
        keeps_to = await asyncio.to_thread(_form, served, asked.response_format)
        wanted = [
            Wanted(served, prompt, most, asked.sampling(choice), asked.stops, logprobs, make_processors=keeps_to)
            for choice in range(asked.n)
        ]
        return await self._respond(request, asked.stream, ChatForm(served, asked), [wanted])

    # How they are answered -----------------------------------------------------------------------------------------

    def _served(self, name: str | None) -> Served:
        served = self._engine.shelf.base if name is None else self._engine.shelf.get(name)
        if served is None:
            raise Refused(
                404, f"The model {name!r} is not served here; /v1/models lists those that are.", code="model_not_found",
                param="model",
            )  # fmt: skip
        return served

    def _room(self, prompt: Sequence[int], asked: int | None, otherwise: int | None) -> int:
        """How many tokens an answer may have."""
        check_tokens(self._engine.shelf.base, prompt)
        if not prompt:
            raise Refused(400, "The prompt is empty; give at least one token to go on from.", param="prompt")
        most, context = self._offer.max_tokens, self._offer.context
        if asked is not None and asked > most:
            raise Refused(
                400, f"max_tokens: this gateway makes {most} tokens at most for a request.", param="max_tokens"
            )
        room = most if context is None else context - len(prompt)
        wanted = (
            min(most, max(room, 1)) if asked is None and otherwise is None else otherwise if asked is None else asked
        )
        assert wanted is not None
        if wanted > room:
            raise Refused(
                400, f"The prompt's {len(prompt)} tokens and {wanted} more are over the model's {context}; shorten it.",
                code="context_length_exceeded",
            )  # fmt: skip
        return wanted

    async def _respond(
        self, request: Request, stream: bool | None, form: Form, wanted: Sequence[Sequence[Wanted]]
    ) -> Response:
        events = write(self._engine, self._metrics, wanted)
        if not stream:
            return _json(await unless_gone(request.receive, whole(form, events)))
        try:
            first = await unless_gone(request.receive, anext(events))
        except BaseException:
            await events.aclose()
            raise
        return EventStream(pieces(form, first, events))


def _json(answer: BaseModel) -> Response:
    return Response(answer.model_dump_json(), media_type="application/json")


def _as_tokens(served: Served, prompt: str | list[str] | list[int] | list[list[int]]) -> list[list[int]]:
    """One prompt or more, as a list of them."""
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        prompt = [prompt]  # type: ignore[assignment, list-item]
    return [encode(served, each) if isinstance(each, str) else each for each in prompt]  # type: ignore[misc]


def _check_bias(served: Served, biases: Mapping[int, float] | None) -> None:
    if (largest := max(biases or (0,))) >= served.vocabulary:
        raise Refused(
            400,
            f"logit_bias: the model has tokens up to {served.vocabulary - 1}, and not {largest}.",
            param="logit_bias",
        )


def _form(served: Served, asked: ResponseFormat | None) -> Callable[[], Sequence[LogitsProcessor]]:
    """What keeps a text to the form that is asked for. Raises `BadUsage`."""
    if asked is None or asked.type == "text":
        return tuple
    if asked.regex is not None and asked.type == "regex":
        make = served.grammars.of_regex(asked.regex)
    else:
        is_free = asked.json_schema is None or asked.type == "json_object"
        make = served.grammars.of_schema({"type": "object"} if is_free else asked.json_schema.schema_)  # type: ignore[union-attr]
    return lambda: (make(),)


def _unknown(request: Request, error: Exception) -> Response:
    """Of paths and methods that are not there."""
    assert isinstance(error, HTTPException)
    return Refused(error.status_code, f"{request.method} {request.url.path} is not answered here.").response()
