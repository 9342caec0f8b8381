"""The documentation site: pages of the repository and a reference made from docstrings."""
