"""A byte-level tokenizer of some 300 tokens with a chat template, built in milliseconds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<|end|>", "<|start|>", "<|system|>")
CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{{ prefill | default('') }}{% endif %}"
)
_WORDS = ("he", "ll", "hell", "hello", "Ġw", "or", "ld", "orld", "Ġworld", "ĠS", "ĠST", "OP")


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer: three special ids (0 is `<|end|>`), bytes, a few words."""
    from transformers import PreTrainedTokenizerFast  # takes seconds, of each process

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*SPECIAL_TOKENS, *alphabet, *_WORDS]
    merges = [
        ("h", "e"),
        ("l", "l"),
        ("he", "ll"),
        ("hell", "o"),
        ("Ġ", "w"),
        ("o", "r"),
        ("l", "d"),
        ("or", "ld"),
        ("Ġw", "orld"),
        ("Ġ", "S"),
        ("ĠS", "T"),
        ("O", "P"),
    ]
    vocab = {token: index for index, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|end|>",
        chat_template=CHAT_TEMPLATE,
    )
