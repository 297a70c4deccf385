"""One file per method, readable beside its paper; no files, YAML, printing or saving in here."""
