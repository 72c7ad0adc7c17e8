"""Pure mathematics of adapter conversions: tensors in, LoRA pairs and vectors out.

Invariants: float64 inside and in what is returned, but float32 where PEFT decomposes in float32
(`lora`); no I/O, no configuration, no knowledge of files. Each fold is exact: the product of the
returned pair is the update that the method's own code adds to the weight. Shapes are checked by
whoever read the tensors.
"""
