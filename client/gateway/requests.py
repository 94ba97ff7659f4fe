"""What clients may ask for, as OpenAI's and vLLM's interfaces name it. Fields that nobody here knows are left out, as
they are by every other server: clients send many.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from client.gateway.engine.sampling import Sampling

_Token = Annotated[int, Field(ge=0, lt=2**31)]
_Stop = Annotated[str, Field(min_length=1, max_length=1000)]
_Tokens = Annotated[int, Field(ge=0, lt=2**31)]


class _Request(BaseModel):
    model_config = ConfigDict(allow_inf_nan=False, frozen=True)


class StreamOptions(_Request):
    """Of a stream."""

    include_usage: bool = False
    """Whether a last piece tells the usage."""


class JsonSchema(_Request):
    """A schema, and a name for it."""

    schema_: dict[str, Any] | bool = Field(default=True, alias="schema")


class ResponseFormat(_Request):
    """The form that an answer must have."""

    type: Literal["text", "json_object", "json_schema", "regex"]
    json_schema: JsonSchema | None = None
    regex: Annotated[str, Field(max_length=10_000)] | None = None

    @model_validator(mode="after")
    def _is_complete(self) -> "ResponseFormat":
        if self.type in ("json_schema", "regex") and getattr(self, self.type) is None:
            raise ValueError(f"the type {self.type} needs the field {self.type}")
        return self


class _Generation(_Request):
    """What both kinds of requests have."""

    model: str
    n: int = Field(default=1, ge=1, le=128)
    max_tokens: _Tokens | None = None
    min_tokens: _Tokens = 0
    stop: _Stop | Annotated[list[_Stop], Field(max_length=16)] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63 - 128)
    temperature: float | None = Field(default=None, ge=0, le=100)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1, lt=2**31)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, gt=0, le=100)
    frequency_penalty: float | None = Field(default=None, ge=-100, le=100)
    presence_penalty: float | None = Field(default=None, ge=-100, le=100)
    logit_bias: dict[_Token, Annotated[float, Field(ge=-100, le=100)]] | None = None
    ignore_eos: bool = False
    response_format: ResponseFormat | None = None

    @property
    def stops(self) -> list[str]:
        """The strings at which the text stops."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    def sampling(self, choice: int) -> Sampling:
        """How the tokens of the choice of this number are chosen."""
        return Sampling(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=None if self.top_k is None else max(self.top_k, 0),
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            frequency_penalty=self.frequency_penalty or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            logit_bias=self.logit_bias or {},
            seed=None if self.seed is None else self.seed + choice,
            min_tokens=self.min_tokens,
            ignore_eos=self.ignore_eos,
        )


class CompletionRequest(_Generation):
    """POST /v1/completions."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=1024)]
        | Annotated[list[_Token], Field(min_length=1)]
        | Annotated[list[Annotated[list[_Token], Field(min_length=1)]], Field(min_length=1, max_length=1024)]
    )
    echo: bool = False
    logprobs: int | None = Field(default=None, ge=0, le=20)
    best_of: int | None = None
    suffix: str | None = None


class Message(_Request):
    """One of a conversation; the model's template may know more of it than is named here."""

    model_config = ConfigDict(extra="allow")

    role: Annotated[str, Field(min_length=1, max_length=100)]
    content: str | list[dict[str, Any]] | None = None


class ChatRequest(_Generation):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: _Tokens | None = None
    logprobs: bool | None = False
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class LoadAdapterRequest(_Request):
    """POST /v1/load_lora_adapter, as vLLM has it; the path is the name of a folder in that of `--adapter-folder`."""

    lora_name: Annotated[str, Field(min_length=1, max_length=200)]
    lora_path: Annotated[str, Field(min_length=1, max_length=200)]


class UnloadAdapterRequest(_Request):
    """POST /v1/unload_lora_adapter."""

    lora_name: str


class TokenizeRequest(_Request):
    """POST /tokenize: a text, or a conversation by the model's template."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True


class DetokenizeRequest(_Request):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[_Token]
