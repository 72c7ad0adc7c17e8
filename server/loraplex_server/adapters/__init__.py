"""The adapter catalogue: names, validation, conversion, storage. No HTTP in here.

    upload | sources  ->  folder_reader  ->  self_test  ->  store
    quarantine            strict reader      as packed      registry + blobs

An upload arrives in `upload` (an archive goes through `archive`), what is fetched through
`sources`. `folder_reader` opens the folder and hands it to the reader of its kind (`formats`; what
is not stored as it is served is converted by `folds`, with the tensors of `base_model`).
`peft_pattern` and `peft_targets` match modules as PEFT does. `checks` does all of that; `registrar`
stores what passes.

`catalog` is what the server sees: records, leases, versions, settings. Behind it, `store` changes
`registry` (SQL: `registry_tables`, `registry_database`, `registry_migrations`) and `blobs`
together; `holds` counts users. `base_identity` tells which base is served.
"""
