"""A folder that many processes fill together, on a disk or in an object store."""
