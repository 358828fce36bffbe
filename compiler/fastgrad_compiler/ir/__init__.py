"""The program: graphs, operations, dims and types, their text, and what every pass keeps."""
