"""`peft_type=LORA`: LoRA, and everything that its configuration can add to it.

A linear is read into an update `B A` of its weight. Variants differ in how they store it (blocks,
pooled inputs, a square matrix in between) and in which base they were trained on (PiSSA, OLoRA,
KaSA); DoRA then scales the outputs. Linears of the decoder layers are in `lora_tensors` and
`lora_linear`, the head and the embedding in `vocabulary`, trained biases, rows of tokens and whole
modules in the files of these names.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from loraplex_memory.adapter_spec import EMBEDDING, HEAD
from loraplex_memory.adapter_weights import AdapterWeights, LoRAPair, ModuleKey, PartKey
from loraplex_server.adapters.base_model import BaseModel
from loraplex_server.adapters.formats.biases import read_biases, shifts
from loraplex_server.adapters.formats.folder import PeftFolder
from loraplex_server.adapters.formats.lora_fields import read_lora_fields
from loraplex_server.adapters.formats.lora_tensors import LoraTensors
from loraplex_server.adapters.formats.token_rows import TokenRows, read_token_rows
from loraplex_server.adapters.formats.vocabulary import read_vocabulary_lora
from loraplex_server.adapters.formats.whole_modules import read_whole_modules


def read_lora(folder: PeftFolder, base: BaseModel) -> AdapterWeights:
    """Read a LoRA of any variant; a `FormatReader`."""
    fields = read_lora_fields(folder.config, base)
    linears = LoraTensors(folder, base, fields).take()
    biases = read_biases(folder, base, fields.bias)
    whole = read_whole_modules(folder, base)
    rows = read_token_rows(folder, base)
    vocabulary = read_vocabulary_lora(folder, base, fields)
    if doubled := sorted(name for name, _ in vocabulary.keys() & whole.keys()):
        folder.ledger.refuse(
            f"DoRA on the {' and the '.join(doubled)} of another base; save it without that copy "
            "(save_embedding_layers=False), or train on the base served here"
        )
    parts = {**vocabulary, **whole}
    _check_rows(folder, rows, parts)
    parts |= rows.parts
    if fields.invocation_token_ids and (parts or biases):
        folder.config.refuse(
            "alora_invocation_tokens",
            "changes linears only; what else this adapter brings would hold before the "
            "invocation too; retrain with LoRA on attention and MLP linears only",
        )
    if folder.ledger:
        return AdapterWeights()
    lora: dict[ModuleKey, LoRAPair] = {}
    for linear in linears:
        pairs, own_parts = linear.pairs_and_parts(base, biases)
        lora |= pairs
        parts |= own_parts
    # Those of linears without LoRA (`bias="all"`): the others hold their own already.
    parts = shifts(base, biases) | parts
    return AdapterWeights(
        lora,
        parts,
        token_ids=rows.token_ids,
        head_token_ids=rows.head_token_ids,
        invocation_token_ids=fields.invocation_token_ids,
    )


def _check_rows(folder: PeftFolder, rows: TokenRows, parts: Mapping[PartKey, torch.Tensor]) -> None:
    names = {name.partition(".")[0] for name, _ in parts}
    if (rows.token_ids and EMBEDDING in names) or (rows.head_token_ids and HEAD in names):
        folder.config.refuse(
            "trainable_token_indices",
            "PEFT does not train rows of a module that is adapted or saved as a whole",
        )
