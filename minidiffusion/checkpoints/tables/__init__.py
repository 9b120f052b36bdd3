"""Key tables: our names and theirs, module by module, for every dialect of the official files."""
