"""Fetching adapters for whoever names a source instead of uploading.

`source` says what a URL means and whether it may be used; `local_files`, `https_files` and
`object_files` read single files of each kind; `fetch` brings the wanted ones into a quarantine.
"""
