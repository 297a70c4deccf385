"""The maths of measuring: tensors in, numbers out."""
