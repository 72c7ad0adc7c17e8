"""Adapters from training to a real server: PEFT models, folders, and a `Trainer`."""

from __future__ import annotations

import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import loraplex
from loraplex import AdapterFilesError, APIConnectionError, Client, ConflictError, UsageError
from loraplex.integrations.transformers import PushAdapterCallback

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


@pytest.fixture
def client(tiny_server):
    with Client(base_url=tiny_server.base_url) as client:
        yield client


@pytest.fixture
def peft_model(tiny_server):
    """A PEFT model with the adapters "default" (rank 4) and "other" (rank 2)."""
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_server.model), _lora(4))
    model.add_adapter("other", _lora(2))
    return model


def _lora(rank: int) -> LoraConfig:
    return LoraConfig(r=rank, target_modules=["q_proj", "v_proj"], init_lora_weights=False)


def _tokens(client: Client, model: str, prompt: list[int]) -> list[int]:
    choice = client.completions.create(
        model=model, prompt=prompt, max_tokens=6, temperature=0, ignore_eos=True, logprobs=0
    ).choices[0]
    return choice.logprobs.tokens


def test_a_pushed_model_answers_otherwise_than_the_base(client, peft_model):
    adapter = loraplex.push(peft_model, "pushed", client=client)
    assert (adapter.name, adapter.rank_max, adapter.version) == ("pushed", 4, 1)
    assert _tokens(client, "pushed", [5, 6, 7]) != _tokens(client, "tiny", [5, 6, 7])


def test_each_adapter_of_a_model_can_be_pushed(client, peft_model):
    named = loraplex.push(peft_model, "second", adapter_name="other", client=client)
    assert named.rank_max == 2
    peft_model.set_adapter("other")
    assert loraplex.push(peft_model, "second", client=client).id == named.id  # the active one
    with pytest.raises(UsageError, match="no adapter 'third', but default, other"):
        loraplex.push(peft_model, "third", adapter_name="third", client=client)


def test_a_folder_with_several_adapters_is_pushed_by_name(client, peft_model, tmp_path):
    peft_model.save_pretrained(tmp_path)
    assert loraplex.push(tmp_path, "a", client=client).rank_max == 4
    assert loraplex.push(str(tmp_path), "b", adapter_name="other", client=client).rank_max == 2
    with pytest.raises(AdapterFilesError, match="no such file"):
        loraplex.push(tmp_path, "c", adapter_name="absent", client=client)


def test_other_content_under_the_same_name_is_replaced_only_when_asked(client, peft_model):
    loraplex.push(peft_model, "again", client=client)
    with pytest.raises(ConflictError):
        loraplex.push(peft_model, "again", adapter_name="other", client=client)
    adapter = loraplex.push(peft_model, "again", adapter_name="other", client=client, replace=True)
    assert (adapter.version, adapter.rank_max) == (2, 2)


def test_a_model_without_adapters_is_refused(client, tiny_server):
    plain = AutoModelForCausalLM.from_pretrained(tiny_server.model)
    with pytest.raises(UsageError, match="LlamaForCausalLM has no adapters"):
        loraplex.push(plain, "plain", client=client)


def test_without_a_client_the_environment_says_where(tiny_server, peft_model, monkeypatch):
    monkeypatch.setenv("LORAPLEX_BASE_URL", tiny_server.base_url)
    assert loraplex.push(peft_model, "from-environment").name == "from-environment"


def _train(model, folder, callback) -> None:
    tokens = torch.tensor([5, 6, 7, 8])
    rows = [{"input_ids": tokens, "labels": tokens}] * 4
    options = TrainingArguments(
        str(folder),
        max_steps=2,
        save_steps=1,
        per_device_train_batch_size=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    Trainer(model=model, args=options, train_dataset=rows, callbacks=[callback]).train()


def test_a_training_run_leaves_its_adapter_on_the_server(client, peft_model, tmp_path):
    callback = PushAdapterCallback("run", client=client, raise_errors=True)
    _train(peft_model, tmp_path, callback)
    assert [v.version for v in client.adapters.versions("run")] == [2, 1]
    # The last checkpoint and the end are the same weights, so the same version.
    assert callback.pushed[-1] == callback.pushed[-2] != callback.pushed[0]


def test_checkpoints_can_have_names_of_their_own(client, peft_model, tmp_path):
    callback = PushAdapterCallback(
        "steps", when="save", name_steps=True, adapter_name="other", client=client
    )
    _train(peft_model, tmp_path, callback)
    assert [name for name, _ in callback.pushed] == ["steps-step-1", "steps-step-2"]
    assert client.adapters.get("steps-step-2").rank_max == 2


def test_a_push_that_fails_ends_no_training_unless_asked(peft_model, tmp_path, caplog):
    with Client(base_url="http://127.0.0.1:1", max_retries=0) as nobody:
        callback = PushAdapterCallback("lost", when="end", client=nobody)
        with caplog.at_level(logging.WARNING):
            _train(peft_model, tmp_path / "a", callback)
        assert "training goes on" in caplog.text
        assert callback.pushed == []
        strict = PushAdapterCallback("lost", client=nobody, raise_errors=True)
        with pytest.raises(APIConnectionError):
            _train(peft_model, tmp_path / "b", strict)


def test_only_the_main_process_pushes(peft_model, tmp_path):
    from transformers import TrainerControl, TrainerState

    with Client(base_url="http://127.0.0.1:1", max_retries=0) as nobody:
        callback = PushAdapterCallback("mine", client=nobody, raise_errors=True)
        state = TrainerState(is_world_process_zero=False, global_step=1)
        options = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
        callback.on_save(options, state, TrainerControl())
        callback.on_train_end(options, state, TrainerControl(), model=peft_model)
    assert callback.pushed == []
