"""Who uses the server: keys and roles, whose adapters are whose, and what each tenant used.

`principal` says who asks, `api_key` and `key_store` what keys are kept, `key_ring` which are known
right now; `namespace` which adapters a tenant may name; `usage_store` and `ledger` what was used.
No HTTP in here; the tables are `adapters.tenant_tables`, in the registry's database.
"""
