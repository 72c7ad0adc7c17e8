"""What the OpenAPI document tells of single operations beyond what FastAPI sees in their routes.

An operation that is not named here is described by its route alone: `responses` or
`response_model` say what it answers. A test fails when neither does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from pydantic import BaseModel

from loraplex_server.api import account_answers, dialogue_answers
from loraplex_server.api import answer_schemas as answers
from loraplex_server.api import resource_schemas as resources
from loraplex_server.api.adapter_bodies import SourceBody

#: An operation: method and path.
Operation = tuple[str, str]

#: Of answers with status 2xx, where the route does not say.
ANSWERS: Final[Mapping[Operation, type[BaseModel]]] = {
    ("post", "/v1/completions"): answers.CompletionAnswer,
    ("post", "/v1/chat/completions"): answers.ChatAnswer,
    ("post", "/generate"): answers.LoraxAnswer,
    ("post", "/v1/responses"): dialogue_answers.ResponseAnswer,
    ("post", "/v1/messages"): dialogue_answers.MessageAnswer,
    ("post", "/v1/messages/count_tokens"): dialogue_answers.CountAnswer,
    ("post", "/v1/embeddings"): dialogue_answers.EmbeddingListAnswer,
    ("post", "/tokenize"): dialogue_answers.TokenizeAnswer,
    ("post", "/detokenize"): dialogue_answers.DetokenizeAnswer,
    ("post", "/v1/keys"): account_answers.NewKeyAnswer,
    ("get", "/v1/keys"): account_answers.KeyListAnswer,
    ("delete", "/v1/keys/{key_id}"): account_answers.KeyDeletedAnswer,
    ("get", "/v1/usage"): account_answers.UsageListAnswer,
    ("get", "/v1/audit"): account_answers.AuditListAnswer,
    ("get", "/v1/models"): resources.ModelListAnswer,
    ("get", "/v1/models/{name}"): resources.ModelAnswer,
    ("delete", "/v1/models/{name}"): resources.ModelDeletedAnswer,
    ("post", "/load_lora_adapter"): resources.SglangAnswer,
    ("post", "/unload_lora_adapter"): resources.SglangAnswer,
    ("post", "/v1/adapters"): resources.AdapterAnswer,
    ("get", "/v1/adapters"): resources.AdapterListAnswer,
    ("post", "/v1/adapters/validate"): resources.ValidationAnswer,
    ("get", "/v1/adapters/{name}/versions"): resources.VersionListAnswer,
    ("get", "/v1/adapters/{name}"): resources.AdapterReportAnswer,
    ("patch", "/v1/adapters/{name}"): resources.AdapterAnswer,
    ("delete", "/v1/adapters/{name}"): resources.AdapterDeletedAnswer,
    ("post", "/v1/adapters/{name}/rollback"): resources.AdapterAnswer,
    ("post", "/v1/adapters/{name}/prefetch"): resources.PrefetchAnswer,
}

#: Operations that answer with server-sent events only.
STREAMS: Final = frozenset({("post", "/generate_stream")})

#: Operations that take `stream`, as the bodies that they judge have it, and never stream.
WHOLE: Final = frozenset({("post", "/v1/messages/count_tokens")})

#: Statuses of success beside the route's own.
MORE_STATUSES: Final[Mapping[Operation, tuple[int, ...]]] = {
    ("post", "/v1/adapters"): (200,),  # the same adapter was there already
}

#: Bodies that the endpoint reads by itself, by their media type.
BODIES: Final[Mapping[Operation, Mapping[str, type[BaseModel]]]] = {
    ("post", "/v1/adapters"): {
        "multipart/form-data": resources.UploadForm,
        "application/json": SourceBody,
    },
    ("post", "/v1/adapters/validate"): {"multipart/form-data": resources.ValidationForm},
}

_QUESTION: Final = [{"role": "user", "content": "What is the capital of France?"}]

#: Bodies to try, with MODEL and ADAPTER for names of this server's.
EXAMPLES: Final[Mapping[Operation, Any]] = {
    ("post", "/v1/completions"): {"model": "MODEL", "prompt": "Once upon", "max_tokens": 16},
    ("post", "/v1/chat/completions"): {"model": "MODEL", "messages": _QUESTION, "max_tokens": 16},
    ("post", "/v1/responses"): {"model": "MODEL", "input": "What is the capital of France?"},
    ("post", "/v1/messages"): {"model": "MODEL", "messages": _QUESTION, "max_tokens": 16},
    ("post", "/v1/messages/count_tokens"): {"model": "MODEL", "messages": _QUESTION},
    ("post", "/v1/embeddings"): {"model": "MODEL", "input": ["Once upon", "a time"]},
    ("post", "/tokenize"): {"model": "MODEL", "prompt": "Once upon"},
    ("post", "/detokenize"): {"model": "MODEL", "tokens": [5, 6]},
    ("post", "/generate"): {"inputs": "Once upon", "parameters": {"max_new_tokens": 16}},
    ("post", "/generate_stream"): {"inputs": "Once upon", "parameters": {"max_new_tokens": 16}},
    ("patch", "/v1/adapters/{name}"): {"ttl_s": 86400},
    ("post", "/v1/adapters/{name}/rollback"): {"version": 1},
    ("post", "/v1/keys"): {"name": "laptop", "role": "user", "tenant": "acme"},
    ("post", "/v1/load_lora_adapter"): {"lora_name": "pirate", "lora_path": "pirate"},
    ("post", "/v1/unload_lora_adapter"): {"lora_name": "pirate"},
    ("post", "/load_lora_adapter"): {"lora_name": "pirate", "lora_path": "pirate"},
    ("post", "/unload_lora_adapter"): {"lora_name": "pirate"},
    ("post", "/v1/adapters"): {"name": "pirate", "source": "hf:someone/pirate-lora"},
}
