"""Other models in the same form, and the Transformer that they are compared with."""
