"""The version; in a file of its own, so that no module has to import the package that it is a part of."""

__version__ = "0.1.0"
