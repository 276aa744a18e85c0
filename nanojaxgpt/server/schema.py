"""The bodies of requests. A field is honoured, or the request is refused and the field named."""

from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, Field, ValidationError, model_validator

from nanojaxgpt.names import nearest
from nanojaxgpt.server.refusals import Refusal

LARGEST = 2**31 - 1
MAX_CHOICES = 128
MAX_STOPS = 4
MAX_ALTERNATIVES = 20
# Fields of OpenAI's and vLLM's requests that this server has no use for.
UNSUPPORTED = """
audio background best_of chat_template chat_template_kwargs continue_final_message conversation
function_call functions guided_choice guided_json guided_regex ignore_eos include max_tool_calls
metadata min_tokens modalities name parallel_tool_calls prediction previous_response_id
prompt_cache_key prompt_logprobs reasoning reasoning_effort repetition_penalty
safety_identifier service_tier skip_special_tokens stop_token_ids store structured_outputs suffix
tool_call_id tool_calls tool_choice tools truncation verbosity web_search_options
"""

Id = Annotated[int, Field(ge=0, le=LARGEST)]
Ids = Annotated[list[Id], Field(min_length=1)]
Stop = Annotated[str, Field(min_length=1, max_length=1000)]
BiasKey = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
Bias = Annotated[float, Field(ge=-100, le=100)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0, le=LARGEST)]


class Body(
    BaseModel, extra="forbid", allow_inf_nan=False, strict=True, use_attribute_docstrings=True
):
    """JSON of the declared types; null stands for a field that is left out."""


AnyBody = TypeVar("AnyBody", bound=Body)


class TextFormat(Body):
    """The form of an answer: text."""

    type: Literal["text"]


class JsonFormat(Body):
    """The form of an answer: a JSON object."""

    type: Literal["json_object"]


class NamedSchema(Body):
    """A JSON schema, which answers always fit: `strict` changes nothing."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    json_schema: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class SchemaFormat(Body):
    """The form of an answer: JSON that fits a schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


class FlatSchemaFormat(NamedSchema):
    """The same, in the form of OpenAI's Responses."""

    type: Literal["json_schema"]


class StreamOptions(Body):
    """What a stream holds beside the answer."""

    include_usage: bool | None = None
    """Send the numbers of tokens before the end."""


class Drawing(Body):
    """How tokens are drawn, and where their text ends."""

    model: str | None = None
    """A name of /v1/models; default: the first."""
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    """Default: 1. Below 1e-5 the likeliest token is taken."""
    top_p: Fraction | None = None
    """Keep the fewest tokens of this total probability; default: 1."""
    top_k: Count | None = None
    """Keep the k likeliest tokens; 0, the default: all."""
    min_p: Fraction | None = None
    """Leave out tokens below this fraction of the likeliest; default: 0."""
    seed: Count | None = None
    """Of the random choices; default: another one each time."""
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    """The text ends before the first of these strings."""
    logit_bias: Annotated[dict[BiasKey, Bias], Field(max_length=1024)] | None = None
    """What is added to the logits of ids."""
    presence_penalty: Penalty | None = None
    """Subtracted from the logits of tokens that the answer has."""
    frequency_penalty: Penalty | None = None
    """The same, for each time that it has them."""
    stream: bool | None = None
    """Send the answer as it is drawn."""
    user: Annotated[str, Field(max_length=256)] | None = None
    """Who asks, for the log."""


class Choices(Drawing):
    """What completions and chats have in common."""

    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    """How many answers; default: 1. The seed of the i-th is seed + i."""
    stream_options: StreamOptions | None = None
    response_format: (
        Annotated[TextFormat | JsonFormat | SchemaFormat, Field(discriminator="type")] | None
    ) = None
    """What the answer is: any text, a JSON object, or JSON that fits a schema."""
    return_token_ids: bool | None = None
    """Add the ids of the prompt and of the answers."""

    @model_validator(mode="after")
    def check_stream(self) -> Self:
        """Raise ValueError where there are options of a stream without one."""
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream=true")
        return self


class CompletionRequest(Choices):
    """A text to continue."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MAX_CHOICES)]
        | Ids
        | Annotated[list[Ids], Field(min_length=1, max_length=MAX_CHOICES)]
    )
    max_tokens: Count | None = None
    """The most tokens of an answer; default: 16."""
    echo: bool | None = None
    """Begin each answer with its prompt."""
    logprobs: Annotated[int, Field(ge=0, le=MAX_ALTERNATIVES)] | None = None
    """Report log-probabilities, with so many alternatives to each token."""


class TextPart(Body):
    """A piece of a message."""

    type: Literal["text"]
    text: str


class ChatMessage(Body):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1)]


class ChatRequest(Choices):
    """A conversation to answer."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_tokens: Count | None = None
    """The most tokens of an answer; default: what the context has room for."""
    max_completion_tokens: Count | None = None
    """The same."""
    logprobs: bool | None = None
    """Report the log-probability of each token."""
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_ALTERNATIVES)] | None = None
    """How many alternatives to each token; needs logprobs."""

    @model_validator(mode="after")
    def check(self) -> Self:
        """Raise ValueError where fields contradict each other."""
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs=true")
        if self.max_tokens not in (None, self.limit()):
            raise ValueError("max_tokens and max_completion_tokens differ: give one of them")
        return self

    def limit(self) -> int | None:
        """Return the most tokens of an answer."""
        given = self.max_completion_tokens
        return self.max_tokens if given is None else given


class InputPart(Body):
    """A piece of an item; those of an earlier answer are taken as they came."""

    type: Literal["input_text", "output_text"]
    text: str
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    logprobs: Annotated[list[Any], Field(max_length=0)] | None = None


class InputItem(Body):
    """A message of a conversation; one of an earlier answer has an id and a status."""

    type: Literal["message"] | None = None
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[InputPart], Field(min_length=1)]
    id: str | None = None
    status: str | None = None


class TextSettings(Body):
    """The form of an answer."""

    format: (
        Annotated[TextFormat | JsonFormat | FlatSchemaFormat, Field(discriminator="type")] | None
    ) = None


class ResponseRequest(Drawing):
    """A conversation to answer, in the form of OpenAI's Responses; nothing is stored."""

    input: str | Annotated[list[InputItem], Field(min_length=1)]
    instructions: str | None = None
    """The system prompt."""
    max_output_tokens: Annotated[int, Field(ge=1, le=LARGEST)] | None = None
    """The most tokens of the answer; default: what the context has room for."""
    text: TextSettings | None = None
    store: bool | None = None
    """Only false: nothing is stored."""

    @model_validator(mode="after")
    def check_store(self) -> Self:
        """Raise ValueError where the answer is to be stored."""
        if self.store:
            raise ValueError("store=true is not supported: nothing is stored")
        return self


class TokenizeRequest(Body):
    """A text or a conversation to tokenize."""

    model: str | None = None
    prompt: str | None = None
    """A control token, spelled alone, is that token; within a text it is text."""
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    add_special_tokens: bool | None = None
    """Begin a prompt as a completion does; default: true."""
    return_token_strs: bool | None = None
    """Add the spelling of each token."""

    @model_validator(mode="after")
    def check(self) -> Self:
        """Raise ValueError unless there is one thing to tokenize."""
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


class DetokenizeRequest(Body):
    """Ids to decode."""

    model: str | None = None
    tokens: list[Id]


def read_body(kind: type[AnyBody], body: bytes) -> AnyBody:
    """Return the parsed body. Raises Refusal."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise refusal_of(error, kind) from None


def refusal_of(error: ValidationError, kind: type[Body]) -> Refusal:
    """Return the refusal for the first thing that is wrong with a body."""
    problems = error.errors(include_url=False, include_context=False, include_input=False)
    first = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    name = str(first["loc"][0]) if first["loc"] else ""
    if not name:
        told = first["msg"].removeprefix("Value error, ")
        return Refusal(400, f"the body can't be used: {told}", "invalid_body")
    if first["type"] == "extra_forbidden":
        field = str(first["loc"][-1])
        place = ".".join(str(part) for part in first["loc"])[:200]
        if field in UNSUPPORTED.split():
            return Refusal(400, f"{place} is not supported", "unsupported_parameter", field)
        hint = nearest(field, kind.model_fields)
        return Refusal(400, f"no field {place}{hint}", "unknown_parameter", field[:100])
    told = [f"{path_of(p['loc'])}: {p['msg']}" for p in problems if p["loc"][:1] == (name,)]
    return Refusal(400, "; ".join(told[:4]), "invalid_value", name)


def path_of(place: tuple[str | int, ...]) -> str:
    """Return the place of a value as a path, such as messages.0.role."""
    return ".".join(str(part) for part in place)[:200]
