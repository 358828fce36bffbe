"""The families of models that are read: each a table of fields, a spec and a table of tensors."""
