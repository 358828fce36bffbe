"""Source that is copied verbatim beside generated modules; every file here imports only torch and its siblings."""
