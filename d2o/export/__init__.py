"""Floor 3: a trained student in other people's formats: ONNX, torch.export, model card."""
