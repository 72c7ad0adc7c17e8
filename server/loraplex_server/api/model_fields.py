"""The fields of a body that say who shall answer."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Final

from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from loraplex_server.api.model_names import ModelWish, Naming
from loraplex_server.api.strict_body import StrictBody, check_unicode, invalid

#: Each costs another pass over the linears.
MAX_MIXED: Final = 8

#: More would only overflow what is computed.
Weight = Annotated[float, Field(ge=-100, le=100)]
ModelName = Annotated[str, AfterValidator(check_unicode)]


def _check_lora_path(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    if len(value) != 1:
        raise invalid("must be one name, or a list of one: all prompts have the same adapter")
    return value[0]


class WeightedName(StrictBody):
    """One adapter of a mixture, and the factor on all that it adds."""

    name: Annotated[str, Field(min_length=1), AfterValidator(check_unicode)]
    weight: Weight = 1.0


class ModelFields(StrictBody):
    """The base of bodies that the base model or an adapter answers."""

    needs_model: ClassVar[bool] = True

    model: ModelName | None = None
    adapter_id: ModelName | None = None
    lora_path: Annotated[
        ModelName | None,
        BeforeValidator(_check_lora_path, json_schema_input_type=str | list[str | None] | None),
    ] = None
    adapter_scale: Weight | None = None
    adapters: Annotated[list[WeightedName], Field(min_length=1, max_length=MAX_MIXED)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _check_model(cls, data: Any) -> Any:
        if cls.needs_model and isinstance(data, dict) and not data.get("model"):
            others = ("adapter_id", "lora_path", "adapters", "models")
            if all(data.get(name) is None for name in others):
                raise PydanticCustomError("missing", "Field required", {"param": "model"})
        return data

    @property
    def model_wish(self) -> ModelWish:
        """Who shall answer."""
        given = {"model": self.model, "adapter_id": self.adapter_id, "lora_path": self.lora_path}
        return ModelWish(
            tuple(Naming(param, name) for param, name in given.items() if name is not None),
            mixture=tuple((adapter.name, adapter.weight) for adapter in self.adapters or ()),
            scale=self.adapter_scale,
        )
