"""The adapter catalogue: names, validation, conversion, storage. No HTTP in here.

    upload  ->  peft_format  ->  identity  ->  blobs  +  catalog
    quarantine  strict reader    content id    files     names, leases

An upload arrives in `upload` (an archive goes through `archive`). `peft_format` reads it with
`peft_config` (fields: `peft_fields`; patterns: `peft_pattern`; targets: `peft_targets`) and
`peft_keys`, and collects every fault in `ledger`. `catalog` owns the rest: `data_dir`,
`catalog_tables`, `blobs`, `holds` and `lease`. `base_identity` tells it which base is served.
"""
