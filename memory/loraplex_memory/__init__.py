"""Where bytes are: the page pool, its layout, and the accounts of who holds which page.

The accounting half (`layout`, `adapter_layout`, `allocator`, `page_table`, `residency`) imports no
torch, reads no clock and does no I/O, so that a simulator can drive the very same objects. The
byte half (`pool`, `packing`, `adapter_file`) holds the tensors.
"""
