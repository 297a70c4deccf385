"""What every section of a file of settings is; recipes, tables, protocols and methods build on it."""
