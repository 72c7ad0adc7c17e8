"""Every request the SDK can make, as data: what to send, and what the answer is.

One function per operation, and none of them sends anything: both clients do that with what they
return, so an operation is described once.
"""
