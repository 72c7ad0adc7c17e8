"""Readers of adapter formats: from the files of a trainer to the one internal form.

folder.py         what a reader reads: configuration fields and tensors, each accounted for
config_fields.py  typed getters of configuration fields
ledger.py         what became of each field and tensor, and every reason to refuse
linears.py        names of the linears that tensors belong to
rank_rule.py      rank and scale of a module, with PEFT's patterns
registry.py       the reader of each `peft_type`, and why others have none
"""
