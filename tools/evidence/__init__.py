"""Tables, figures and claims of the READMEs, computed from the records that are kept in the repository."""
