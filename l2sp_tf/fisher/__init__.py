"""F_jj, the diagonal of the Fisher information (section 3)."""
