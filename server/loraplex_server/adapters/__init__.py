"""The adapter catalogue: names, validation, conversion, storage. No HTTP in here.

    upload  ->  peft_format  ->  identity  ->  blobs  +  catalog
    quarantine  strict reader    content id    files     names, leases

`peft_config` and `peft_pattern` read the configuration; `archive` unpacks; `errors` is the tree.
"""
