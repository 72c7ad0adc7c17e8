"""The adapter catalogue: names, validation, conversion, storage. No HTTP in here.

    upload  ->  folder_reader  ->  identity  ->  blobs  +  catalog
    quarantine  strict reader      content id    files     names, leases

An upload arrives in `upload` (an archive goes through `archive`). `folder_reader` opens the folder
and hands it to the reader of its kind (`formats`; what is not stored as it is served is converted
by `folds`, with the tensors of `base_model`). `peft_pattern` and `peft_targets` match modules as
PEFT does. `catalog` owns the rest: `data_dir`, `blobs`, `holds` and `lease`. `base_identity` tells
it which base is served.
"""
