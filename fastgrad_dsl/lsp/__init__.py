"""`fastgrad lsp`: editors ask, and the parser, the elaborator and the passes that compile a file answer."""
