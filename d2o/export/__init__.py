"""A trained student in other people's formats: ONNX, torch.export, model card."""
