"""Pushing adapters while `transformers.Trainer` trains them.

Trainer(..., callbacks=[PushAdapterCallback("support-bot")])
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Literal, Unpack

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from loraplex.adapter_options import RegisterOptions
from loraplex.client import Client
from loraplex.errors import LoraplexError
from loraplex.model_push import Pushable, push, saved_folder

logger = logging.getLogger(__name__)


class PushAdapterCallback(TrainerCallback):  # type: ignore[misc,unused-ignore] # may be untyped
    """Pushes the adapter in training, from the main process alone.

    Of a checkpoint the files that the trainer wrote are sent, so it works for models in parts
    (FSDP, DeepSpeed) too. A push that fails is logged, and training goes on, unless
    `raise_errors`.

    Attributes:
        pushed: Each name with the content id it was given, in order.
    """

    def __init__(
        self,
        name: str,
        *,
        when: Literal["save", "end", "both"] = "both",
        name_steps: bool = False,
        adapter_name: str | None = None,
        client: Client | None = None,
        raise_errors: bool = False,
        **options: Unpack[RegisterOptions],
    ) -> None:
        """Make it; nothing is sent yet.

        Args:
            name: What requests will call it. Each push is a new version of this name.
            when: At each checkpoint ("save"), when training ends ("end"), or both.
            name_steps: Push each checkpoint under a name of its own, NAME-step-N.
            adapter_name: Which of the model's adapters; default: the active one.
            client: Whom to ask; default: a `Client` for LORAPLEX_BASE_URL and LORAPLEX_API_KEY.
            raise_errors: End the training when a push fails.
            options: The fields of `RegisterOptions`.
        """
        self.name = name
        self.pushed: list[tuple[str, str]] = []
        self._when = when
        self._name_steps = name_steps
        self._adapter_name = adapter_name
        self._client = client
        self._raise_errors = raise_errors
        self._options: RegisterOptions = {"replace": True, **options}

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Push the checkpoint that was just written."""
        if self._when == "end" or not state.is_world_process_zero:
            return
        checkpoint = Path(args.output_dir or "trainer_output") / f"checkpoint-{state.global_step}"
        name = f"{self.name}-step-{state.global_step}" if self._name_steps else self.name
        self._push(saved_folder(checkpoint, self._adapter_name), name)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Push the model as it is now."""
        if self._when == "save" or not state.is_world_process_zero:
            return
        model = kwargs["model"]
        self._push(getattr(model, "module", model), self.name, self._adapter_name)

    def _push(self, model: Pushable, name: str, adapter_name: str | None = None) -> None:
        try:
            adapter = push(
                model, name, adapter_name=adapter_name, client=self._client, **self._options
            )
        except (LoraplexError, OSError) as error:
            if self._raise_errors:
                raise
            logger.warning("could not push the adapter as %s; training goes on: %s", name, error)
            return
        self.pushed.append((adapter.name, adapter.id))
        logger.info("pushed %s: version %d, %s", adapter.name, adapter.version, adapter.id)
